"""The contract between a library's network and everything else: Hidden, Feature and Backbone. Builds no network itself.

A Backbone is a view: it holds the library's network whole, as `self.net`, and runs it in pieces (stem, blocks, head) whose
composition equals the library's own forward bitwise. Parameters keep the library's names.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Hidden:
    """What flows between blocks: a tensor, or a tuple of them (several scales), rows first; `mask` [row, token] for text."""

    x: Tensor | tuple[Tensor, ...]
    mask: Tensor | None = None

    def take(self, rows: Tensor) -> "Hidden":
        """Only these rows (an index tensor), in the given order."""
        return self._each(lambda x: _take(x, rows))

    def close_gaps(self, gaps: Tensor, order: Tensor) -> "Hidden":
        """As `take(order)`, whose order keeps all rows in their places but `gaps`, in place: cheap where these are few.

        `x` is overwritten, and what is given shares its memory; the mask, which may be part of the inputs, is not.
        """

        def change(x: Tensor) -> Tensor:
            rows = x.permute(0, 2, 3, 1) if _is_channels_last(x) else x
            rows.index_copy_(0, gaps, rows.index_select(0, order.index_select(0, gaps)))
            return x[: len(order)]

        x = change(self.x) if isinstance(self.x, Tensor) else tuple(change(scale) for scale in self.x)
        return replace(self, x=x, mask=None if self.mask is None else self.mask.index_select(0, order))

    def split(self, count: int) -> "tuple[Hidden, Hidden]":
        """The first `count` rows and the rest, as views."""
        return self._each(lambda x: x[:count]), self._each(lambda x: x[count:])

    @staticmethod
    def cat(parts: "Sequence[Hidden]") -> "Hidden":
        """The rows of all `parts`, one after the other; texts are padded to the longest, with tokens that the mask hides."""
        assert len({part.mask is None for part in parts}) == 1 and len({isinstance(part.x, Tensor) for part in parts}) == 1
        if isinstance(parts[0].x, tuple):
            return Hidden(tuple(torch.cat(scales) for scales in zip(*(part.x for part in parts), strict=True)))
        xs = [part.x for part in parts if isinstance(part.x, Tensor)]
        masks = [part.mask for part in parts if part.mask is not None]
        return Hidden(_cat_padded(xs), _cat_padded(masks)) if masks else Hidden(torch.cat(xs))

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Hidden":
        x = change(self.x) if isinstance(self.x, Tensor) else tuple(change(scale) for scale in self.x)
        return replace(self, x=x, mask=None if self.mask is None else change(self.mask))


def _is_channels_last(x: Tensor) -> bool:
    return x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def _take(x: Tensor, rows: Tensor) -> Tensor:
    """index_select that leaves a channels_last map channels_last: convolutions are much slower on mixed layouts."""
    if _is_channels_last(x):
        return x.permute(0, 2, 3, 1).index_select(0, rows).permute(0, 3, 1, 2)
    return x.index_select(0, rows)


def _cat_padded(parts: Sequence[Tensor]) -> Tensor:
    """[row, token, …] of all parts; shorter ones get tokens of 0 at the end."""
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
    """A block's output as an exit head sees it; no head knows NCHW, NLC or NHWC."""

    is_map: ClassVar[bool] = False
    """Whether it is a convolutional map, which a head that serves both pools over a grid instead of reading a token."""

    @abstractmethod
    def pooled(self) -> Tensor:
        """[row, channel]: the mean over space or tokens."""

    @abstractmethod
    def map(self) -> Tensor:
        """[row, channel, height, width]."""

    def cls(self) -> Tensor:
        """[row, channel]: the class token where the network has one, else the mean."""
        return self.pooled()


@dataclass(frozen=True)
class MapFeature(Feature):
    """A convolutional feature map, NCHW."""

    is_map = True

    x: Tensor

    def pooled(self) -> Tensor:
        return self.x.mean(dim=(2, 3))

    def map(self) -> Tensor:
        return self.x


