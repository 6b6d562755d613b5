"""`eectl evaluate`: one pass over the test split under a policy file, or under thresholds calibrated on the way."""

from collections.abc import Callable, Iterable
from pathlib import Path

from eectl.core.console import silent
from eectl.core.errors import EectlError, lookup
from eectl.core.files import as_path, check_outputs, write_all
from eectl.core.json_files import json_text
from eectl.core.precision import note_on_precision
from eectl.evaluation.curve import check_plot_path, plot_curve
from eectl.evaluation.opened import Session, measuring, open_session, pass_kept, read_header, score_split
from eectl.evaluation.results import Evaluation
from eectl.evaluation.scoring import score_as_paper, score_policies
from eectl.exits.policy import Policies, ThresholdMetric, policies_for
from eectl.exits.scores import ScoredRows
from eectl.exits.sweep import check_paper
from eectl.exits.thresholds import choose_thresholds, notes_on_rows
from eectl.recipe.budgets import DEFAULT_BUDGETS, parse_budgets

PROTOCOLS = {"calibrated": "thresholds from the calibration split", "paper": "the authors' rule, on the test split itself"}


def evaluate(
    checkpoint: str | Path,
    *,
    budgets: str | float | Iterable[float] | None = None,
    policy: str | Path | None = None,
    criterion: str | None = None,
    protocol: str = "calibrated",
    out: str | Path | None = None,
    plot: str | Path | None = None,
    paper: bool = False,
    predictions: str | Path | None = None,
    save_predictions: str | Path | None = None,
    device: str = "auto",
    precision: str | None = None,
    data_root: str | Path | None = None,
    batch_size: int | None = None,
    overwrite: bool = False,
    say: Callable[[str], None] = silent,
) -> Evaluation | None:
    """Score a checkpoint on the test split at cost budgets.

    Args:
        checkpoint: The network.
        budgets: % of the plain backbone's cost, as `25,50` or numbers; default: the policy's, or 25,50,75,100.
        policy: A policy file from `calibrate`; default: thresholds are chosen on the calibration split first.
        criterion: When a row leaves; default: max-softmax, for regression difference.
        protocol: `calibrated`, or `paper` for the authors' rule on the test split itself.
        out: Where to write the evaluation, for `report`.
        plot: Where to draw the curve, a .png, .pdf or .svg.
        paper: Draw it without a title.
        predictions: Predictions of the test split, in place of a pass over it.
        save_predictions: Where to keep what the pass gives.
        device: auto, cpu, cuda, cuda:N or mps.
        precision: auto, float32, tf32 or bf16; default: what the checkpoint was trained in.
        data_root: Where the data lies; default: where the recipe says.
        batch_size: Rows at once; default: the recipe's.
        overwrite: Replace outputs that exist.
        say: Takes each line that the command shows on stderr.

    Returns:
        What each exit and each budget gives; None in all processes but the first.

    Raises:
        EectlError: requests contradict each other or do not fit the network, or outputs exist; before any data is loaded.
    """
    path, policy_file, out, plot = Path(checkpoint), as_path(policy), as_path(out), as_path(plot)
    file, save_to = as_path(predictions), as_path(save_predictions)
    lookup(PROTOCOLS, protocol, what="protocol")
    if policy_file and (criterion is not None or protocol == "paper"):
        raise EectlError(
            f"--policy {policy_file} brings its own criterion and thresholds; leave out --criterion and --protocol paper"
        )
    wanted = parse_budgets(DEFAULT_BUDGETS if budgets is None else budgets)
    if plot:
        check_plot_path(plot)
    check_outputs([out, plot, save_to], inputs=[path, policy_file, file], overwrite=overwrite)
    given = policies_for(policy_file, None if budgets is None else wanted) if policy_file else None
    header = read_header(path)
    rule = header.criterion(criterion, given, path=policy_file)
    if protocol == "paper":
        check_paper(rule)
    with measuring(device, precision or header.precision) as (world, used):
        session = open_session(path, world=world, precision=used, data_root=as_path(data_root), needs=("test",))
        found = score_split(
            session, "test", criterion=rule, file=file, save_to=save_to, overwrite=overwrite, batch_size=batch_size
        )
        notes = [*session.notes, *note_on_precision(f"{file} was made", found.made.precision, used)]
        if given:
            notes += note_on_precision(f"{policy_file} was made", given.precision, found.made.precision)
        if protocol == "paper":
            result = score_as_paper(found, session.macs, budgets=wanted, origin=session.checkpoint.about.origin)
        else:
            policies = given or _calibrated(session, found, wanted, batch_size, notes, metric=header.metric)
            costs = session.macs if policies.cost == "macs" else policies.costs  # measured: only the policies know them
            result = score_policies(found, policies, costs, origin=session.checkpoint.about.origin)
        if not world.is_main:
            return None
        for note in notes:
            say(f"note: {note}")
        files: dict[Path, bytes | str] = {} if plot is None else {**plot_curve(plot, result, paper=paper)}
        if out is not None:
            files[out] = json_text(result.to_json())
        with pass_kept(save_to):
            write_all(files, overwrite=overwrite)
        if plot is not None:
            say(f"{plot}: written")
        return result


def _calibrated(
    session: Session,
    found: ScoredRows,
    budgets: tuple[float, ...],
    batch_size: int | None,
    notes: list[str],
    *,
    metric: ThresholdMetric,
) -> Policies:
    """Return thresholds that are chosen on the calibration split with the criterion of what was `found` on another."""
    chosen_on = score_split(session, "calibration", criterion=found.criterion, batch_size=batch_size)
    notes += notes_on_rows(chosen_on) if found.num_exits > 1 else ()
    return choose_thresholds(chosen_on, session.macs, budgets=budgets, metric=metric)
