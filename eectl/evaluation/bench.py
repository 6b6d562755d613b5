"""`eectl bench`: what early exit is worth in wall-clock time on this device, on rows of the test split."""

import platform
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from eectl import __version__
from eectl.core.distributed import join, leave
from eectl.core.errors import EectlError
from eectl.core.files import check_outputs, write_json
from eectl.core.stopwatch import device_name
from eectl.evaluation.opened import Session, lies_channels_last, open_session, preparing, score_split
from eectl.evaluation.timing import measure_speed
from eectl.exits.bench_file import Bench
from eectl.exits.policy import Policies, Policy, parse_budgets, policies_for
from eectl.exits.thresholds import calibrate, check_request

BUDGETS = "25,50,75,100"
FEWEST_ROWS = 256
MOST_ROWS = 100_000  # a batch


def bench_checkpoint(
    path: Path,
    *,
    budgets: str | None,
    batch_sizes: str,
    policy: Path | None = None,
    criterion: str | None = None,
    rows: int | None = None,
    seconds: float = 2.0,
    seed: int = 0,
    out: Path | None = None,
    device: str = "auto",
    data_root: Path | None = None,
    overwrite: bool = False,
    say: Callable[[str], None],
) -> Bench:
    """Measure a checkpoint's speed at budgets and batch sizes (as the user wrote them), under a policy file's thresholds or under
    some that are calibrated first; write it to `out`.

    `rows` are drawn from the test split by `seed`; `seconds` is about how long the plain backbone runs at each batch size.
    Raises EectlError, before anything is measured, for requests that cannot be met.
    """
    if policy is not None and criterion is not None:
        raise EectlError(f"--policy {policy} brings its own criterion and thresholds; leave out --criterion")
    wanted = parse_budgets(BUDGETS if budgets is None else budgets)
    sizes = parse_batch_sizes(batch_sizes)
    check_outputs([out], inputs=[path, policy], overwrite=overwrite)
    given = None if policy is None else policies_for(policy, None if budgets is None else wanted)
    world = join(device)
    try:
        if world.size > 1:
            raise EectlError(f"bench measures one device, and torchrun started {world.size} processes; start it without torchrun")
        session = open_session(path, world=world, data_root=data_root, needs=("test",))
        about = session.checkpoint.about
        check_request(
            criterion if given is None else given.criterion, task=about.task, num_exits=session.checkpoint.model.num_exits
        )
        if given is not None and policy is not None:
            given.check(session.checkpoint.digest, path=policy)
        chosen = _choose_rows(session, sizes, rows, seed)
        for note in session.notes:
            say(f"note: {note}")
        if given is None:
            found = score_split(session, "calibration", criterion=criterion)
            given = calibrate(found, exit_costs=session.costs.exits, plain_cost=session.costs.plain, budgets=wanted)
        result = _measure(session, given, sizes, chosen, seconds=seconds, seed=seed, say=say)
        if out is not None:
            write_json(out, result.to_json())
        return result
    finally:
        leave()


def parse_batch_sizes(text: str) -> tuple[int, ...]:
    """`1,32,256` as rising numbers of rows; raises EectlError for anything else."""
    sizes = []
    for part in (part.strip() for part in text.split(",")):
        size = int(part) if part.isascii() and part.isdecimal() else 0
        if not 0 < size <= MOST_ROWS:
            raise EectlError(f"--batch-size {text}: '{part}' is not a batch size; give whole numbers from 1, such as 1,32,256")
        if size in sizes:
            raise EectlError(f"--batch-size {text}: {size} stands twice; give each size once")
        sizes.append(size)
    return tuple(sorted(sizes))


def _choose_rows(session: Session, sizes: Sequence[int], rows: int | None, seed: int) -> Tensor:
    """The test rows to measure on; texts by length, as they are predicted. Raises EectlError where they fill no batch."""
    split = session.data.splits["test"]
    number = min(len(split), max(FEWEST_ROWS, 2 * sizes[-1]) if rows is None else rows)
    if number < sizes[-1]:
        whose = f"the test split has {len(split)}" if number == len(split) else f"--rows gives {number}"
        raise EectlError(f"--batch-size {sizes[-1]}: a batch needs as many rows, and {whose}; give smaller sizes or more rows")
    chosen = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))[:number]
    return chosen if split.lengths is None else chosen[split.lengths[chosen].argsort(descending=True, stable=True)]


def _measure(
    session: Session,
    policies: Policies,
    sizes: Sequence[int],
    rows: Tensor,
    *,
    seconds: float,
    seed: int,
    say: Callable[[str], None],
) -> Bench:
    model, about = session.checkpoint.model, session.checkpoint.about
    by_budget = {
        entry.budget: Policy(policies.criterion, entry.thresholds) for entry in policies.budgets if entry.thresholds is not None
    }
    if not by_budget:
        least = min(session.costs.shares)
        raise EectlError(
            f"no budget is within reach: leaving at the first exit costs {least:.1%}; give a larger one in --budgets"
        )
    measured = []
    for size in sizes:
        say(f"measuring at batch size {size}")
        try:
            batches = _on_device(session, rows, size)
            shares = session.costs.shares
            measured.append(measure_speed(model, batches, by_budget, cost_shares=shares, seconds=seconds))
        except torch.OutOfMemoryError as error:
            device = session.world.device
            raise EectlError(f"out of memory on {device} at batch size {size}; give smaller ones in --batch-size") from error
    return Bench(
        checkpoint=session.checkpoint.digest,
        device=device_name(session.world.device),
        threads=torch.get_num_threads(),
        channels_last=lies_channels_last(session.checkpoint),
        task=about.task,
        criterion=policies.criterion,
        split="test",
        num_rows=len(rows),
        seed=seed,
        out_of_reach=tuple(entry.budget for entry in policies.budgets if entry.thresholds is None),
        versions={"eectl": __version__, "torch": torch.__version__, "python": platform.python_version()},
        measured=tuple(measured),
    )


def _on_device(session: Session, rows: Tensor, size: int) -> list[Tensor]:
    """Full batches of `rows` as the network takes them; what fills no batch is left out."""
    pieces, prepare = torch.split(rows[: len(rows) // size * size], size), preparing(session)
    return [prepare(batch.inputs) for batch in session.data.splits["test"].batches(pieces)]
