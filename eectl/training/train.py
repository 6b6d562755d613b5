"""`eectl train`: a recipe's phases, one after the other, into a run folder. The loop inside a phase is `loop`'s."""

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from eectl.core.console import silent
from eectl.core.distributed import World, joined, main_first
from eectl.core.errors import EectlError
from eectl.core.progress import Display
from eectl.data import Dataset, class_counts, load_data, note_on_classes
from eectl.models.checkpoint import About, read_about, save_checkpoint
from eectl.recipe.preprocessing import with_preprocessing
from eectl.recipe.recipe import SCORE_NAMES, Recipe
from eectl.training.conditions import explained, set_up
from eectl.training.experiment_logs import ExperimentLogs, choose_trackers, experiment_logs
from eectl.training.feed import training_data
from eectl.training.find_recipe import find_recipe
from eectl.training.gradient_dominance import check_track
from eectl.training.l2w import check_run
from eectl.training.loop import Journal, NotFiniteError, Tracking, run_phase
from eectl.training.network import (
    Network,
    check_frozen,
    first_network,
    network_for,
    planned_phases,
    resolve,
    with_exits,
)
from eectl.training.phase import phase_settings
from eectl.training.prepare import network_from, prepare_folder, split_facts, with_way_out
from eectl.training.results import write_results
from eectl.training.resume import SavedState, State, with_prefix
from eectl.training.run_folder import RunFolder
from eectl.training.running import make_execution


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
                rows = None if state is None or not trackers else _rows(run)
                with experiment_logs(
                    trackers, folder.path, recipe=recipe.plain(), rows=rows, are_asked_for=are_asked_for, say=display.say
                ) as logs:
                    _run_phases(run, network, state, logs)
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


@dataclass(frozen=True)
class TrainingRun:
    """Facts that all phases of a run share, fixed before the first: the resolved recipe, the data, and where and how it runs."""

    recipe: Recipe
    folder: RunFolder
    data: Dataset
    world: World
    display: Display
    signals: Sequence[int]
    tracking: Tracking | None

    def about(self, network: Network) -> About:
        """Return what a checkpoint of this run says beside its weights."""
        recipe, info = self.recipe.model_dump(mode="json"), asdict(self.data.info)
        return About(network.spec, recipe, info, split_facts(self.data), network.history, network.parent)

    def values(self, network: Network, done: int) -> dict[str, Any]:
        """Return what a resume state says of the run: how many phases are done, the network and the data."""
        return {
            "done": done,
            "splits": split_facts(self.data),
            "spec": network.spec.model_dump(mode="json"),
            "history": list(network.history),
            "parent": network.parent,
        }


def _rows(run: TrainingRun) -> list[dict[str, Any]]:
    """Return the rows of metrics.jsonl of a run that goes on, none where they are damaged."""
    try:
        return run.folder.rows()
    except EectlError as error:
        run.display.say(f"{error}; trackers go on without them")
        return []


def _run_phases(run: TrainingRun, network: Network, state: SavedState | None, logs: ExperimentLogs) -> None:
    """Run the phases from where the state stands, or from the first, and save a checkpoint after each."""
    recipe, folder, display = run.recipe, run.folder, run.display
    phases = planned_phases(recipe)
    data, execution = training_data(run.data), make_execution(recipe, network.model.backbone, run.world.device)
    start = str(recipe.init) if recipe.init else "none, since this phase starts from fresh weights"
    done, resumed = 0, None
    if state is not None:
        done = state.run.done
        network = network_from(state)
        resumed = None if state.phase is None else state
        start = str(folder.phase(phases[done - 1].number)) if done else start
        display.say(f"{folder.path}: going on with phase {phases[min(done, len(phases) - 1)].number}")
    for position, phase in enumerate(phases[done:], done):
        network, phase = network_for(phase, network, recipe, say=display.say)
        settings = phase_settings(recipe, phase, network.model, data, num_processes=run.world.size)
        journal = Journal(folder, display, run.values(network, position), run.signals, logs)
        try:
            entry = run_phase(
                network.model,
                settings,
                data,
                execution=execution,
                world=run.world,
                journal=journal,
                tracking=run.tracking,
                resumed=resumed,
            )
        except NotFiniteError as fault:
            raise _diverged(fault, run, network, start) from fault
        entry |= {"regime": recipe.regime, "start": recipe.start}
        network, resumed = replace(network, history=(*network.history, entry)), None
        path = folder.phase(phase.number)
        if run.world.is_main:
            network = replace(network, parent=save_checkpoint(path, network.model, run.about(network)))
            folder.save_state(_between_phases(run, network, position + 1))
        start = str(path)
    if run.world.is_main:
        logs.final(network.history[-1].get("validation") or {})
        _write_results(run, network)
    main_first(run.world, lambda: folder.finish(folder.phase(phases[-1].number)))


def _write_results(run: TrainingRun, network: Network) -> None:
    """Write results.csv and curves.png of the run."""
    folder, info = run.folder, run.data.info
    title = f"{info.name}, {network.spec.backbone.name}, {run.recipe.regime}, seed {run.recipe.seed}"
    try:
        rows = folder.rows()
    except EectlError as error:  # the weights are there, and worth more than a picture
        run.display.say(f"{folder.table.name} and {folder.picture.name} are left out: {error}")
        return
    fault = write_results(folder.table, folder.picture, rows, score_name=SCORE_NAMES[info.task], title=title)
    if fault is not None:
        run.display.say(fault)


def _between_phases(run: TrainingRun, network: Network, done: int) -> State:
    return State(with_prefix("model", network.model.state_dict()), run.values(network, done))


def _diverged(fault: NotFiniteError, run: TrainingRun, network: Network, start: str) -> EectlError:
    """Return the error for a loss that is not finite; where there are good weights, they are kept as last-good.safetensors."""
    kept = run.folder.path / "last-good.safetensors"
    if fault.restored and run.world.is_main:
        save_checkpoint(kept, network.model, run.about(network))
    return EectlError(
        f"{fault}; the last good checkpoint is {kept if fault.restored else start}; train again with a lower optimizer.lr or "
        "--set optimizer.clip_norm=1, and --overwrite or another -o"
    )


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
