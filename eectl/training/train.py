"""`eectl train`: a recipe's phases, one after the other, into a run folder. The loop inside a phase is `loop`'s."""

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from eectl.core.distributed import join, leave, main_first
from eectl.core.errors import EectlError
from eectl.core.progress import Display
from eectl.data import Augmenter, Dataset, load_data
from eectl.models.build import build_model
from eectl.models.checkpoint import About, read_about, save_checkpoint
from eectl.models.losses import TASKS
from eectl.recipe.recipe import ModelSpec, Recipe
from eectl.recipe.regimes import phase_numbered
from eectl.training.gradient_dominance import check_track
from eectl.training.l2w import check_run
from eectl.training.loop import run_phase
from eectl.training.network import Network, first_network, planned_phases, resolve, with_combine, with_exits, without_combine
from eectl.training.phase import Job, Place
from eectl.training.run_folder import RunFolder, State, under_prefix, with_prefix


@dataclass(frozen=True)
class Trained:
    """What a run left: `path` is its model.safetensors."""

    path: Path
    about: About


def train(
    recipe: Recipe,
    *,
    out: Path,
    device: str = "auto",
    resume: bool = False,
    overwrite: bool = False,
    download: bool = False,
    quiet: bool = False,
    track: str | None = None,
    track_every: int | None = None,
) -> Trained | None:
    """Run a recipe's regime, or its one `phase`, into the folder `out`; returns None in all processes but the first.

    `track` names what is measured on the way into metrics.jsonl (gradient-dominance), on every `track_every`-th batch; none: as
    often as a tenth of the time allows. It changes no weight, so it is no part of the recipe.
    Raises EectlError for what the user can mend, Interrupted after SIGINT or SIGTERM, with the state saved.
    """
    if track is not None:
        check_track(track, compiled=recipe.compile)
    elif track_every is not None:
        raise EectlError(f"--track-every {track_every}: nothing is tracked; add --track gradient-dominance")
    world = join(device)
    folder = RunFolder(out)
    display = Display(quiet=quiet or not world.is_main)
    try:
        if world.is_main and folder.holds_a_run() and not (resume or overwrite):
            raise EectlError(
                f"{out} holds a run; --resume to go on with it, --overwrite to replace it, or another folder with -o"
            )
        if download:
            main_first(world, lambda: load_data(recipe.data, device=torch.device("cpu"), download=True))
        data = load_data(recipe.data, device=world.device)
        network = first_network(recipe, data.info)
        asked, recipe = recipe, resolve(recipe, network)
        for note in (*data.notes, *_check(asked, recipe, network)):
            display.say(note)
        if recipe.loss_weights == "l2w":
            sizes = [recipe.batch_size, *(change.batch_size or recipe.batch_size for change in recipe.phases.values())]
            check_run(data.info.task, processes=world.size, batch_sizes=sizes)
        with folder.locked() if world.is_main else nullcontext():
            main_first(world, lambda: _prepare(folder, recipe, data, resume=resume))
            if resume and folder.finished():
                display.say(f"{folder.model} is there: this run has come to its end")
                return _trained(folder) if world.is_main else None
            augmenter = Augmenter(data.info, data.augment, len(data.info.classes))
            job = Job(recipe, world, folder, data, augmenter, display, TASKS[data.info.task])
            job.track, job.track_every = track is not None, track_every
            with _signals(job.caught):
                _run(job, network, folder.load_state())
            return _trained(folder) if world.is_main else None
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise EectlError(
            f"batch_size {recipe.batch_size} leaves a process one image, of which BatchNorm takes no statistics; raise batch_size"
        ) from error
    except torch.OutOfMemoryError as error:
        raise EectlError(
            f"out of memory on {world.device}; try --set batch_size={max(recipe.batch_size // 2, 1)} (it is {recipe.batch_size}, "
            f"over all processes), --set eval_batch_size={max(recipe.eval_batch_size // 2, 1)}, or --set precision=bf16"
        ) from error
    finally:
        display.close()
        leave()


def _trained(folder: RunFolder) -> Trained:
    return Trained(folder.model, read_about(folder.model))


def _check(asked: Recipe, recipe: Recipe, network: Network) -> list[str]:
    """Refuse what would fail later, before anything is written; returns what the user should know of a resolved recipe."""
    phases = planned_phases(recipe)
    fresh = network.model.backbone.fresh
    notes = [f"not in the weights that were loaded, so fresh: {', '.join(fresh)}"] if fresh else []
    if network.model.after:
        if asked.exits.after not in (None, network.model.after):
            notes.append(f"the exits are those of {recipe.init}, after blocks {_list(network.model.after)}, not the recipe's")
    else:
        with_exits(network, recipe.exits, seed=recipe.seed)
    if network.model.combine is not None and not phases[0].combine:
        notes.append(f"the ensembles of {recipe.init} are left out: phase {phases[0].number} trains what they stand on")
    if recipe.init is not None and (asked.backbone.name, asked.backbone.args) != (recipe.backbone.name, recipe.backbone.args):
        notes.append(f"the backbone is that of {recipe.init}, {recipe.backbone.name}, not the recipe's {asked.backbone.name}")
    if network.model.backbone.depth - 1 in (recipe.exits.after or ()):
        notes.append(f"the exit after the last block, {network.model.backbone.depth - 1}, saves nothing")
    if recipe.start == "random" and set(range(1, max(phases[0].scored, default=0) + 1)) - phases[0].segments:
        notes.append(
            f"phase {phases[0].number} trains on a backbone that is frozen at random weights; start from a checkpoint, --from"
        )
    return notes


