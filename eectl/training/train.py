"""`eectl train`: find the recipe, the data and the network, check them, and train into a run folder by `run_phases`."""

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from eectl.core.console import silent
from eectl.core.distributed import World, joined, main_first
from eectl.core.errors import EectlError
from eectl.core.progress import Display
from eectl.data import Dataset, class_counts, load_data, note_on_classes
from eectl.models.checkpoint import About, read_about
from eectl.recipe.preprocessing import with_preprocessing
from eectl.recipe.recipe import Recipe
from eectl.training.conditions import explained, set_up
from eectl.training.experiment_logs import choose_trackers, experiment_logs
from eectl.training.find_recipe import find_recipe
from eectl.training.gradient_dominance import check_track
from eectl.training.l2w import check_run
from eectl.training.loop import Tracking
from eectl.training.network import (
    Network,
    check_frozen,
    first_network,
    planned_phases,
    resolve,
    with_exits,
)
from eectl.training.prepare import prepare_folder, with_way_out
from eectl.training.run_folder import RunFolder
from eectl.training.run_phases import TrainingRun, run_phases


@dataclass(frozen=True)
class Trained:
    """A finished run: `path` is its model.safetensors, `about` what that file says beside its weights."""

    path: Path
    about: About

    def to_json(self) -> dict[str, Any]:
        """Return the run as JSON-able data."""
        return {"kind": "training", "schema": 1, "path": str(self.path), **self.about.to_json()}


def train(
    recipe: Recipe | str | Path | None = None,
    *,
    regime: str | None = None,
    phase: int | None = None,
    start: str | Path | None = None,
    out: str | Path | None = None,
    changes: Sequence[str] = (),
    seed: int | None = None,
    epochs: int | None = None,
    pretrained: bool = False,
    data: str | Path | None = None,
    text: str | Sequence[str] | None = None,
    target: str | Sequence[str] | None = None,
    task: str | None = None,
    backbone: str | None = None,
    weights: str | Path | None = None,
    device: str = "auto",
    precision: str | None = None,
    deterministic: bool | None = None,
    data_root: str | Path | None = None,
    download: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    track: str | None = None,
    track_every: int | None = None,
    track_to: str | Sequence[str] | None = None,
    quiet: bool = True,
    say: Callable[[str], None] = silent,
) -> Trained | None:
    """Train a regime, or one phase of it, into a run folder: `eectl train`.

    Args:
        recipe: a recipe, the name of a shipped one, or a path; default: that of `start`, else `digits`.
        regime: disjoint, joint, mixed, branch-wise, separate, alternating or mixed-gradual; default: the recipe's.
        phase: run this phase alone: 1 backbone, 2 everything, 3 heads; staged regimes count their stages.
        start: a checkpoint to start from: a file, or one on the hub, as hf://OWNER/NAME[/FILE][@REVISION].
        out: the run's folder; default: runs/RECIPE-REGIME[-phase-N]-seed-S.
        changes: changes of the recipe, such as `"optimizer.lr=1e-4"`.
        seed: seed of weights, order and augmentation; default: the recipe's.
        epochs: at most this many per phase; default: the recipe's.
        pretrained: start from the weights that torchvision, timm or the Hugging Face hub publish.
        data: data of your own: a folder of images by class, or a file of texts.
        text: the column with the text, or the two columns of pairs.
        target: the column to predict, or several, of texts and of images that metadata.csv lists.
        task: classification, regression, multilabel or ordinal.
        backbone: the network, such as `timm/resnet18` or `hf/./FOLDER`.
        weights: start from the network's weights in this .safetensors file.
        device: auto, cpu, cuda, cuda:N or mps.
        precision: auto, float32, tf32 or bf16; default: the recipe's.
        deterministic: the same bits from the same seed on a GPU too; default: the recipe's.
        data_root: where the data lies; default: where the recipe says.
        download: fetch the data set if it is missing.
        resume: go on where the run in `out` stopped, or start it.
        overwrite: replace a run that `out` holds.
        track: `gradient-dominance` measures it on the way, into metrics.jsonl. It changes no weight.
        track_every: on every N-th batch; default: as often as a tenth of the time allows.
        track_to: experiment trackers that get the numbers of metrics.jsonl: tensorboard, wandb, mlflow, trackio, or none;
            default: tensorboard where it is installed.
        quiet: show no progress on stderr.
        say: is called with each line of that progress, in the first process, whether quiet or not.

    Returns:
        The finished run; None in every process but the first.

    Raises:
        EectlError: what the user can mend.
        Interrupted: SIGINT or SIGTERM came; the state is saved.

    Example:
        >>> done = train("digits", regime="joint", epochs=2, out="runs/joint")  # doctest: +SKIP
        >>> done.path  # doctest: +SKIP
        PosixPath('runs/joint/model.safetensors')
    """
    given: dict[str, Any] = {"regime": regime, "phase": phase, "seed": seed, "epochs": epochs, "start": start}
    given |= {"data_root": data_root and Path(data_root), "pretrained": pretrained or None, "data": data, "text": text or None}
    given |= {"target": target or None, "task": task, "backbone": backbone, "weights": weights}
    given |= {"precision": precision, "deterministic": deterministic}
    found = find_recipe(recipe, changes=changes, given=given)
    if track is not None:
        check_track(track, compiled=found.recipe.compile is True)
    elif track_every is not None:
        raise EectlError(f"--track-every {track_every}: nothing is tracked; add --track gradient-dominance")
    trackers = choose_trackers([track_to] if isinstance(track_to, str) else track_to)
    hint = "the state that was saved last is whole: the same command with --resume goes on from there"
    with joined(device, hint=hint) as world:
        display = Display(quiet=quiet or not world.is_main, say=say if world.is_main else silent)
        for note in found.notes:
            display.say(note)
        try:
            with explained(found.recipe, world), set_up(found.recipe, world):
                return _train(
                    found.recipe,
                    RunFolder(Path(out) if out else found.folder),
                    world=world,
                    display=display,
                    download=download,
                    resume=resume,
                    overwrite=overwrite,
                    tracking=None if track is None else Tracking(track_every),
                    trackers=trackers if world.is_main else (),
                    are_asked_for=bool(track_to),
                )
        finally:
            display.close()


