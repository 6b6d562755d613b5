"""Which process this is, on which device, and the few collectives that eectl needs; all of them no-ops when alone.

Launching is torchrun's job: its environment (RANK, WORLD_SIZE, LOCAL_RANK) is read here, gloo serves CPUs and nccl GPUs.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from eectl.core.errors import EectlError


@dataclass(frozen=True)
class World:
    """This process among all: `rank` of `size`, and its device."""

    rank: int
    size: int
    device: torch.device

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


def join(device: str) -> World:
    """Join torchrun's process group where there is one; returns this process's place in it."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    chosen = pick_device(device, local_rank=int(os.environ.get("LOCAL_RANK", "0")))
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if size > 1:
        backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
        # torchrun --max-restarts keeps its store: a new attempt must not find the addresses of processes that are gone
        store, rank, size = next(iter(rendezvous("env://")))
        attempt = PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        dist.init_process_group(backend, store=attempt, rank=rank, world_size=size)
    return World(rank, size, chosen)


def leave() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def total(tensor: Tensor, *, op: str = "sum") -> Tensor:
    """Return the elementwise sum (or `max`, `min`) of every process's tensor, on every process."""
    tensor = tensor.clone()
    if dist.is_initialized():
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
    dist.all_gather(parts, padded)
    return torch.stack(parts, dim=1).flatten(0, 1)[:num_rows]


def path_of_main(path: Path | None = None) -> Path:
    """Return process 0's `path`, on every process."""
    if not dist.is_initialized():
        assert path is not None
        return path
    letters = torch.tensor(list(os.fsencode(path or "")), dtype=torch.uint8)
    size = torch.tensor(len(letters))
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
        for tensor in tensors:
            dist.broadcast(tensor, 0)


def main_first(world: World, act: Callable[[], object]) -> None:
    """Let process 0 act while the others wait."""
    if world.is_main:
        act()
    if dist.is_initialized():
        dist.barrier()
