"""`eectl analyze`: opens checkpoints, puts one question to them, and writes the answer as JSON, CSV, PNG and PDF."""

import csv
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from eectl import __version__
from eectl.analyses.connectivity.connectivity import ask as ask_connectivity
from eectl.analyses.connectivity.plot import draw as draw_connectivity
from eectl.analyses.depth_plot import draw_information, draw_rank
from eectl.analyses.dominance.dominance import ask as ask_dominance
from eectl.analyses.dominance.plot import draw as draw_dominance
from eectl.analyses.information import ask as ask_information
from eectl.analyses.landscape.landscape import ask as ask_landscape
from eectl.analyses.landscape.plot import draw as draw_landscape
from eectl.analyses.question import Answer, Context, Settings, Subject
from eectl.analyses.rank import ask as ask_rank
from eectl.core.distributed import World, join, leave
from eectl.core.errors import EectlError, lookup
from eectl.core.figures import save_figures
from eectl.core.files import check_outputs, replacing, write_json
from eectl.core.progress import Display
from eectl.evaluation.opened import Session, open_session
from eectl.models.checkpoint import About

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KIND, SCHEMA = "analysis", 1
SUFFIXES = ("json", "csv", "png", "pdf")
SPLITS = {name: name for name in ("train", "validation", "calibration", "test")}


@dataclass(frozen=True)
class Analysis:
    """How a question is answered and drawn, the fewest checkpoints it needs, and whether they need attached exits."""

    ask: Callable[[Sequence[Subject], Any, Context], Answer]
    draw: "Callable[[Figure, Answer, Sequence[str]], None]"
    least: int = 1
    needs_exits: bool = True


@dataclass(frozen=True)
class Report:
    """An answer, and what it was asked about and with."""

    question: str
    seed: int
    settings: Mapping[str, Any]
    checkpoints: Sequence[Mapping[str, Any]]
    answer: Answer

    def to_json(self) -> dict[str, Any]:
        """What QUESTION.json holds."""
        about = {"kind": KIND, "schema": SCHEMA, "eectl": __version__, "question": self.question, "seed": self.seed}
        given = {"settings": dict(self.settings), "checkpoints": list(self.checkpoints)}
        answer = {"values": self.answer.values, "reading": self.answer.reading, "notes": self.answer.notes}
        return {**about, **given, **answer}


def analyze_checkpoints(
    question: str,
    paths: Sequence[Path],
    settings: Settings,
    *,
    out: Path,
    seed: int = 0,
    labels: Sequence[str] = (),
    device: str = "auto",
    data_root: Path | None = None,
    batch_size: int | None = None,
    overwrite: bool = False,
    quiet: bool = False,
    say: Callable[[str], None],
) -> Report:
    """Answer a question about checkpoints into `out`/QUESTION.json, .csv, .png and .pdf; `say` takes what belongs on stderr.

    Raises EectlError for checkpoints that the question cannot be put to, before the work where that can be known; nothing is
    written then.
    """
    analysis = ANALYSES[question]
    _check_checkpoints(question, paths, labels, least=analysis.least)
    for name in settings.splits:
        lookup(SPLITS, name, what="split")
    files = [out / f"{question}.{suffix}" for suffix in SUFFIXES]
    for place in (out, *out.parents):
        if place.is_file():
            raise EectlError(f"-o {out}: {'' if place == out else f'{place} is '}a file; name a folder")
    check_outputs(files, inputs=paths, overwrite=overwrite)
    world = join(device)
    try:
        if world.size > 1:
            raise EectlError("analyze runs as one process; start it without torchrun")
        subjects = _open(question, analysis, paths, settings, labels=labels, world=world, data_root=data_root)
        for note in dict.fromkeys(note for subject in subjects for note in subject.session.notes):
            say(f"note: {note}")
        display = Display(quiet=quiet)
        size = batch_size or min(each.session.checkpoint.about.eval_batch_size for each in subjects)
        try:
            answer = analysis.ask(subjects, settings, Context(seed, batch_size, display.counting))
        except torch.OutOfMemoryError as error:
            raise EectlError(f"out of memory on {world.device}; try --batch-size {max(size // 2, 1)} (it is {size})") from error
        finally:
            display.close()
    finally:
        leave()
    checkpoints = [_described(subject, settings) for subject in subjects]
    report = Report(question, seed, asdict(settings), checkpoints, answer)
    _write(files, report, analysis)
    say(f"{', '.join(map(str, files))}: written")
    return report


