"""`eectl calibrate-thresholds`: one pass over the calibration split, then the best thresholds for each budget, to a file."""

from collections.abc import Callable
from pathlib import Path

from eectl.core.distributed import join, leave
from eectl.core.errors import EectlError, lookup
from eectl.core.files import check_outputs
from eectl.evaluation.opened import open_session, score_split
from eectl.exits.policy import Policies, parse_budgets, write_policies
from eectl.exits.thresholds import SEARCHES, calibrate, check_request
from eectl.exits.times import BENCH, CostTable, parse_cost, read_times


def calibrate_checkpoint(
    path: Path,
    *,
    budgets: str,
    criterion: str | None,
    search: str = "shared",
    cost: str = "macs",
    bench: Path | None = None,
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

    `search` names an entry of SEARCHES; `cost` is what the user wrote, and `bench` the file with the times that a cost of
    `latency` needs (none: bench.json beside the checkpoint).

    Raises EectlError, before the pass, for budgets, criterion, costs or outputs that will not do.
    """
    percentages, wanted = parse_budgets(budgets), parse_cost(cost)
    lookup(SEARCHES, search, what="kind of thresholds")
    if bench is not None and wanted.name == "macs":
        raise EectlError(f"--bench {bench} has times, and --cost {cost} counts MACs; add --cost latency, or leave it out")
    times = None if wanted.name == "macs" else bench or path.with_name(BENCH)
    check_outputs([out, save_to], inputs=[path, predictions, times], overwrite=overwrite)
    world = join(device)
    try:
        session = open_session(path, world=world, data_root=data_root, needs=("calibration",))
        network = session.checkpoint
        check_request(criterion, task=network.about.task, num_exits=network.model.num_exits)
        costs = CostTable(session.costs.exits, session.costs.plain)
        if times is not None:
            size, num_exits = wanted.batch_size, network.model.num_exits
            costs = read_times(times, batch_size=size, checkpoint=network.digest, num_exits=num_exits, name=path)
        found = score_split(session, "calibration", criterion=criterion, file=predictions, save_to=save_to, batch_size=batch_size)
        if not world.is_main:
            return None
        for note in (*session.notes, *costs.notes):
            say(f"note: {note}")
        policies = calibrate(
            found,
            exit_costs=costs.exits,
            plain_cost=costs.plain,
            budgets=percentages,
            search=search,
            cost=wanted.name,
            measured=costs.measured,
        )
        write_policies(out, policies)
        return policies
    finally:
        leave()
