"""`eectl attach-heads`: a checkpoint with fresh, untrained exits on its backbone."""

from pathlib import Path

from eectl.core.errors import EectlError
from eectl.core.files import check_outputs
from eectl.models.checkpoint import About, load_checkpoint, save_checkpoint
from eectl.models.multi_exit import MultiExitModel
from eectl.recipe.recipe import ExitsSection
from eectl.training.network import Network, resolve_exits, with_exits


def attach_heads(
    path: Path,
    *,
    out: Path,
    after: str | None = None,
    placement: str | None = None,
    head: str = "auto",
    seed: int | None = None,
    overwrite: bool = False,
) -> Network:
    """Write `out`: the backbone of the checkpoint `path` with the exits asked for, in place of any it had.

    `after` is a list such as `2,4,6`, `seed` draws the heads' weights (none: the recipe's). Raises EectlError for blocks out of
    range or repeated, an unknown placement or head, or an existing `out`.
    """
    exits = _read_exits(after, placement, head)
    check_outputs([out], inputs=[path], overwrite=overwrite)
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
    save_checkpoint(out, network.model, About(network.spec, recipe, about.data, about.splits, network.history, network.parent))
    return network


def _read_exits(after: str | None, placement: str | None, head: str) -> ExitsSection:
    if (after is None) == (placement is None):
        raise EectlError("give either --after (blocks, such as 2,4,6) or --placement (every-2, dense-sparse, sparse-dense)")
    if after is None:
        return ExitsSection(placement=placement, head=head)
    parts = [part.strip() for part in after.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise EectlError(f"--after {after}: give block numbers from 0, such as 2,4,6")
    blocks = tuple(map(int, parts))
    if len(set(blocks)) != len(blocks):
        raise EectlError(f"--after {after}: a block stands twice; each takes one exit")
    return ExitsSection(after=blocks, head=head)
