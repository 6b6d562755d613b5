"""`eectl bench`: early exit against the plain backbone in wall-clock time on this device, on rows of the test split."""

import platform
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from eectl import __version__
from eectl.core.console import silent
from eectl.core.errors import EectlError, out_of_memory
from eectl.core.files import as_path, check_outputs
from eectl.core.json_files import write_json
from eectl.core.numbers import number_list, whole_number
from eectl.core.precision import autocast, note_on_precision
from eectl.core.seeds import check_seed
from eectl.core.stopwatch import device_name
from eectl.data.batches import longest_first
from eectl.evaluation.opened import Session, measuring, open_session, preparing, read_header, score_split
from eectl.evaluation.timing import measure_speed
from eectl.exits.fastest import choose_layout, lay_inputs
from eectl.exits.policy import Policies, policies_for
from eectl.exits.thresholds import check_has_exits, choose_thresholds, notes_on_rows
from eectl.exits.times import Bench
from eectl.recipe.budgets import DEFAULT_BATCH_SIZES, DEFAULT_BUDGETS, MOST_SECONDS, parse_budgets

FEWEST_ROWS = 256
MOST_ROWS = 100_000  # a batch
FEW_BATCHES = 4  # that tell which memory layout is faster


def bench(
    checkpoint: str | Path,
    *,
    budgets: str | float | Iterable[float] | None = None,
    batch_size: str | int | Iterable[int] = DEFAULT_BATCH_SIZES,
    policy: str | Path | None = None,
    criterion: str | None = None,
    rows: int | None = None,
    seconds: float = 2.0,
    seed: int = 0,
    out: str | Path | None = None,
    device: str = "auto",
    precision: str | None = None,
    data_root: str | Path | None = None,
    overwrite: bool = False,
    say: Callable[[str], None] = silent,
) -> Bench:
    """Time a checkpoint's early exit against its plain backbone on this device.

    Args:
        checkpoint: The network.
        budgets: % of the plain backbone's cost, as `25,50` or numbers; default: the policy's, or 25,50,75,100.
        batch_size: Rows at once, one size or several, as `1,32` or numbers.
        policy: A policy file from `calibrate`; default: thresholds are chosen on the calibration split first.
        criterion: When a row leaves; default: max-softmax, for regression difference.
        rows: How many test rows to time; default: twice the largest batch, 256 at least.
        seconds: About how long the plain backbone runs at each batch size.
        seed: Which rows are drawn.
        out: Where to write the measurements, for `calibrate`.
        device: auto, cpu, cuda, cuda:N or mps.
        precision: auto, float32, tf32 or bf16; default: what the checkpoint was trained in.
        data_root: Where the data lies; default: where the recipe says.
        overwrite: Replace an output that exists.
        say: Takes each line that the command shows on stderr.

    Raises:
        EectlError: a request cannot be met; before anything is measured.
    """
    path, policy_file, out = Path(checkpoint), as_path(policy), as_path(out)
    if policy_file and criterion is not None:
        raise EectlError(f"--policy {policy_file} brings its own criterion and thresholds; leave out --criterion")
    wanted = parse_budgets(DEFAULT_BUDGETS if budgets is None else budgets)
    sizes = parse_batch_sizes(batch_size)
    seed = check_seed(seed)
    if not 0 < seconds <= MOST_SECONDS:
        raise EectlError(f"--seconds {seconds}: give a time over 0 and up to {MOST_SECONDS:,}, such as 2")
    check_outputs([out], inputs=[path, policy_file], overwrite=overwrite)
    given = policies_for(policy_file, None if budgets is None else wanted) if policy_file else None
    header = read_header(path)
    check_has_exits(header.num_exits)
    rule = header.criterion(criterion, given, path=policy_file)
    with measuring(device, precision or header.precision) as (world, used):
        if world.size > 1:
            raise EectlError(f"bench measures one device, and torchrun started {world.size} processes; start it without torchrun")
        session = open_session(path, world=world, precision=used, data_root=as_path(data_root), needs=("test",))
        chosen = _choose_rows(session, sizes, rows, seed)
        notes = list(session.notes)
        if given is None:
            found = score_split(session, "calibration", criterion=rule)
            notes += notes_on_rows(found)
            given = choose_thresholds(found, session.macs, budgets=wanted, metric=header.metric)
        notes += note_on_precision(f"{policy_file} was made", given.precision, used)
        for note in notes:
            say(f"note: {note}")
        result = _measure(session, given, sizes, chosen, seconds=seconds, seed=seed, say=say)
        if out:
            write_json(out, result.to_json(), overwrite=overwrite)
        return result


def parse_batch_sizes(sizes: str | int | Iterable[int]) -> tuple[int, ...]:
    """Return `1,32,256`, one number or several as rising numbers of rows; raises EectlError for anything else."""
    allowed = f"whole numbers from 1 to {MOST_ROWS:,}, such as {DEFAULT_BATCH_SIZES}"
    read = partial(whole_number, least=1, most=MOST_ROWS)
    return tuple(sorted(number_list(sizes, read, option="--batch-size", what="batch size", allowed=allowed)))


def _choose_rows(session: Session, sizes: Sequence[int], rows: int | None, seed: int) -> Tensor:
    """Return the test rows to time; texts by length, as they are predicted. Raises EectlError where they fill no batch."""
    split = session.data.splits["test"]
    number = min(len(split), max(FEWEST_ROWS, 2 * sizes[-1]) if rows is None else rows)
    if number < sizes[-1]:
        whose = f"the test split has {len(split)}" if number == len(split) else f"--rows gives {number}"
        raise EectlError(f"--batch-size {sizes[-1]}: a batch needs as many rows, and {whose}; give smaller sizes or more rows")
    chosen = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))[:number]
    return longest_first(chosen, split.lengths)


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
    by_budget = policies.reached()
    if not by_budget:
        least = min(session.costs.shares)
        raise EectlError(
            f"no budget is within reach: leaving at the first exit costs {least:.1%}; give a larger one in --budgets"
        )

    def note(line: str) -> None:
        say(f"note: {line}")

    measured = []
    for size in sizes:
        say(f"measuring at batch size {size}")
        try:
            batches = _on_device(session, rows, size)
            shares = session.costs.shares
            with autocast(session.precision, session.world.device):
                last = session.channels_last and choose_layout(model, batches[:FEW_BATCHES], seconds=seconds)
                if session.channels_last:
                    batches = [lay_inputs(batch, channels_last=last) for batch in batches]
                speed = measure_speed(model, batches, by_budget, cost_shares=shares, seconds=seconds, say=note)
            measured.append(replace(speed, channels_last=last))
        except torch.OutOfMemoryError as error:
            raise out_of_memory(session.world.device, "--batch-size ", size) from error
    return Bench(
        checkpoint=session.checkpoint.digest,
        device=device_name(session.world.device),
        threads=torch.get_num_threads(),
        channels_last=session.channels_last,
        task=about.task,
        criterion=policies.criterion.name,
        split="test",
        num_rows=len(rows),
        seed=seed,
        out_of_reach=tuple(entry.budget for entry in policies.budgets if entry.thresholds is None),
        versions={"eectl": __version__, "torch": torch.__version__, "python": platform.python_version()},
        measured=tuple(measured),
        precision=session.precision,
    )


def _on_device(session: Session, rows: Tensor, size: int) -> list[Tensor]:
    """Return full batches of `rows` as the network takes them; rows that fill no batch are left out."""
    pieces, prepare = torch.split(rows[: len(rows) // size * size], size), preparing(session)
    return [prepare(batch.inputs) for batch in session.data.splits["test"].batches(pieces)]