def _check_checkpoints(question: str, paths: Sequence[Path], labels: Sequence[str], *, least: int) -> None:
    """Raise EectlError for too few checkpoints, one given twice, and labels that do not tell them apart."""
    if len(paths) < least:
        raise EectlError(f"{question}: {len(paths)} checkpoint; it compares at least {least}, name another")
    twice = next((path for path, count in Counter(path.resolve() for path in paths).items() if count > 1), None)
    if twice is not None:
        raise EectlError(f"{twice} is named twice; name each checkpoint once")
    if labels and len(labels) != len(paths):
        raise EectlError(f"--label: {len(labels)} for {len(paths)} checkpoints; give one for each, in their order")
    same = next((label for label, count in Counter(labels).items() if count > 1), None)
    if same is not None:
        raise EectlError(f"--label: '{same}' stands twice; give each checkpoint another")


def _open(
    question: str,
    analysis: Analysis,
    paths: Sequence[Path],
    settings: Settings,
    *,
    labels: Sequence[str],
    world: World,
    data_root: Path | None,
) -> list[Subject]:
    """Every checkpoint with its data, which is read once where the recipes say the same of it."""
    sessions: list[Session] = []
    for path in paths:
        session = open_session(path, world=world, data_root=data_root, needs=settings.splits, like=sessions)
        if analysis.needs_exits and session.checkpoint.model.num_exits == 1:
            raise EectlError(f"{path}: no exits, which {question} is about; put some on it with eectl attach-heads, and train")
        for other in sessions:
            for name in settings.splits:
                if other.data.splits[name].fingerprint != session.data.splits[name].fingerprint:
                    raise EectlError(
                        f"{question}: {path} and {other.checkpoint.path} differ in their {name} rows; give checkpoints of one "
                        "data set and split_seed"
                    )
        sessions.append(session)
    names = labels or _labels([session.checkpoint.about for session in sessions], paths)
    return [Subject(name, session) for name, session in zip(names, sessions, strict=True)]


def _labels(abouts: Sequence[About], paths: Sequence[Path]) -> list[str]:
    """The regimes; with their seeds, or else the names of their folders, where that does not tell them apart."""
    regimes = [str(about.recipe.get("regime", "")) if about.spec.after else "backbone" for about in abouts]
    with_seeds = [f"{regime}, seed {about.recipe.get('seed', 0)}" for regime, about in zip(regimes, abouts, strict=True)]
    folders = [path.parent.name or str(path) for path in paths]
    for names in (regimes, with_seeds, folders):
        if max(Counter(names).values()) == 1:
            return names
    return [str(path) for path in paths]


def _described(subject: Subject, settings: Settings) -> dict[str, Any]:
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


def _write(files: Sequence[Path], report: Report, analysis: Analysis) -> None:
    as_json, as_csv, *pictures = files
    labels = [str(checkpoint["label"]) for checkpoint in report.checkpoints]
    save_figures(pictures, lambda figure: analysis.draw(figure, report.answer, labels))
    with replacing(as_csv) as temporary, open(temporary, "w", encoding="utf-8", newline="") as handle:
        writer = csv.DictWriter(handle, fieldnames=list(report.answer.records[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(report.answer.records)
    write_json(as_json, report.to_json())


ANALYSES: dict[str, Analysis] = {
    "gradient-dominance": Analysis(ask_dominance, draw_dominance),
    "mode-connectivity": Analysis(ask_connectivity, draw_connectivity, least=2, needs_exits=False),
    "numerical-rank": Analysis(ask_rank, draw_rank, needs_exits=False),
    "mutual-information": Analysis(ask_information, draw_information, needs_exits=False),
    "loss-landscape": Analysis(ask_landscape, draw_landscape, needs_exits=False),
}
