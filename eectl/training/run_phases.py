"""Run a recipe's phases, one after the other, and save a checkpoint after each. The loop inside a phase is `loop`'s."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from eectl.core.distributed import World, main_first
from eectl.core.errors import EectlError
from eectl.core.progress import Display
from eectl.data import Dataset
from eectl.models.checkpoint import About, save_checkpoint
from eectl.recipe.recipe import SCORE_NAMES, Recipe
from eectl.training.experiment_logs import ExperimentLogs
from eectl.training.feed import training_data
from eectl.training.loop import Journal, NotFiniteError, Tracking, run_phase
from eectl.training.network import Network, network_for, planned_phases
from eectl.training.phase import phase_settings
from eectl.training.prepare import network_from, split_facts
from eectl.training.results import write_results
from eectl.training.resume import SavedState, State, with_prefix
from eectl.training.run_folder import RunFolder
from eectl.training.running import make_execution


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

    def rows(self) -> list[dict[str, Any]]:
        """Return the rows of metrics.jsonl of a run that goes on, none where they are damaged."""
        try:
            return self.folder.rows()
        except EectlError as error:
            self.display.say(f"{error}; trackers go on without them")
            return []


def run_phases(run: TrainingRun, network: Network, state: SavedState | None, logs: ExperimentLogs) -> None:
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
