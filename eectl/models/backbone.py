"""The contract of a network with the rest of eectl: Backbone, and the Hidden and Feature that it passes on. Builds no network.

A Backbone is a view: it holds the library's network whole, as `self.net`, and runs it in pieces (stem, blocks, head) whose
composition equals the library's own forward bitwise. Parameters keep the library's names.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Hidden:
    """A block's input or output: `x`, rows first, is a tensor, or a tuple of them where a network has several scales.

    `mask` [row, token] is True for real tokens, and None where inputs are not texts. Where blocks need more of a text than which
    tokens are real, it is the text itself: [row, token, 3] of ids, mask and types. `known` is what an adapter has found out about
    exactly these rows; where rows leave or come it is forgotten.
    """

    x: Tensor | tuple[Tensor, ...]
    mask: Tensor | None = None
    known: object = field(default=None, compare=False, repr=False)

    @property
    def scales(self) -> tuple[Tensor, ...]:
        """All tensors of `x`, one where there is one scale."""
        return (self.x,) if isinstance(self.x, Tensor) else self.x

    def take(self, rows: Tensor) -> "Hidden":
        """Return only these rows (an index tensor), in the given order; maps keep their memory layout."""
        return self._each(lambda x: _take(x, rows))

    def close_gaps(self, gaps: Tensor, order: Tensor) -> "Hidden":
        """Return what `take(order)` does by moving rows into gaps: cheap where few rows have left.

        `x` is overwritten, and the result shares its memory; the mask, which may be part of the inputs, is copied.

        Args:
            gaps: the places in the result whose row changes.
            order: the rows to keep; all places but the gaps keep the row that they have.
        """

        def change(x: Tensor) -> Tensor:
            rows = x.permute(0, 2, 3, 1) if is_channels_last(x) else x
            rows.index_copy_(0, gaps, rows.index_select(0, order.index_select(0, gaps)))
            return x[: len(order)]

        x = change(self.x) if isinstance(self.x, Tensor) else tuple(change(scale) for scale in self.x)
        return Hidden(x, None if self.mask is None else self.mask.index_select(0, order))

    def split(self, count: int) -> "tuple[Hidden, Hidden]":
        """Return the first `count` rows and the rest, as views."""
        return self._each(lambda x: x[:count]), self._each(lambda x: x[count:])

    @staticmethod
    def cat(parts: "Sequence[Hidden]") -> "Hidden":
        """Join the rows of all `parts`; texts are padded to the longest, with tokens that the mask hides."""
        assert len({part.mask is None for part in parts}) == 1 and len({isinstance(part.x, Tensor) for part in parts}) == 1
        if isinstance(parts[0].x, tuple):
            return Hidden(tuple(torch.cat(scales) for scales in zip(*(part.x for part in parts), strict=True)))
        xs = [part.x for part in parts if isinstance(part.x, Tensor)]
        masks = [part.mask for part in parts if part.mask is not None]
        return Hidden(_cat_padded(xs), _cat_padded(masks)) if masks else Hidden(torch.cat(xs))

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Hidden":
        x = change(self.x) if isinstance(self.x, Tensor) else tuple(change(scale) for scale in self.x)
        return Hidden(x, None if self.mask is None else change(self.mask))


def is_channels_last(x: Tensor) -> bool:
    """Return whether a map lies in memory channels last, and not so that both layouts are the same."""
    return x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def _take(x: Tensor, rows: Tensor) -> Tensor:
    """Select rows so that a channels_last map stays channels_last: convolutions are much slower on mixed layouts."""
    if is_channels_last(x):
        return x.permute(0, 2, 3, 1).index_select(0, rows).permute(0, 3, 1, 2)
    return x.index_select(0, rows)


def _cat_padded(parts: Sequence[Tensor]) -> Tensor:
    """Join [row, token, …] of all parts; shorter ones get tokens of 0 at the end."""
    longest = max(part.shape[1] for part in parts)
    if all(part.shape[1] == longest for part in parts):
        return torch.cat(list(parts))
    whole = parts[0].new_zeros(sum(map(len, parts)), longest, *parts[0].shape[2:])
    start = 0
    for part in parts:
        whole[start : start + len(part), : part.shape[1]] = part
        start += len(part)
    return whole


class Feature(ABC):
    """A block's output in the forms that exit heads read, whatever its layout in memory (NCHW, NLC, NHWC)."""

    is_map: ClassVar[bool] = False
    """Whether it is a convolutional map. Heads for maps and tokens alike (ZTW) pool a map over a grid, else read one token."""

    @abstractmethod
    def pooled(self) -> Tensor:
        """Return [row, channel]: the mean over all positions or all patch tokens."""

    @abstractmethod
    def map(self) -> Tensor:
        """Return [row, channel, height, width]; raises EectlError where there is no height and width (texts)."""

    def cls(self) -> Tensor:
        """Return [row, channel]: the class token where the network has one, else the mean."""
        return self.pooled()


