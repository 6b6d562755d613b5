"""`eectl calibrate-thresholds`: one pass over the calibration split, then the best thresholds for each budget, to a file."""

from collections.abc import Callable
from pathlib import Path

from eectl.distributed import join, leave
from eectl.files import check_outputs
from eectl.results import Policies, parse_budgets, write_policies
from eectl.session import open_session, score_split
from eectl.thresholds import calibrate, check_request


def calibrate_checkpoint(
    path: Path,
    *,
    budgets: str,
    criterion: str | None,
    out: Path,
    predictions: Path | None = None,
    save_to: Path | None = None,
    device: str = "auto",
    data_root: Path | None = None,
    batch_size: int | None = None,
    overwrite: bool = False,
    say: Callable[[str], None],
) -> Policies | None:
    """Choose thresholds for `budgets` (as the user wrote them) and write the policy file; None in all processes but the first.

    Raises EectlError, before the pass, for budgets, criterion or outputs that will not do.
    """
    percentages = parse_budgets(budgets)
    check_outputs([out, save_to], inputs=[path, predictions], overwrite=overwrite)
    world = join(device)
    try:
        session = open_session(path, world=world, data_root=data_root, needs=("calibration",))
        check_request(criterion, task=session.checkpoint.about.task, num_exits=session.checkpoint.model.num_exits)
        found = score_split(session, "calibration", criterion=criterion, file=predictions, save_to=save_to, batch_size=batch_size)
        if not world.is_main:
            return None
        for note in session.notes:
            say(f"note: {note}")
        costs = session.costs
        policies = calibrate(found, exit_costs=costs.exits, plain_cost=costs.plain, budgets=percentages)
        write_policies(out, policies)
        return policies
    finally:
        leave()
