"""A run's folder made ready: the same run goes on, another is set aside until the new one has come to its end.

All that may be wrong with a run to go on with is looked at here, before the first step, and each fault says the way out. Trains
nothing.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from typing import Any

from eectl.core.errors import EectlError
from eectl.core.files import real
from eectl.core.hub import local_path
from eectl.data import Dataset
from eectl.models.build import build_model
from eectl.models.checkpoint import load_checkpoint, read_about, read_checkpoint_metadata
from eectl.recipe.recipe import Recipe, phase_change
from eectl.recipe.regimes import Phase
from eectl.training.network import Network, later_specs, planned_phases
from eectl.training.resume import SavedState, StateError, tensors_like
from eectl.training.run_folder import RunFolder


def prepare_folder(folder: RunFolder, recipe: Recipe, data: Dataset, network: Network, *, resume: bool) -> list[str]:
    """Make a folder ready that this process has locked.

    Args:
        folder: the run's.
        recipe: the resolved one.
        data: its data.
        network: the one that the first phase starts from.
        resume: whether the run that is there goes on.

    Returns:
        What the user should know.

    Raises:
        EectlError: the run there has another recipe or other data, or the network to start from lies in it.
        StateError: its resume state, or what that counts on, is damaged or another's.
    """
    phases = planned_phases(recipe)
    folder.remove_left_behind([phase.number for phase in phases])
    if not (resume and (folder.recipe.exists() or folder.results())):
        if recipe.init is not None and real(local_path(recipe.init)) in map(real, folder.results()):
            raise EectlError(f"--from {recipe.init} lies in the folder whose run would be replaced; give another -o")
        folder.set_aside()
        folder.write_recipe(recipe)
        return []
    folder.check_recipe(recipe)
    if folder.finished():
        _check_splits(folder, read_about(folder.model).splits, data)
        return []
    state = folder.load_state()
    if state is None:
        folder.keep_rows([])
        begun = any(folder.phase(phase.number).exists() for phase in phases)
        return [f"{folder.state} is missing, so training starts again from the first phase"] if begun else []
    _check_splits(folder, {name: split.model_dump() for name, split in state.run.splits.items()}, data)
    try:
        _check_spec(state, network, recipe)
        epochs = _epochs_done(state, phases, recipe)
    except StateError as error:
        raise StateError(f"{folder.state}: {error}") from error
    notes = _check_last_phase(folder, state, phases)
    missing = folder.keep_rows(epochs)
    if missing:
        notes.append(
            f"{folder.metrics}: {missing} of {len(epochs)} rows missing or damaged; the run goes on without them, as no weights "
            "depend on them"
        )
    return notes


def _check_splits(folder: RunFolder, recorded: Mapping[str, Mapping[str, Any]], data: Dataset) -> None:
    if recorded != split_facts(data):
        noun = data.splits["train"].noun
        raise EectlError(f"{folder.path}: --resume with other data: {noun} were added, taken away or changed; give another -o")


def split_facts(data: Dataset) -> dict[str, dict[str, Any]]:
    """Return size and fingerprint of each split."""
    return {name: {"size": len(split), "fingerprint": split.fingerprint} for name, split in data.splits.items()}


def _check_spec(state: SavedState, network: Network, recipe: Recipe) -> None:
    """Raise StateError unless the network of a state is one that this run has between two phases.

    Nothing is built from what a file says alone: a hostile one would name a network that fills the memory.
    """
    found = state.run.spec.model_dump(mode="json")
    if found not in [spec.model_dump(mode="json") for spec in later_specs(network, recipe.exits)]:
        raise StateError("is the state of another network")


def _epochs_done(state: SavedState, phases: Sequence[Phase], recipe: Recipe) -> list[tuple[int, int]]:
    """Return the epochs (phase and epoch) that a state counts on; raises StateError for such as this run cannot have."""
    done = state.run.done
    entries = [entry for entry in state.run.history if "phase" in entry]
    counts = [(entry["phase"], entry.get("epochs")) for entry in entries[max(len(entries) - done, 0) :]]
    if state.phase is not None:
        counts.append((phases[done].number if done < len(phases) else None, state.phase.epoch))
    if done > len(phases) or len(counts) != done + (state.phase is not None):
        raise StateError(f"says that {done} phases are done, of {len(phases)}")
    epochs = []
    for phase, (number, count) in zip(phases, counts, strict=False):
        most = phase_change(recipe, phase).epochs or recipe.epochs
        if number != phase.number or not isinstance(count, int) or not 0 <= count <= most:
            raise StateError(f"says {count} epochs of phase {number}; phase {phase.number} has up to {most}")
        epochs += [(phase.number, epoch) for epoch in range(1, count + 1)]
    return epochs


def _check_last_phase(folder: RunFolder, state: SavedState, phases: Sequence[Phase]) -> list[str]:
    """Raise StateError unless the checkpoint of the last phase that is done is the one that the state goes on from.

    Returns what the user should know: where phases are left, a run can do without that file.
    """
    if not state.run.done:
        return []
    path = folder.phase(phases[state.run.done - 1].number)
    if state.run.done < len(phases) and not path.exists():
        return [f"{path} is missing; the run goes on without it"]
    try:
        found = load_checkpoint(path).digest if state.run.done == len(phases) else read_checkpoint_metadata(path)["weights"]
    except EectlError as error:
        raise StateError(str(error)) from error
    if found != state.run.parent:
        raise StateError(f"{path}: not the network that the resume state goes on from, so of another run")
    return []


def network_from(state: SavedState) -> Network:
    """Build the network of a state whose spec was found to be this run's; raises StateError where its tensors do not fit."""
    model = build_model(state.run.spec)
    model.load_state_dict(tensors_like("model", state.tensors, model.state_dict()))
    return Network(model, state.run.spec, tuple(state.run.history), state.run.parent)


@contextmanager
def with_way_out(folder: RunFolder, recipe: Recipe) -> Iterator[None]:
    """Turn a StateError of the block into an EectlError that says how to go on without the resume state."""
    try:
        yield
    except StateError as error:
        phases = planned_phases(recipe)
        done = list(takewhile(lambda phase: _is_whole(folder.phase(phase.number)), phases))
        ways = ["--overwrite trains again from the start"]
        if done and len(done) == len(phases):
            ways = [f"{folder.phase(done[-1].number)} is the network as the last phase left it", *ways]
        elif done:
            line = f"--phase {phases[len(done)].number} --from {folder.phase(done[-1].number)} -o OTHER"
            ways = [f"eectl train {folder.recipe} {line} goes on from the last whole phase", *ways]
        raise EectlError(f"{error}; {', and '.join(ways)}") from error


def _is_whole(checkpoint: Path) -> bool:
    try:
        load_checkpoint(checkpoint)
    except EectlError:
        return False
    return True
