"""Run one pass over a sample of rows and hand every block's activations to readers. Keeps and computes nothing itself."""

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from eectl.core.errors import EectlError, lookup
from eectl.data import Batch
from eectl.models.backbone import Backbone, Hidden
from eectl.models.multi_exit import MultiExitModel


class Reader(Protocol):
    """Takes the activations of blocks, batch by batch; `view` is an entry of VIEWS."""

    view: str

    def take(self, block: int, activations: Tensor, targets: Tensor) -> None:
        """Take a batch's `activations` [row, feature] and `targets` [row], on the network's device; blocks see the same rows."""


@torch.inference_mode()
def probe(
    model: MultiExitModel,
    batches: Iterable[Batch],
    readers: Sequence[Reader],
    *,
    prepare: Callable[[Tensor], Tensor],
    blocks: Collection[int] | None = None,
    step: Callable[[], None] = lambda: None,
) -> None:
    """Run the backbone once over the batches and give each reader its view of every block's output (or that of `blocks`).

    `prepare` brings inputs to what the network takes. The network must be in eval mode. Raises EectlError for a view that a
    network does not have.
    """
    assert not any(module.training for module in model.modules())
    backbone = model.backbone
    wanted = range(backbone.depth) if blocks is None else blocks
    views = dict.fromkeys(reader.view for reader in readers)
    for batch in batches:
        hidden = backbone.stem(prepare(batch.inputs))
        for index in range(max(wanted) + 1):
            hidden = backbone.block(index, hidden)
            if index in wanted:
                seen = {view: VIEWS[view](backbone, hidden) for view in views}
                for reader in readers:
                    reader.take(index, seen[reader.view], batch.targets)
        step()


def resolve_view(view: str, *, is_text: bool, default: str) -> str:
    """Return the view that is meant: `auto` is `default`, on texts the class token. Raises EectlError for an unknown one.

    Texts differ in length, so they have no `flattened` view.
    """
    if view == "auto":
        return "class-token" if is_text else default
    lookup(VIEWS, view, what="--view")
    if is_text and view == "flattened":
        raise EectlError("--view flattened: texts differ in length; take class-token or pooled")
    return view


def _flattened(_backbone: Backbone, hidden: Hidden) -> Tensor:
    scales = (hidden.x,) if isinstance(hidden.x, Tensor) else hidden.x
    return torch.cat([scale.flatten(1) for scale in scales], dim=1)


def _pooled(backbone: Backbone, hidden: Hidden) -> Tensor:
    if isinstance(hidden.x, Tensor):
        return backbone.feature(hidden).pooled()
    return torch.cat([scale.mean(dim=(2, 3)) for scale in hidden.x], dim=1)


def _class_token(backbone: Backbone, hidden: Hidden) -> Tensor:
    feature = backbone.feature(hidden)
    if feature.is_map or not getattr(feature, "has_cls", True):
        raise EectlError(f"--view class-token: {backbone.name} has no class token; take pooled")
    return feature.cls()


VIEWS: dict[str, Callable[[Backbone, Hidden], Tensor]] = {
    "flattened": _flattened,  # every number of a block's output, all scales and tokens
    "pooled": _pooled,  # the mean over space or real tokens, of each scale
    "class-token": _class_token,
}
