"""`eectl attach-heads`: put fresh, untrained exits on the backbone of a checkpoint."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from eectl.core.errors import EectlError
from eectl.core.files import check_outputs
from eectl.core.numbers import number_list, whole_number
from eectl.core.seeds import check_seed
from eectl.models.checkpoint import About, load_checkpoint, save_checkpoint
from eectl.models.multi_exit import MultiExitModel
from eectl.recipe.reading import make_section
from eectl.recipe.recipe import ExitsSection
from eectl.training.network import Network, resolve_exits, with_exits


@dataclass(frozen=True)
class Attached:
    """A checkpoint with untrained exits: its file, what that says beside the weights, and how many blocks its backbone has."""

    path: Path
    about: About
    depth: int

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON-able data."""
        return {"kind": "attached-heads", "schema": 1, "path": str(self.path), "depth": self.depth, **self.about.to_json()}


def attach_heads(
    checkpoint: str | Path,
    *,
    out: str | Path,
    after: str | Sequence[int] | None = None,
    placement: str | None = None,
    head: str = "auto",
    seed: int | None = None,
    overwrite: bool = False,
) -> Attached:
    """Write a checkpoint's backbone with the exits asked for, in place of any it had: `eectl attach-heads`.

    Args:
        checkpoint: the checkpoint whose backbone is taken.
        out: the checkpoint to write.
        after: the blocks that an exit follows, as numbers or as text such as `"2,4,6"`. Give this or `placement`.
        placement: every-N, dense-sparse or sparse-dense (paper §4.6).
        head: the kind of head; auto: sdn on CNNs, linear on transformers.
        seed: draws the heads' weights; default: the checkpoint's recipe's.
        overwrite: replace `out` if it exists.

    Raises:
        EectlError: blocks out of range or repeated, an unknown placement or head, or an existing `out`.
    """
    path, target = Path(checkpoint), Path(out)
    exits = _read_exits(after, placement, head)
    seed = None if seed is None else check_seed(seed)
    check_outputs([target], inputs=[path], overwrite=overwrite)
    loaded = load_checkpoint(path)
    about = loaded.about
    bare = Network(
        MultiExitModel(loaded.model.backbone),
        about.spec.model_copy(update={"after": (), "heads": (), "combine": None}),
        tuple(dict(entry) for entry in about.history),
        loaded.digest,
    )
    exits = resolve_exits(exits, bare)
    network = with_exits(bare, exits, seed=about.recipe["seed"] if seed is None else seed)
    recipe = dict(about.recipe) | {"exits": exits.model_dump(mode="json")} | ({} if seed is None else {"seed": seed})
    made = About(network.spec, recipe, about.data, about.splits, network.history, network.parent)
    save_checkpoint(target, network.model, made, overwrite=overwrite)
    return Attached(target, made, network.model.backbone.depth)


def _read_exits(after: str | Sequence[int] | None, placement: str | None, head: str) -> ExitsSection:
    if (after is None) == (placement is None):
        raise EectlError("give either --after (blocks, such as 2,4,6) or --placement (every-2, dense-sparse, sparse-dense)")
    if after is None:
        return make_section(ExitsSection, {"placement": placement, "head": head}, where="attach-heads")
    read = partial(whole_number, least=0)
    blocks = number_list(after, read, option="--after", what="block", allowed="block numbers from 0, such as 2,4,6")
    return make_section(ExitsSection, {"after": blocks, "head": head}, where="attach-heads")
