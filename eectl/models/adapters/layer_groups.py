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
    """Return the group of each parameter of a network that no library says them for.

    A group is a child of the network or, where that is a list, one of its children; lists of blocks in it are followed further.
    The network's own parameters belong to the first group, norms to the one before them, and the last child is the head.
    """
    *_, head = [name for name, child in net.named_children() if next(child.parameters(), None) is not None]
    places: list[tuple[str, ...]] = []
    groups: dict[str, int] = {}
    for name, _ in net.named_parameters():
        parts = name.split(".")
        place: tuple[str, ...] = (parts[0],)
        while parts[0] != head and len(place) < len(parts) - 1 and _is_followed(net.get_submodule(".".join(place)), place):
            place = (*place, parts[len(place)])
        if len(parts) == 1:
            groups[name] = 0
            continue
        if place not in places and not (places and parts[0] != head and _is_norm(net.get_submodule(".".join(place)))):
            places.append(place)
        groups[name] = places.index(place) if place in places else len(places) - 1
    return groups


def _is_followed(module: nn.Module, place: tuple[str, ...]) -> bool:
    """Return whether the children of a list are groups of their own."""
    return isinstance(module, LISTS) and (len(place) == 1 or len(list(_blocks(module, ""))) > 1)


def _is_norm(module: nn.Module) -> bool:
    return next(module.children(), None) is None and all(parameter.ndim < 2 for parameter in module.parameters())


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
