"""`eectl analyze`: open checkpoints, put one question to them, and write the answer as JSON, CSV, PNG and PDF."""

import csv
import io
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from eectl import __version__
from eectl.analyses.connectivity.connectivity import ask_connectivity
from eectl.analyses.connectivity.plot import draw_connectivity
from eectl.analyses.connectivity.same_shape import check_headers
from eectl.analyses.depth_plot import draw_information, draw_rank
from eectl.analyses.dominance.dominance import ask_dominance, check_dominance
from eectl.analyses.dominance.plot import draw_dominance
from eectl.analyses.information import ask_information
from eectl.analyses.landscape.landscape import ask_landscape
from eectl.analyses.landscape.plot import draw_landscape
from eectl.analyses.question import Answer, Context, Subject
from eectl.analyses.rank import ask_rank
from eectl.analyses.settings import QUESTIONS, Settings, make_settings
from eectl.core.console import silent
from eectl.core.distributed import World
from eectl.core.errors import EectlError, out_of_memory
from eectl.core.figures import render, title
from eectl.core.files import check_outputs, real, write_all
from eectl.core.json_files import json_text, sealed
from eectl.core.precision import FLOAT32
from eectl.core.progress import Display
from eectl.core.seeds import check_seed
from eectl.evaluation.opened import Session, measuring, open_session
from eectl.models.checkpoint import About, read_about

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KIND, SCHEMA = "analysis", 1
SUFFIXES = ("json", "csv", "png", "pdf")


@dataclass(frozen=True)
class Method:
    """The functions of a question: one computes its answer, one draws it, and one may check headers before the work."""

    ask: Callable[[Sequence[Subject], Any, Context], Answer]
    draw: "Callable[[Figure, Answer, Sequence[str]], None]"
    check: Callable[[Sequence[Path], Sequence[About], Any], None] | None = None


@dataclass(frozen=True)
class Analysis:
    """An answer, and what it was asked about and with."""

    question: str
    seed: int
    settings: Mapping[str, Any]
    checkpoints: Sequence[Mapping[str, Any]]
    answer: Answer

    def to_json(self) -> dict[str, Any]:
        """Return what QUESTION.json holds."""
        about = {"kind": KIND, "schema": SCHEMA, "eectl": __version__, "question": self.question, "seed": self.seed}
        given = {"settings": dict(self.settings), "checkpoints": list(self.checkpoints)}
        answer = {"values": self.answer.values, "reading": self.answer.reading, "notes": self.answer.notes}
        return sealed({**about, **given, **answer})


