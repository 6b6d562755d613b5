"""`eectl evaluate`: one pass over the test split under a policy file, or under thresholds calibrated on the way."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from eectl.core.distributed import join, leave
from eectl.core.errors import EectlError, lookup
from eectl.core.files import check_outputs
from eectl.evaluation.curve import check_plot_path, plot_curve
from eectl.evaluation.opened import Session, open_session, score_split
from eectl.evaluation.results import Evaluation, write_evaluation
from eectl.evaluation.scoring import evaluate, evaluate_as_paper, every_point
from eectl.exits.policy import Policies, parse_budgets, policies_for
from eectl.exits.scores import Scored
from eectl.exits.sweep import check_paper
from eectl.exits.thresholds import calibrate, check_request

BUDGETS = "25,50,75,100"
PROTOCOLS = {"calibrated": "thresholds from the calibration split", "paper": "the authors' rule, on the test split itself"}


def evaluate_checkpoint(
    path: Path,
    *,
    budgets: str | None,
    policy: Path | None = None,
    criterion: str | None = None,
    protocol: str = "calibrated",
    out: Path | None = None,
    plot: Path | None = None,
    paper: bool = False,
    predictions: Path | None = None,
    save_to: Path | None = None,
    device: str = "auto",
    data_root: Path | None = None,
    batch_size: int | None = None,
    overwrite: bool = False,
    say: Callable[[str], None],
) -> Evaluation | None:
    """Score a checkpoint on the test split; None in all processes but the first. `say` takes what belongs on stderr.

    `out` is the evaluation's file, for `eectl report`; `paper` draws `plot` without a title.

    Raises EectlError, before the pass, for requests that contradict each other and outputs that exist.
    """
    lookup(PROTOCOLS, protocol, what="protocol")
    if policy is not None and (criterion is not None or protocol == "paper"):
        raise EectlError(f"--policy {policy} brings its own criterion and thresholds; leave out --criterion and --protocol paper")
    wanted = parse_budgets(BUDGETS if budgets is None else budgets)
    if plot is not None:
        check_plot_path(plot)
    check_outputs([out, plot, save_to], inputs=[path, policy, predictions], overwrite=overwrite)
    given = None if policy is None else policies_for(policy, None if budgets is None else wanted)
    world = join(device)
    try:
        session = open_session(path, world=world, data_root=data_root, needs=("test",))
        num_exits, task = session.checkpoint.model.num_exits, session.checkpoint.about.task
        if protocol == "paper":
            check_paper(task)
        criterion = criterion if given is None else given.criterion
        if num_exits > 1:
            check_request(criterion, task=task, num_exits=num_exits)
        if given is not None and policy is not None:
            given.check(session.checkpoint.digest, path=policy)
        found = score_split(session, "test", criterion=criterion, file=predictions, save_to=save_to, batch_size=batch_size)
        result = _score(session, found, given, wanted, protocol, batch_size)
        result = replace(result, origin=session.checkpoint.about.origin)
        if not world.is_main:
            return None
        for note in session.notes:
            say(f"note: {note}")
        if plot is not None:
            plot_curve(plot, result, every_point(found, exit_costs=[entry.cost for entry in result.exits]), paper=paper)
            say(f"{plot}: written")
        if out is not None:
            write_evaluation(out, result)
        return result
    finally:
        leave()


def _score(
    session: Session,
    found: Scored,
    given: Policies | None,
    budgets: tuple[float, ...],
    protocol: str,
    batch_size: int | None,
) -> Evaluation:
    exits, plain = session.costs.exits, session.costs.plain
    if protocol == "paper":
        return evaluate_as_paper(found, exit_costs=exits, plain_cost=plain, budgets=budgets)
    if given is None:
        chosen_on = score_split(session, "calibration", criterion=found.criterion, batch_size=batch_size)
        given = calibrate(chosen_on, exit_costs=exits, plain_cost=plain, budgets=budgets)
    if given.cost != "macs":  # measured, so only the policy knows it
        exits, plain = given.exit_costs, given.plain_cost
    return evaluate(found, given, exit_costs=exits, plain_cost=plain)
