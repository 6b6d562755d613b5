"""Making things on a GPU while it is busy with others: on a stream of their own, a group ahead of what is used.

Nothing is made by another thread, and on any other device nothing is made before it is asked for.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

Item = TypeVar("Item")


def ahead(groups: Iterable[Sequence[Item]], device: torch.device) -> Iterator[Item]:
    """Yield the items of each group in turn; on a GPU the next group is made once the first item of one has been used.

    By then the device has work that what makes the next group hides behind. What an item is made of must be ready before the
    first is asked for, and may not be changed afterwards. No group is empty. An item is a tensor, or a tuple of such items.
    """
    if device.type == "cuda":
        yield from _on_own_stream(groups, device)
    else:
        for group in groups:
            yield from group


def _on_own_stream(groups: Iterable[Sequence[Item]], device: torch.device) -> Iterator[Item]:
    """Make each group on a stream of its own, which the current one waits for before it sees the group."""
    own = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    own.wait_stream(torch.cuda.current_stream(device))
    making = iter(groups)

    def make() -> tuple[Sequence[Item], torch.cuda.Event] | None:
        with torch.cuda.stream(own):
            group = next(making, None)
            return None if group is None else (group, own.record_event())

    made = make()
    while made is not None:
        group, done = made
        torch.cuda.current_stream(device).wait_event(done)
        made = None
        for number, item in enumerate(group):
            for tensor in _tensors(item):
                tensor.record_stream(torch.cuda.current_stream(device))  # its memory is free again when both are done with it
            yield item
            if number == 0:
                made = make()


def _tensors(item: Any) -> Iterator[Tensor]:
    if isinstance(item, Tensor):
        yield item
    elif isinstance(item, tuple):
        for part in item:
            yield from _tensors(part)