def _train(
    recipe: Recipe,
    folder: RunFolder,
    *,
    world: World,
    display: Display,
    download: bool,
    resume: bool,
    overwrite: bool,
    tracking: Tracking | None,
    trackers: Sequence[str],
    are_asked_for: bool,
) -> Trained | None:
    """Read the data, make the network, check both against the recipe, and run the phases that are left."""
    if world.is_main and folder.holds_a_run() and not (resume or overwrite):
        raise _holds_a_run(folder)
    asks_hub = recipe.backbone.pretrained
    if asks_hub:
        main_first(world, lambda: with_preprocessing(recipe, download=True))
    recipe, notes = with_preprocessing(recipe, download=asks_hub)
    for note in notes:
        display.say(note)
    if download:
        main_first(world, lambda: load_data(recipe.data, device=torch.device("cpu"), download=True))
    data = load_data(recipe.data, device=world.device)
    data.copies.check()
    network = first_network(recipe, data.info)
    asked, recipe = recipe, resolve(recipe, network)
    for note in (*data.notes, *_notes_on_rows(data), *_check(asked, recipe, network)):
        display.say(note)
    if recipe.loss_weights == "l2w":
        sizes = [recipe.batch_size, *(change.batch_size or recipe.batch_size for change in recipe.phases.values())]
        check_run(data.info.task, processes=world.size, batch_sizes=sizes)
    with with_way_out(folder, recipe), folder.locked() if world.is_main else nullcontext(False) as holds_a_run:
        if holds_a_run and not (resume or overwrite):  # it came while the data was read
            raise _holds_a_run(folder)
        for note in main_first(world, lambda: prepare_folder(folder, recipe, data, network, resume=resume)) or ():
            display.say(note)
        if resume and folder.finished():
            display.say(f"{folder.model} is there: this run has come to its end")
        else:
            with _signals() as signals:
                run = TrainingRun(recipe, folder, data, world, display, signals, tracking)
                state = folder.load_state()
                rows = None if state is None or not trackers else run.rows()
                with experiment_logs(
                    trackers, folder.path, recipe=recipe.plain(), rows=rows, are_asked_for=are_asked_for, say=display.say
                ) as logs:
                    run_phases(run, network, state, logs)
        return Trained(folder.model, read_about(folder.model)) if world.is_main else None


def _holds_a_run(folder: RunFolder) -> EectlError:
    return EectlError(
        f"{folder.path} holds a run; --resume to go on with it, --overwrite to replace it, or another folder with -o"
    )


def _check(asked: Recipe, recipe: Recipe, network: Network) -> list[str]:
    """Refuse what would fail later, before anything is written; returns what the user should know of a resolved recipe."""
    phases, frozen = planned_phases(recipe), check_frozen(recipe, network)
    fresh = network.model.backbone.fresh
    notes = [f"not in the weights that were loaded, so fresh: {', '.join(fresh)}"] if fresh else []
    if network.model.after:
        if asked.exits.after not in (None, network.model.after):
            blocks = ", ".join(map(str, network.model.after))
            notes.append(f"the exits are those of {recipe.init}, after blocks {blocks}, not the recipe's")
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
    return notes + frozen


def _notes_on_rows(data: Dataset) -> list[str]:
    """Return what the user should know of copies and of uneven classes."""
    train, classes = data.splits["train"], data.info.classes
    counts = class_counts({"train": train.labels.numpy()}, classes).get("train", ())
    uneven = note_on_classes(counts, classes, noun=train.noun) if data.info.task == "classification" else ()
    return [*data.copies.notes(), *uneven]


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Note SIGINT and SIGTERM in a list for the loop to see; a second SIGINT stops at once."""
    caught: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        if caught and number == signal.SIGINT:
            raise KeyboardInterrupt
        caught.append(number)

    heard = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, note) for number in heard}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