def analyze(
    question: str,
    checkpoints: str | Path | Sequence[str | Path],
    *,
    out: str | Path,
    label: Sequence[str] = (),
    seed: int = 0,
    batch_size: int | None = None,
    device: str = "auto",
    data_root: str | Path | None = None,
    paper: bool = False,
    overwrite: bool = False,
    quiet: bool = True,
    say: Callable[[str], None] = silent,
    **options: Any,
) -> Analysis:
    """Answer one of the paper's questions about checkpoints, and write the answer into a folder.

    Args:
        question: gradient-dominance, mode-connectivity, numerical-rank, mutual-information or loss-landscape.
        checkpoints: files of trained networks, or one; all of one data set.
        out: the folder for QUESTION.json, .csv, .png and .pdf.
        label: what to call each checkpoint, in their order; default: its regime.
        seed: the seed of the rows and of what else is drawn.
        batch_size: rows at once; default: the recipe's.
        device: auto, cpu, cuda, cuda:N or mps.
        data_root: where the data lies; default: where the recipe says.
        paper: draw the pictures without a title.
        overwrite: replace files that exist.
        quiet: show no progress bar.
        say: takes what the command shows on stderr: notes about the data, files written.
        **options: the question's own options, as `eectl analyze QUESTION --help` lists them (`--bn-samples` is `bn_samples`).

    Raises:
        EectlError: for options or checkpoints that the question does not take, before data or weights are read where that can
            be known by then; nothing is written.
    """
    settings = make_settings(question, options)
    seed = check_seed(seed)
    paths = [Path(path) for path in ([checkpoints] if isinstance(checkpoints, (str, Path)) else checkpoints)]
    labels = [label] if isinstance(label, str) else list(label)
    folder = Path(out)
    files = [folder / f"{question}.{suffix}" for suffix in SUFFIXES]
    _check_checkpoints(question, paths, labels, least=QUESTIONS[question].least)
    _check_folder(folder)
    check_outputs(files, inputs=paths, overwrite=overwrite)
    abouts = [read_about(path) for path in paths]
    _check_headers(question, paths, abouts, settings)
    check = ANALYSES[question].check
    if check is not None:
        check(paths, abouts, settings)
    with measuring(device, FLOAT32) as (world, _):
        if world.size > 1:
            raise EectlError("analyze runs as one process; start it without torchrun")
        sessions = _open(question, paths, settings, world=world, data_root=None if data_root is None else Path(data_root))
        names = labels or _labels(abouts, paths)
        subjects = [Subject(name, session) for name, session in zip(names, sessions, strict=True)]
        for note in dict.fromkeys(note for session in sessions for note in session.notes):
            say(f"note: {note}")
        answer = _ask(question, subjects, settings, seed=seed, batch_size=batch_size, quiet=quiet)
    analysis = Analysis(question, seed, asdict(settings), [_described(subject, settings) for subject in subjects], answer)
    _write(files, analysis, paper=paper, overwrite=overwrite)
    say(f"{', '.join(map(str, files))}: written")
    return analysis


def _check_checkpoints(question: str, paths: Sequence[Path], labels: Sequence[str], *, least: int) -> None:
    """Raise EectlError for too few checkpoints, one given twice, and labels that do not tell them apart."""
    if len(paths) < least:
        raise EectlError(f"{question}: {len(paths)} checkpoint{'s' * (len(paths) != 1)}; it takes at least {least}, name another")
    twice = next((path for path, count in Counter(map(real, paths)).items() if count > 1), None)
    if twice is not None:
        raise EectlError(f"{twice} is named twice; name each checkpoint once")
    if labels and len(labels) != len(paths):
        raise EectlError(f"--label: {len(labels)} for {len(paths)} checkpoints; give one for each, in their order")
    same = next((label for label, count in Counter(labels).items() if count > 1), None)
    if same is not None:
        raise EectlError(f"--label: '{same}' stands twice; give each checkpoint another")


def _check_folder(out: Path) -> None:
    """Raise EectlError where the folder to write into is a file, or would lie below one."""
    for place in (out, *out.parents):
        if place.is_file():
            raise EectlError(f"-o {out}: {'' if place == out else f'{place} is '}a file; name a folder")


def _check_headers(question: str, paths: Sequence[Path], abouts: Sequence[About], settings: Settings) -> None:
    """Raise EectlError for what the headers of the checkpoints tell: exits that are missing, training on other rows.

    Test rows are compared once they are read, as those of today may differ from the recorded ones.
    """
    for path, about in zip(paths, abouts, strict=True):
        if QUESTIONS[question].needs_exits and not about.spec.after:
            raise EectlError(f"{path}: no exits, which {question} is about; put some on it with eectl attach-heads, and train")
    recorded = [{name: each.get("fingerprint") for name, each in about.splits.items()} for about in abouts]
    for path, splits in zip(paths[1:], recorded[1:], strict=True):
        for name in settings.splits:
            if name != "test" and splits.get(name) != recorded[0].get(name):
                raise _other_rows(question, path, paths[0], name)


def _other_rows(question: str, path: Path, other: Path, split: str) -> EectlError:
    return EectlError(
        f"{question}: {path} and {other} differ in their {split} rows; give checkpoints of one data set and split_seed"
    )


