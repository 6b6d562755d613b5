"""`eectl calibrate-thresholds`: one pass over the calibration split, then the best thresholds for each budget, to a file."""

from collections.abc import Callable, Iterable
from pathlib import Path

from eectl.core.console import silent
from eectl.core.errors import EectlError, lookup
from eectl.core.files import as_path, check_outputs
from eectl.core.precision import note_on_precision
from eectl.evaluation.opened import measuring, open_session, pass_kept, read_header, score_split
from eectl.exits.policy import Policies, write_policies
from eectl.exits.thresholds import SEARCHES, check_has_exits, choose_thresholds, notes_on_rows, threshold_metric
from eectl.exits.times import BENCH, parse_cost, read_times
from eectl.recipe.budgets import DEFAULT_BUDGETS, parse_budgets


def calibrate(
    checkpoint: str | Path,
    *,
    budgets: str | float | Iterable[float] = DEFAULT_BUDGETS,
    criterion: str | None = None,
    thresholds: str = "shared",
    metric: str | None = None,
    cost: str = "macs",
    bench: str | Path | None = None,
    out: str | Path | None = None,
    predictions: str | Path | None = None,
    save_predictions: str | Path | None = None,
    device: str = "auto",
    precision: str | None = None,
    data_root: str | Path | None = None,
    batch_size: int | None = None,
    overwrite: bool = False,
    say: Callable[[str], None] = silent,
) -> Policies | None:
    """Choose exit thresholds for cost budgets on the calibration split and write the policy file.

    Args:
        checkpoint: The network.
        budgets: % of the plain backbone's cost, as `25,50` or numbers.
        criterion: When a row leaves; default: max-softmax, for regression difference.
        thresholds: `shared`, one for all exits, or `per-exit`.
        metric: What is to be best: `score`, or `balanced` accuracy; default: what the recipe's `metric` says.
        cost: `macs`, or `latency` for the times that `bench` measured; `latency:32` picks those at batch size 32.
        bench: The file with those times; default: bench.json beside the checkpoint.
        out: The policy file; default: policy.json beside the checkpoint.
        predictions: Predictions of the calibration split, in place of a pass over it.
        save_predictions: Where to keep what the pass gives.
        device: auto, cpu, cuda, cuda:N or mps.
        precision: auto, float32, tf32 or bf16; default: what the checkpoint was trained in.
        data_root: Where the data lies; default: where the recipe says.
        batch_size: Rows at once; default: the recipe's. It picks among times at several batch sizes too.
        overwrite: Replace outputs that exist.
        say: Takes each line that the command shows on stderr.

    Returns:
        The policies; None in all processes but the first.

    Raises:
        EectlError: budgets, criterion, costs or outputs will not do; before any data is loaded.
    """
    path = Path(checkpoint)
    out = path.with_name("policy.json") if out is None else Path(out)
    file, save_to, bench = as_path(predictions), as_path(save_predictions), as_path(bench)
    percentages, wanted = parse_budgets(budgets), parse_cost(cost)
    lookup(SEARCHES, thresholds, what="kind of thresholds")
    if bench and wanted.name == "macs":
        raise EectlError(f"--bench {bench} has times, and --cost {cost} counts MACs; add --cost latency, or leave it out")
    times = None if wanted.name == "macs" else bench or path.with_name(BENCH)
    check_outputs([out, save_to], inputs=[path, file, times], overwrite=overwrite)
    header = read_header(path)
    check_has_exits(header.num_exits)
    rule = header.criterion(criterion)
    best_by = threshold_metric(metric or header.metric, header.task)
    with measuring(device, precision or header.precision) as (world, used):
        costs, notes = None, list[str]()
        if times is not None:
            costs, notes = read_times(
                times,
                wanted,
                batch_size=batch_size,
                checkpoint=header.digest,
                num_exits=header.num_exits,
                precision=used,
                name=path,
            )
        session = open_session(path, world=world, precision=used, data_root=as_path(data_root), needs=("calibration",))
        found = score_split(
            session, "calibration", criterion=rule, file=file, save_to=save_to, overwrite=overwrite, batch_size=batch_size
        )
        notes += note_on_precision(f"{file} was made", found.made.precision, used)
        if not world.is_main:
            return None
        for note in (*session.notes, *notes, *notes_on_rows(found)):
            say(f"note: {note}")
        policies = choose_thresholds(found, costs or session.macs, budgets=percentages, search=thresholds, metric=best_by)
        with pass_kept(save_to):
            write_policies(out, policies, overwrite=overwrite)
        return policies
