"""`eectl report`: find the evaluations of many runs, compare them, and write tables and plots into files."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path

from eectl.core.console import silent
from eectl.core.errors import EectlError
from eectl.core.files import check_outputs, write_all
from eectl.evaluation.curve import PLOT_FORMATS
from eectl.evaluation.results import read_evaluation
from eectl.models.checkpoint import read_checkpoint_metadata
from eectl.reports.compare import Run, compare
from eectl.reports.comparison import Comparison
from eectl.reports.curves import plot_comparison
from eectl.reports.formats import FORMATS
from eectl.reports.published import find_published

EVALUATION, CHECKPOINT = "evaluation.json", "model.safetensors"
SUFFIXES = {".md": "markdown", ".tex": "latex", ".csv": "csv", ".json": "json"}
_MOST_NAMED = 3  # folders without an evaluation that are named one by one


@dataclass(frozen=True)
class _Found:
    """A run as it is called in the table: its evaluation's file, and its checkpoint where one lies there."""

    name: str
    file: Path
    checkpoint: Path | None


def report(
    runs: str | Path | Sequence[str | Path],
    *,
    lookup: str = "per-seed",
    published: str | None = None,
    measure: str | None = None,
    label: Sequence[str] = (),
    out: Sequence[str | Path] = (),
    paper: bool = False,
    overwrite: bool = False,
    say: Callable[[str], None] = silent,
) -> Comparison:
    """Gather runs into one table: mean ± std over seeds at each budget, a row per setting and regime.

    Args:
        runs: run folders with an evaluation.json, folders of such runs (searched at any depth), checkpoints with an
            evaluation.json beside them, or evaluation files.
        lookup: how several seeds become one number: `per-seed` or `average-first`.
        published: `TABLE[:VARIANT]`, numbers of the paper to stand below ours.
        measure: what is shown in place of the score, such as auroc or map: an entry of MEASURE_CHOICES.
        label: `PATTERN=TEXT` each; the runs whose names fit the pattern are called TEXT, of several patterns the last one's.
        out: files to write, tables (.md, .tex, .csv, .json) or plots (.png, .pdf, .svg).
        paper: draw plots without a title.
        overwrite: replace files that exist.
        say: takes what the command shows on stderr: which folders were left out, which files were written.

    Raises:
        EectlError: for what cannot be read, compared or written, before anything is written.
    """
    outputs = [Path(path) for path in ([out] if isinstance(out, (str, Path)) else out)]
    for path in outputs:
        if path.suffix.lower() not in SUFFIXES and not _is_plot(path):
            allowed = ", ".join([*SUFFIXES, *(f".{name}" for name in PLOT_FORMATS)])
            raise EectlError(f"-o {path}: allowed are files that end in {allowed}")
        if measure is not None and _is_plot(path):
            raise EectlError(
                f"-o {path}: plots are of the score at any threshold; write a table, or leave out --measure {measure}"
            )
    table, variant = (None, None) if published is None else find_published(published)
    patterns = [_pattern(text) for text in ([label] if isinstance(label, str) else label)]
    found = _find_all([Path(run) for run in ([runs] if isinstance(runs, (str, Path)) else runs)], say)
    if not found:
        raise EectlError("there is nothing to report; run eectl evaluate CKPT -o RUN/evaluation.json, then name those runs")
    read = [each.file for each in found] + [each.checkpoint for each in found if each.checkpoint is not None]
    check_outputs(outputs, inputs=read, overwrite=overwrite)
    comparison = compare(
        _labelled([_read(each) for each in found], patterns), how=lookup, published=table, variant=variant, measure=measure
    )
    contents: dict[Path, bytes | str] = {}
    for path in outputs:
        if _is_plot(path):
            contents |= plot_comparison(path, comparison, paper=paper)
        else:
            contents[path] = FORMATS[SUFFIXES[path.suffix.lower()]](comparison)
    write_all(contents, overwrite=overwrite)
    for path in outputs:
        say(f"{path}: written")
    return comparison


def _is_plot(path: Path) -> bool:
    return path.suffix[1:].lower() in PLOT_FORMATS