@dataclass(frozen=True)
class MapFeature(Feature):
    """A convolutional map `x` [row, channel, height, width]."""

    is_map = True

    x: Tensor

    def pooled(self) -> Tensor:
        return self.x.mean(dim=(2, 3))

    def map(self) -> Tensor:
        return self.x


@dataclass(frozen=True)
class TokenFeature(Feature):
    """Tokens `x` [row, token, channel] of an image: `prefix` special ones first, then a grid of patches, row by row.

    `grid` is the (height, width) of the patches. With `has_cls` token 0 is the class token.
    """

    x: Tensor
    grid: tuple[int, int]
    prefix: int = 1
    has_cls: bool = True

    def pooled(self) -> Tensor:
        return self.x[:, self.prefix :].mean(dim=1)

    def map(self) -> Tensor:
        patches = self.x[:, self.prefix :].transpose(1, 2)
        return patches.reshape(patches.shape[0], patches.shape[1], *self.grid)

    def cls(self) -> Tensor:
        return self.x[:, 0] if self.has_cls else self.pooled()


class Backbone(nn.Module, ABC):
    """A library's network, run as stem → blocks → head.

    Block numbers are public: recipes and checkpoints store them, so an adapter never changes them. Every parameter and buffer of
    `net` belongs to exactly one part, the one that uses it. A subclass is the adapter for one layout of networks.

    Attributes:
        net: the library's network, whole, with the library's names.
        block_names: for each block the names, in `net`, of the modules and parameters that it owns.
        head_names: the names of those that the head owns; everything that is left belongs to the stem.
        classifiers: the layers that loaded weights may lack or have in another size: those whose size is the number of outputs,
            and in a text classifier the rest of its head.
        name: what a recipe calls the network.
        fresh: the parameters that loaded weights left freshly drawn.
        rebuilds_as: the recipe's (name, args) that build it on any machine; None where those of its own recipe do.
        default_head: the kind of head that `auto` stands for.
        prefers_channels_last: whether its convolutions are faster on channels_last maps.
        vocabulary: how many token ids there are; None for images.
    """

    default_head: ClassVar[str] = "linear"
    prefers_channels_last: ClassVar[bool] = False
    blocks_serve_later_exits: ClassVar[bool] = False
    """Whether a block also computes what only later blocks read (MSDNet's finer scales): its exit leaves those weights unused."""

    def __init__(
        self, net: nn.Module, *, block_names: Sequence[Sequence[str]], head_names: Sequence[str], classifiers: Sequence[str]
    ) -> None:
        super().__init__()
        self.net = net
        self.block_names = tuple(tuple(names) for names in block_names)
        self.head_names = tuple(head_names)
        self.classifiers = tuple(classifiers)
        self.name = type(net).__name__
        self.fresh: tuple[str, ...] = ()
        self.rebuilds_as: tuple[str, dict[str, Any]] | None = None
        self.vocabulary: int | None = None

    @property
    def depth(self) -> int:
        """The number of blocks."""
        return len(self.block_names)

    def lies_channels_last(self, wish: "bool | str") -> bool:
        """Return whether the network and its images lie in memory channels last.

        Args:
            wish: the recipe's `channels_last`: True, False, or `auto` for what this network is fastest with.
        """
        return self.prefers_channels_last if wish == "auto" else bool(wish)

    @abstractmethod
    def stem(self, inputs: Tensor) -> Hidden:
        """Run everything before block 0.

        Args:
            inputs: images [row, channel, height, width], normalised; or texts [row, 3, token] in int64, of which the three are
                token ids, the mask (1 = a real token) and token types.
        """

    @abstractmethod
    def block(self, index: int, hidden: Hidden) -> Hidden:
        """Run block `index`, from 0, on what the part before it returned."""

    @abstractmethod
    def head(self, hidden: Hidden) -> Tensor:
        """Run everything after the last block: logits [row, class], or [row, 1] in a regression."""

    @abstractmethod
    def feature(self, hidden: Hidden) -> Feature:
        """Return a block's output in the forms that exit heads read."""

    def example(self, input_shape: Sequence[int]) -> Tensor:
        """Return one row [1, *input_shape] that the network takes, of zeros: for dry runs and for counting costs."""
        parameter = next(self.parameters())
        return torch.zeros(1, *input_shape, device=parameter.device, dtype=parameter.dtype)

    def own_names(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return loaded weights under this network's names; they may come from the same encoder with another head."""
        return dict(weights)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the network's logits: stem → blocks → head, bit for bit what the library's own forward gives."""
        hidden = self.stem(inputs)
        for index in range(self.depth):
            hidden = self.block(index, hidden)
        return self.head(hidden)

    def hidden_states(self, inputs: Tensor) -> Iterator[Hidden]:
        """Yield what each block gives, one after the other."""
        hidden = self.stem(inputs)
        for index in range(self.depth):
            hidden = self.block(index, hidden)
            yield hidden

    def locate(self, name: str) -> int:
        """Return the part that owns a parameter, buffer or module of `net`: -1 the stem, i block i, `depth` the head."""

        def owned(names: Sequence[str]) -> bool:
            return any(name == own or name.startswith(own + ".") for own in names)

        if owned(self.head_names):
            return self.depth
        return next((i for i, names in enumerate(self.block_names) if owned(names)), -1)


class StagedBackbone(Backbone):
    """A ResNet: its blocks are the children of the Sequentials that are called `layer1`, `layer2`, …"""

    default_head = "sdn"
    prefers_channels_last = True

    def __init__(self, net: nn.Module, *, head_names: Sequence[str], classifiers: Sequence[str]) -> None:
        stages = [(name, len(stage)) for name, stage in net.named_children() if isinstance(stage, nn.Sequential)]
        places = [(name, i) for name, length in stages if name.startswith("layer") for i in range(length)]
        names = [(f"{stage}.{i}",) for stage, i in places]
        super().__init__(net, block_names=names, head_names=head_names, classifiers=classifiers)
        self._places = tuple(places)

    def block(self, index: int, hidden: Hidden) -> Hidden:
        stage, position = self._places[index]
        return Hidden(getattr(self.net, stage)[position](hidden.x))

    def feature(self, hidden: Hidden) -> Feature:
        assert isinstance(hidden.x, Tensor)
        return MapFeature(hidden.x)


def dry_run(backbone: Backbone, input_shape: Sequence[int]) -> list[Hidden]:
    """Return every block's output for one example row; heads learn from it how wide their features are.

    It runs in eval mode without a graph. Afterwards every module trains again if it did; BatchNorm's statistics do not move.
    """
    with in_eval_mode(backbone):
        return list(backbone.hidden_states(backbone.example(input_shape)))


@contextmanager
def in_eval_mode(net: nn.Module) -> Iterator[None]:
    """Run the block in eval mode without a graph; afterwards every module trains again if it did."""
    modes = {module: module.training for module in net.modules()}
    net.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training