def _open(question: str, paths: Sequence[Path], settings: Settings, *, world: World, data_root: Path | None) -> list[Session]:
    """Open every checkpoint with its data, which is read once where the recipes say the same of it."""
    sessions: list[Session] = []
    for path in paths:
        session = open_session(path, world=world, data_root=data_root, needs=settings.splits, like=sessions)
        for other in sessions:
            for name in settings.splits:
                if other.data.splits[name].fingerprint != session.data.splits[name].fingerprint:
                    raise _other_rows(question, path, other.checkpoint.path, name)
        sessions.append(session)
    return sessions


def _ask(
    question: str, subjects: Sequence[Subject], settings: Settings, *, seed: int, batch_size: int | None, quiet: bool
) -> Answer:
    display = Display(quiet=quiet)
    size = batch_size or min(each.session.checkpoint.about.eval_batch_size for each in subjects)
    try:
        return ANALYSES[question].ask(subjects, settings, Context(seed, batch_size, display.counting))
    except torch.OutOfMemoryError as error:
        device = subjects[0].session.world.device
        raise out_of_memory(device, "--batch-size ", size) from error
    finally:
        display.close()


def _labels(abouts: Sequence[About], paths: Sequence[Path]) -> list[str]:
    """Name checkpoints by their regimes; where those do not tell them apart, by regime and seed, by folder, or by path."""
    regimes = [str(about.recipe.get("regime", "")) if about.spec.after else "backbone" for about in abouts]
    with_seeds = [f"{regime}, seed {about.recipe.get('seed', 0)}" for regime, about in zip(regimes, abouts, strict=True)]
    folders = [path.parent.name or str(path) for path in paths]
    for names in (regimes, with_seeds, folders):
        if max(Counter(names).values()) == 1:
            return names
    return [str(path) for path in paths]


def _described(subject: Subject, settings: Settings) -> dict[str, Any]:
    """Say which checkpoint a subject is: file, digest, network, recipe and the rows that the question read."""
    checkpoint = subject.session.checkpoint
    splits = {name: subject.session.data.splits[name].fingerprint for name in settings.splits}
    return {
        "label": subject.label,
        "path": str(checkpoint.path),
        "weights": checkpoint.digest,
        "network": checkpoint.about.spec.backbone.name,
        "regime": checkpoint.about.recipe.get("regime"),
        "seed": checkpoint.about.recipe.get("seed"),
        "after": list(checkpoint.about.spec.after),
        "data": checkpoint.about.data["name"],
        "splits": splits,
    }


def _write(files: Sequence[Path], analysis: Analysis, *, paper: bool, overwrite: bool) -> None:
    """Write the answer: JSON, CSV, and the picture in both formats, all or none."""
    as_json, as_csv, *pictures = files
    labels = [str(checkpoint["label"]) for checkpoint in analysis.checkpoints]
    data, network = (", ".join(dict.fromkeys(str(each[key]) for each in analysis.checkpoints)) for key in ("data", "network"))

    def draw(figure: "Figure") -> None:
        ANALYSES[analysis.question].draw(figure, analysis.answer, labels)
        title(figure, f"{data}, {network}: {analysis.question.replace('-', ' ')}", paper=paper)

    table = io.StringIO()
    writer = csv.DictWriter(table, fieldnames=list(analysis.answer.records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(analysis.answer.records)
    write_all({as_json: json_text(analysis.to_json()), as_csv: table.getvalue(), **render(pictures, draw)}, overwrite=overwrite)


ANALYSES: dict[str, Method] = {
    "gradient-dominance": Method(ask_dominance, draw_dominance, check_dominance),
    "mode-connectivity": Method(ask_connectivity, draw_connectivity, check_headers),
    "numerical-rank": Method(ask_rank, draw_rank),
    "mutual-information": Method(ask_information, draw_information),
    "loss-landscape": Method(ask_landscape, draw_landscape),
}