def _find_all(sources: Sequence[Path], say: Callable[[str], None]) -> list[_Found]:
    """Find the runs that the user named; `say` takes a few lines about those without an evaluation."""
    found: list[_Found] = []
    bare: list[Path] = []
    for source in sources:
        if not source.is_dir():
            found.append(_find_file(source))
        elif (source / EVALUATION).exists():
            found.append(_in_folder(source))
        else:
            inside = _search(source, say)
            found += inside
            bare += [] if inside else [source]
    for folder in bare[:_MOST_NAMED]:
        command = f"eectl evaluate {folder / CHECKPOINT} -o {folder / EVALUATION}"
        say(f"{folder}: left out, there is no {EVALUATION}; {command} writes it")
    if len(bare) > _MOST_NAMED:
        say(f"{len(bare) - _MOST_NAMED} more folders without an {EVALUATION} were left out")
    return found


def _in_folder(folder: Path) -> _Found:
    checkpoint = folder / CHECKPOINT
    return _Found(str(folder), folder / EVALUATION, checkpoint if checkpoint.exists() else None)


def _search(folder: Path, say: Callable[[str], None]) -> list[_Found]:
    """Find the runs below a folder, at any depth; `say` takes how many there are, and what is left out."""
    runs: list[Path] = []
    bare: list[Path] = []
    closed: list[OSError] = []
    for place, _, files in os.walk(folder, onerror=closed.append):  # it follows no link to a folder, so none in a circle
        if EVALUATION in files or CHECKPOINT in files:
            (runs if EVALUATION in files else bare).append(Path(place))
    for error in closed[:_MOST_NAMED]:
        say(f"{error.filename}: left out, it cannot be read ({error.strerror})")
    if len(closed) > _MOST_NAMED:
        say(f"{len(closed) - _MOST_NAMED} more folders that cannot be read were left out")
    if not runs:
        return []
    runs, bare = sorted(runs), sorted(bare)
    text = f"{folder}: {len(runs)} run{'s' * (len(runs) != 1)} found"
    if bare:
        names = ", ".join(str(each.relative_to(folder)) for each in islice(bare, _MOST_NAMED))
        more = f" and {len(bare) - _MOST_NAMED} more" if len(bare) > _MOST_NAMED else ""
        text += f"; {names}{more} left out, there is no {EVALUATION}"
    say(text)
    return [_in_folder(run) for run in runs]


def _find_file(source: Path) -> _Found:
    """Find the evaluation that a file names or lies beside; raise EectlError where there is none."""
    if not source.exists():
        raise EectlError(f"{source}: no such file or folder; name run folders, checkpoints or evaluation files")
    if source.suffix == ".json":
        return _Found(str(source), source, checkpoint=None)
    if source.suffix != ".safetensors":
        raise EectlError(f"{source}: not a run; name run folders, checkpoints (.safetensors) or evaluation files (.json)")
    file = source.with_name(EVALUATION)
    if not file.exists():
        raise EectlError(f"{source}: there is no {EVALUATION} beside it; run eectl evaluate {source} -o {file}")
    return _Found(str(source), file, source)


def _read(found: _Found) -> Run:
    """Read a run's evaluation; raise EectlError where it was made for another checkpoint than the one beside it."""
    evaluation = read_evaluation(found.file)
    if found.checkpoint is not None:
        digest = read_checkpoint_metadata(found.checkpoint)["weights"]
        if evaluation.checkpoint != digest:
            raise EectlError(
                f"{found.file} was made for another checkpoint ({evaluation.checkpoint[:12]}…, {found.checkpoint} is "
                f"{digest[:12]}…); run eectl evaluate {found.checkpoint} -o {found.file} --overwrite"
            )
    return Run(found.name, evaluation)


def _pattern(text: str) -> tuple[str, str]:
    pattern, equals, label = text.partition("=")
    if not equals or not pattern:
        raise EectlError(f"--label {text}: write it as PATTERN=TEXT, such as --label 'runs/gpf-*=GPF'")
    return pattern, label


def _labelled(runs: Sequence[Run], patterns: Sequence[tuple[str, str]]) -> list[Run]:
    """Label the runs whose names fit a pattern; raise EectlError for a pattern that fits none."""
    for pattern, text in patterns:
        if not any(fnmatchcase(run.name, pattern) for run in runs):
            raise EectlError(f"--label {pattern}={text}: no run's name fits the pattern; the first run is {runs[0].name}")
    labelled = []
    for run in runs:
        own = [text for pattern, text in patterns if fnmatchcase(run.name, pattern)]
        labelled.append(replace(run, label=own[-1]) if own else run)
    return labelled
