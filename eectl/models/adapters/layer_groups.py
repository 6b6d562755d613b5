"""Number a network's layers by the group that they learn and are cut with. Runs no network."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

from torch import nn

LISTS = (nn.Sequential, nn.ModuleList)

T = TypeVar("T")


@dataclass(frozen=True, order=True)
class Unit:
    """The place of layers in a network: the number of their group and, where this is a stage, of their block in it.

    `block` is -1 for the layers of a stage beside its blocks.
    """

    group: int
    block: int = 0


def own_groups(net: nn.Module) -> dict[str, int]:
    """Return the group of each parameter of a network that no library says them for: its children, and those of its lists."""
    numbers: dict[tuple[str, ...], int] = {}
    groups = {}
    for name, _ in net.named_parameters():
        parts = name.split(".")
        place: tuple[str, ...] = (parts[0],)
        while len(place) < len(parts) and isinstance(net.get_submodule(".".join(place)), LISTS):
            place = (*place, parts[len(place)])
        groups[name] = numbers.setdefault(place, len(numbers))
    return groups


def split_stages(net: nn.Module, groups: Mapping[str, int], *, but: set[int]) -> dict[str, Unit]:
    """Return the unit of each parameter: a group that holds a list of blocks is a stage, and each of the blocks a unit.

    Args:
        net: the network.
        groups: the number of each parameter's group. The first is the stem and the last the head; neither is split.
        but: groups that are not split either.
    """
    units = {name: Unit(group) for name, group in groups.items()}
    below = groups_below(groups)
    whole = {min(groups.values()), max(groups.values())} | but
    blocks: dict[int, list[str]] = {}
    for name, module in net.named_modules():
        own, parent = below.get(name, set()), below.get(name.rpartition(".")[0], set())
        if len(own) == 1 and len(parent) > 1 and not own <= whole:
            blocks.setdefault(min(own), []).extend(_blocks(module, name))
    for group, found in blocks.items():
        if len(found) > 1:
            for name in groups:
                if groups[name] == group:
                    units[name] = Unit(group, next((i for i, block in enumerate(found) if name.startswith(f"{block}.")), -1))
    return units


def groups_below(groups: Mapping[str, T]) -> dict[str, set[T]]:
    """Return the groups of the parameters in each module, the network itself (named '') included."""
    below: dict[str, set[T]] = {}
    for name, group in groups.items():
        parts = name.split(".")
        for length in range(len(parts)):
            below.setdefault(".".join(parts[:length]), set()).add(group)
    return below


def _blocks(module: nn.Module, name: str) -> Iterator[str]:
    """Yield the names of the blocks that a stage holds in its lists: modules that are made of others."""
    if isinstance(module, LISTS):
        for child, part in module.named_children():
            if isinstance(part, LISTS):
                yield from _blocks(part, f"{name}.{child}")
            elif any(next(inner.parameters(), None) is not None for inner in part.children()):
                yield f"{name}.{child}"
    else:
        for child, part in module.named_children():
            if isinstance(part, LISTS):
                yield from _blocks(part, f"{name}.{child}")
