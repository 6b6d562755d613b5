"""Which process this is, on which device, and the few collectives that eectl needs; all of them no-ops when alone.

Launching is torchrun's job: its environment (RANK, WORLD_SIZE, LOCAL_RANK) is read here, gloo serves CPUs and nccl GPUs. A
process that is gone stops the others here, each with one line; starting again is torchrun's job too, or the user's.
"""

import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from eectl.core.errors import EectlError

DEATH_SECONDS = 2.0  # a process that is being killed closes its connections some time before it is gone

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among all: `rank` of `size`, its device, and where each process runs: its host and its number there."""

    rank: int
    size: int
    device: torch.device
    places: tuple[tuple[str, int], ...] = ()

    @property
    def is_main(self) -> bool:
        """Return whether this is the process that writes and prints."""
        return self.rank == 0


def pick_device(name: str, *, local_rank: int = 0) -> torch.device:
    """Return the device of a name: `auto` (a GPU where there is one), `cpu`, `cuda`, `cuda:1` or `mps`.

    Raises:
        EectlError: a device that is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise EectlError(f"--device {name}: no such device; allowed: auto, cpu, cuda, cuda:N, mps") from error
    if device.type == "cuda":
        index = local_rank if device.index is None else device.index
        if index >= torch.cuda.device_count():
            raise EectlError(f"--device {name}: {torch.cuda.device_count()} GPUs are visible to torch; try --device cpu")
        return torch.device("cuda", index)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise EectlError("--device mps: not available here; try --device cpu")
    if device.type not in ("cpu", "mps"):
        raise EectlError(f"--device {name}: allowed: auto, cpu, cuda, cuda:N, mps")
    return device


@contextmanager
def joined(device: str, *, hint: str) -> Iterator[World]:
    """Join torchrun's process group where there is one, and leave it at the end; yields this process's place in it.

    Args:
        device: a name as `pick_device` takes it.
        hint: what can be done once another process is gone, for the message.

    Raises:
        EectlError: the device is not there, the processes do not find each other, or one of them is gone.
    """
    world = join(device)
    try:
        yield world
    except LostError as error:
        raise EectlError(f"{_who_is_gone(world) or f'another process does not answer ({error})'}; {hint}") from error
    finally:
        leave()


def join(device: str) -> World:
    """Join torchrun's process group where there is one; returns this process's place in it."""
    size, rank, local_rank = (_number(*each) for each in (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0)))
    chosen = pick_device(device, local_rank=local_rank)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if size == 1:
        return World(rank, size, chosen)
    backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
    try:
        # torchrun --max-restarts keeps its store: a new attempt must not find the addresses of processes that are gone
        store, rank, size = next(iter(rendezvous("env://")))
        attempt = PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        dist.init_process_group(backend, store=attempt, rank=rank, world_size=size)
        attempt.set(f"place-{rank}", f"{socket.gethostname()} {os.getpid()}")
        places = [attempt.get(f"place-{each}").decode().split() for each in range(size)]
    except (RuntimeError, ValueError) as error:  # torch's DistError is a RuntimeError, a missing variable a ValueError
        raise EectlError(
            f"the {size} processes do not find each other ({_first_line(error)}); start them with torchrun"
        ) from error
    return World(rank, size, chosen, tuple((host, int(number)) for host, number in places))


def _number(variable: str, default: int) -> int:
    text = os.environ.get(variable, str(default))
    if not text.isdecimal():
        raise EectlError(f"{variable} is '{text}' in the environment, not a number; torchrun sets it, else leave it out")
    return int(text)


def leave() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


class LostError(Exception):
    """A collective did not come to its end: another process is gone, or does not answer. `joined` says so to the user."""