def _list(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def _prepare(folder: RunFolder, recipe: Recipe, data: Dataset, *, resume: bool) -> None:
    """Make the folder ready: the same run goes on; another is set aside until the new one has come to its end."""
    if resume and (folder.recipe.exists() or folder.results()):
        folder.check_recipe(recipe)
        state = folder.load_state()
        recorded = read_about(folder.model).splits if folder.finished() else state and state.values["splits"]
        if recorded and recorded != _splits(data):
            noun = data.splits["train"].noun
            raise EectlError(
                f"{folder.path}: --resume with other data: {noun} were added, taken away or changed; give another -o"
            )
        folder.rewind()
    else:
        if recipe.init is not None and recipe.init.resolve() in [path.resolve() for path in folder.results()]:
            raise EectlError(f"--from {recipe.init} lies in the folder whose run would be replaced; give another -o")
        folder.set_aside()
        folder.write_recipe(recipe)


def _splits(data: Dataset) -> dict[str, dict[str, Any]]:
    """Size and fingerprint of each split."""
    return {name: {"size": len(split), "fingerprint": split.fingerprint} for name, split in data.splits.items()}


def _run(job: Job, network: Network, state: State | None) -> None:
    """The phases from where the state stands, or from the first."""
    recipe, folder = job.recipe, job.folder
    phases = planned_phases(recipe)
    start = str(recipe.init) if recipe.init else "none, since this phase starts from fresh weights"
    done, resumed = 0, None
    if state is not None:
        done = state.values["done"]
        network = _network_from(state)
        resumed = None if state.values["fresh"] else state
        start = str(folder.phase(phases[done - 1].number)) if done else start
        job.display.say(f"{folder.path}: going on with phase {phases[min(done, len(phases) - 1)].number}")
    for position, phase in enumerate(phases[done:], done):
        if phase.needs_heads(len(recipe.exits.after or ()) + 1) and not network.model.after:
            network = with_exits(network, recipe.exits, seed=recipe.seed)
            job.display.say(f"attaching {recipe.exits.head} exits after blocks {_list(network.model.after)}")
        if not network.model.after:
            phase = phase_numbered(recipe.regime, 1, phase.number)
        network = with_combine(network, seed=recipe.seed) if phase.combine else without_combine(network)
        where = Place(_values(job, network, position, fresh=False), start, partial(_keep, job, network))
        entry = run_phase(job, network.model, phase, place=where, resumed=resumed)
        network, resumed = replace(network, history=(*network.history, entry)), None
        path = folder.phase(phase.number)
        if job.world.is_main:
            digest = save_checkpoint(path, network.model, about(job, network))
            network = replace(network, parent=digest)
            fresh = State(with_prefix("model", network.model.state_dict()), _values(job, network, position + 1, fresh=True))
            folder.save_state(fresh)
        start = str(path)
    main_first(job.world, lambda: folder.finish(folder.phase(phases[-1].number)))


def _keep(job: Job, network: Network) -> Path:
    path = job.folder.path / "last-good.safetensors"
    save_checkpoint(path, network.model, about(job, network))
    return path


def _values(job: Job, network: Network, done: int, *, fresh: bool) -> dict[str, Any]:
    """What a resume state says of the run: `done` phases, whether the next has not begun, the network and the data."""
    about_network = {
        "spec": network.spec.model_dump(mode="json"),
        "history": list(network.history),
        "parent": network.parent,
    }
    return {"done": done, "fresh": fresh, "splits": _splits(job.data), **about_network}


def _network_from(state: State) -> Network:
    spec = ModelSpec.model_validate(state.values["spec"])
    model = build_model(spec)
    model.load_state_dict(under_prefix("model", state.tensors))
    return Network(model, spec, tuple(state.values["history"]), state.values["parent"])


def about(job: Job, network: Network) -> About:
    """What a checkpoint of this run says beside its weights."""
    recipe, info = job.recipe.model_dump(mode="json"), asdict(job.data.info)
    return About(network.spec, recipe, info, _splits(job.data), network.history, network.parent)


@contextmanager
def _signals(caught: list[int]) -> Iterator[None]:
    """SIGINT and SIGTERM are noted for the loop to see; a second SIGINT stops at once."""

    def note(number: int, _frame: FrameType | None) -> None:
        if caught and number == signal.SIGINT:
            raise KeyboardInterrupt
        caught.append(number)

    heard = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, note) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
