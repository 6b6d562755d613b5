"""`eectl report`: finds the evaluations of many runs, compares them, and writes tables and plots into files."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

from eectl.core.errors import EectlError
from eectl.core.files import check_outputs, replacing
from eectl.evaluation.curve import PLOT_FORMATS
from eectl.evaluation.results import read_evaluation
from eectl.models.checkpoint import read_metadata
from eectl.reports.compare import Comparison, Run, compare
from eectl.reports.curves import plot_comparison
from eectl.reports.published import find_published
from eectl.reports.tables import FORMATS

EVALUATION, CHECKPOINT = "evaluation.json", "model.safetensors"
SUFFIXES = {".md": "markdown", ".tex": "latex", ".csv": "csv", ".json": "json"}


@dataclass(frozen=True)
class _Found:
    """A run as the user named it: its evaluation's file, and its checkpoint where one lies there."""

    name: str
    file: Path
    checkpoint: Path | None


def summarize(
    sources: Sequence[Path],
    *,
    how: str = "per-seed",
    published: str | None = None,
    label: Sequence[str] = (),
    outputs: Sequence[Path] = (),
    overwrite: bool = False,
    say: Callable[[str], None],
) -> Comparison:
    """Compare the runs in `sources`: run folders, checkpoints with an evaluation beside them, or evaluation files.

    Folders without an evaluation are left out, and `say` tells so on stderr. `label` are the user's PATTERN=TEXT, `published`
    their TABLE[:VARIANT]. Raises EectlError for what cannot be read, compared or written, before anything is written.
    """
    for path in outputs:
        if path.suffix.lower() not in SUFFIXES and not _is_plot(path):
            allowed = ", ".join([*SUFFIXES, *(f".{name}" for name in PLOT_FORMATS)])
            raise EectlError(f"-o {path}: allowed are files that end in {allowed}")
    table, variant = (None, None) if published is None else find_published(published)
    patterns = [_pattern(text) for text in label]
    found = [each for each in (_find(source, say) for source in sources) if each is not None]
    if not found:
        raise EectlError("there is nothing to report; run eectl evaluate CKPT -o RUN/evaluation.json, then name those runs")
    read = [each.file for each in found] + [each.checkpoint for each in found if each.checkpoint is not None]
    check_outputs(outputs, inputs=read, overwrite=overwrite)
    runs = _labelled([_read(each) for each in found], patterns)
    comparison = compare(runs, how=how, published=table, variant=variant)
    if any(map(_is_plot, outputs)):
        _check_curves(runs)
    for path in outputs:
        if _is_plot(path):
            plot_comparison(path, comparison)
        else:
            with replacing(path) as temporary:
                temporary.write_text(FORMATS[SUFFIXES[path.suffix.lower()]](comparison), encoding="utf-8")
        say(f"{path}: written")
    return comparison


def _is_plot(path: Path) -> bool:
    return path.suffix[1:].lower() in PLOT_FORMATS


def _find(source: Path, say: Callable[[str], None]) -> _Found | None:
    """Where the evaluation of `source` lies; None, and a word on stderr, for a folder that has none yet."""
    if source.is_dir():
        checkpoint, file = source / CHECKPOINT, source / EVALUATION
        if file.exists():
            return _Found(str(source), file, checkpoint if checkpoint.exists() else None)
        if any(source.glob(f"*/{EVALUATION}")):
            raise EectlError(f"{source} is a folder of runs; name the runs in it, as {source}/*")
        say(f"{source}: left out, there is no {EVALUATION}; eectl evaluate {checkpoint} -o {file} writes it")
        return None
    if not source.exists():
        raise EectlError(f"{source}: no such file or folder; name run folders, checkpoints or evaluation files")
    if source.suffix == ".json":
        return _Found(str(source), source, None)
    if source.suffix != ".safetensors":
        raise EectlError(f"{source}: not a run; name run folders, checkpoints (.safetensors) or evaluation files (.json)")
    file = source.with_name(EVALUATION)
    if not file.exists():
        raise EectlError(f"{source}: there is no {EVALUATION} beside it; run eectl evaluate {source} -o {file}")
    return _Found(str(source), file, source)


def _read(found: _Found) -> Run:
    """Return the run that an evaluation is of; a checkpoint that was found with it must be its own."""
    evaluation = read_evaluation(found.file)
    if found.checkpoint is not None:
        digest = read_metadata(found.checkpoint)["weights"]
        if evaluation.checkpoint != digest:
            raise EectlError(
                f"{found.file} was made for another checkpoint ({evaluation.checkpoint[:12]}…, {found.checkpoint} is "
                f"{digest[:12]}…); run eectl evaluate {found.checkpoint} -o {found.file} --overwrite"
            )
    return Run(found.name, evaluation, evaluation.origin)


def _pattern(text: str) -> tuple[str, str]:
    pattern, equals, label = text.partition("=")
    if not equals or not pattern:
        raise EectlError(f"--label {text}: write it as PATTERN=TEXT, such as --label 'runs/gpf-*=GPF'")
    return pattern, label


def _labelled(runs: Sequence[Run], patterns: Sequence[tuple[str, str]]) -> list[Run]:
    """The runs with the labels of the patterns that their names match, of several the last one's."""
    for pattern, text in patterns:
        if not any(fnmatchcase(run.name, pattern) for run in runs):
            raise EectlError(f"--label {pattern}={text}: no run's name fits the pattern; the first run is {runs[0].name}")
    labelled = []
    for run in runs:
        own = [text for pattern, text in patterns if fnmatchcase(run.name, pattern)]
        labelled.append(replace(run, label=own[-1]) if own else run)
    return labelled


def _check_curves(runs: Sequence[Run]) -> None:
    for run in runs:
        if run.evaluation.curve is None:
            raise EectlError(
                f"{run.name}: its evaluation has no curve to plot (an older one); write it again with eectl evaluate CKPT -o"
            )