@contextmanager
def _talking() -> Iterator[None]:
    """Turn what gloo and nccl raise in a collective, which have no type in common, into a LostError."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise LostError(_first_line(error)) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _who_is_gone(world: World) -> str | None:
    """Return which processes of this machine are gone, in words, or None; of other machines nothing is known."""
    until = time.monotonic() + DEATH_SECONDS
    while True:
        here = [(rank, number) for rank, (host, number) in enumerate(world.places) if host == socket.gethostname()]
        gone = [str(rank) for rank, number in here if not _runs(number)]
        if gone or time.monotonic() > until:
            break
        time.sleep(0.02)
    if not gone:
        return None
    if len(gone) == 1:
        return f"process {gone[0]} of {world.size} is gone (killed, or stopped with a line of its own)"
    return f"processes {', '.join(gone)} of {world.size} are gone (killed, or stopped with a line of their own)"


def _runs(number: int) -> bool:
    """Return whether a process of this machine runs; one that has ended and that nobody has asked for does not."""
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    try:
        state = Path(f"/proc/{number}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except OSError:
        return not Path("/proc/self").exists()  # no /proc on this system, or the process has just gone
    return state not in "ZX"


def total(tensor: Tensor, *, op: str = "sum") -> Tensor:
    """Return the elementwise sum (or `max`, `min`) of every process's tensor, on every process."""
    tensor = tensor.clone()
    if dist.is_initialized():
        with _talking():
            dist.all_reduce(tensor, {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}[op])
    return tensor


def average(tensors: Sequence[Tensor]) -> None:
    """Set each tensor to its mean over all processes, in place: one message for all tensors of one type.

    Every process must give as many of the same shapes.
    """
    if not dist.is_initialized():
        return
    for dtype in dict.fromkeys(each.dtype for each in tensors):
        alike = [each for each in tensors if each.dtype == dtype]
        flat = torch.cat([each.reshape(-1) for each in alike]).div_(dist.get_world_size())
        with _talking():
            dist.all_reduce(flat)
        parts = torch.split(flat, [each.numel() for each in alike])
        torch._foreach_copy_(alike, [part.view_as(each) for part, each in zip(parts, alike, strict=True)])


def gather_rows(rows: Tensor, *, num_rows: int) -> Tensor:
    """Return the rows [row, …] of all processes in their first order; process r holds rows r, r + size, r + 2·size, … ."""
    if not dist.is_initialized():
        return rows
    size = dist.get_world_size()
    most = -(-num_rows // size)
    padded = rows.new_zeros(most, *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in range(size)]
    with _talking():
        dist.all_gather(parts, padded)
    return torch.stack(parts, dim=1).flatten(0, 1)[:num_rows]


def path_of_main(path: Path | None = None) -> Path:
    """Return process 0's `path`, on every process."""
    if not dist.is_initialized():
        assert path is not None
        return path
    letters = torch.tensor(list(os.fsencode(path or "")), dtype=torch.uint8)
    size = torch.tensor(len(letters))
    with _talking():
        dist.broadcast(size, 0)
        letters = letters if path else letters.new_empty(int(size))
        dist.broadcast(letters, 0)
    return Path(os.fsdecode(bytes(letters.tolist())))


def share_buffers(model: nn.Module) -> None:
    """Give every process the buffers of process 0: BatchNorm statistics differ between processes after a training step."""
    _share(model.buffers())


def share_parameters(model: nn.Module) -> None:
    """Give every process the parameters of process 0."""
    _share(parameter.detach() for parameter in model.parameters())


def _share(tensors: Iterable[Tensor]) -> None:
    if dist.is_initialized():
        with _talking():
            for tensor in tensors:
                dist.broadcast(tensor, 0)


def main_first(world: World, act: Callable[[], T]) -> T | None:
    """Let process 0 act while the others wait, and return what it got, there alone.

    Where it fails, the others raise EectlError: they have nothing to wait for.
    """
    found, fault = None, None
    if world.is_main:
        try:
            found = act()
        except BaseException as error:  # of whatever kind: it is raised again below, once the others know
            fault = error
    try:
        failed = int(total(torch.tensor(int(fault is not None)), op="max"))
    except LostError:
        if fault is None:
            raise
    if fault is not None:
        raise fault
    if failed:
        raise EectlError("stopped, as process 0 did with a line of its own")
    return found