@dataclass(frozen=True)
class TokenFeature(Feature):
    """Tokens [row, token, channel]: `prefix` special tokens first (the class token before the others), then a grid.

    `grid` is (height, width) of the patch tokens; `has_cls` says whether token 0 is a class token.
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
    """A library's network seen as stem → blocks → head.

    `depth` is the number of blocks; block numbers 0..depth-1 are public (recipes and checkpoints store them).
    `block_names[i]` and `head_names` are the names (relative to `net`) of the submodules and parameters that block i and the
    head own; everything else belongs to the stem. Every parameter and buffer of `net` is used by exactly the part that owns it.
    `classifiers` are what weights may leave out or have in another size: the layers whose size is the number of outputs, and
    with them the rest of a text classifier's head.
    `name` is what a recipe calls the network; `fresh` names the parameters that loaded weights left freshly initialised.
    `rebuilds_as` is the (name, args) of a recipe that builds it anywhere, where that is not the recipe's own.
    """

    default_head: ClassVar[str] = "linear"
    prefers_channels_last: ClassVar[bool] = False
    blocks_serve_later_exits: ClassVar[bool] = False
    """Whether a block computes what only later blocks read (MSDNet's finer scales), so an exit on it leaves weights unused."""

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
        """How many token ids it takes; None for images."""

    @property
    def depth(self) -> int:
        """How many blocks there are."""
        return len(self.block_names)

    def lies_channels_last(self, wish: "bool | str") -> bool:
        """Return whether the network and its images lie in memory channels last.

        Args:
            wish: the recipe's `channels_last`: True, False, or `auto` for what this network is fastest with.
        """
        return self.prefers_channels_last if wish == "auto" else bool(wish)

    @abstractmethod
    def stem(self, inputs: Tensor) -> Hidden:
        """Everything before block 0.

        `inputs` are images [row, channel, height, width], normalised, or text [row, 3, token] in int64: ids, mask (1 = a real
        token) and token types.
        """

    @abstractmethod
    def block(self, index: int, hidden: Hidden) -> Hidden:
        """Block `index` alone."""

    @abstractmethod
    def head(self, hidden: Hidden) -> Tensor:
        """The network's own classifier: logits [row, class]."""

    @abstractmethod
    def feature(self, hidden: Hidden) -> Feature:
        """A block's output as heads see it."""

    def example(self, input_shape: Sequence[int]) -> Tensor:
        """[1, *input_shape]: one row that the network takes, for dry runs and counting; zeros."""
        parameter = next(self.parameters())
        return torch.zeros(1, *input_shape, device=parameter.device, dtype=parameter.dtype)

    def own_names(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Loaded weights under this network's names; they may come from the same encoder with another head."""
        return dict(weights)

    def forward(self, inputs: Tensor) -> Tensor:
        """stem → blocks → head; equals the library's own forward bitwise."""
        hidden = self.stem(inputs)
        for index in range(self.depth):
            hidden = self.block(index, hidden)
        return self.head(hidden)

    def locate(self, name: str) -> int:
        """Which part owns a parameter, buffer or module of `net`: -1 the stem, i block i, `depth` the head."""

        def owned(names: Sequence[str]) -> bool:
            return any(name == own or name.startswith(own + ".") for own in names)

        if owned(self.head_names):
            return self.depth
        return next((i for i, names in enumerate(self.block_names) if owned(names)), -1)


class StagedBackbone(Backbone):
    """A CNN whose blocks are the children of its stages, the Sequentials `layer1`, `layer2`, … (every ResNet's naming)."""

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
    """Every block's output for the example row, in eval mode and without a graph: where heads learn their widths.

    Restores the training flags; BatchNorm statistics are not touched.
    """
    modes = {module: module.training for module in backbone.modules()}
    backbone.eval()
    try:
        with torch.no_grad():
            hidden = backbone.stem(backbone.example(input_shape))
            outputs = []
            for index in range(backbone.depth):
                hidden = backbone.block(index, hidden)
                outputs.append(hidden)
    finally:
        for module, training in modes.items():
            module.training = training
    return outputs
