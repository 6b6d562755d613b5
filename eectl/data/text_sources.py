"""The data sets of texts that eectl knows, each a function from the recipe's data section to texts as they are stored.

Nothing is tokenised here. A set that is missing is downloaded only where that was asked for; no pickled cache is read.
"""

import tarfile
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eectl.core.errors import EectlError
from eectl.core.files import replacing
from eectl.data.arrow_tables import Sheet, is_string, listed_columns, require, table_of
from eectl.data.hub import datasets_library, hub_sheets, saved_sheets
from eectl.data.sheet_targets import sheet_targets, target_columns
from eectl.data.targets import classes_in, read_targets
from eectl.data.text_tables import READERS, Table, find_table, read_table, texts
from eectl.recipe.choices import TEXT_CHOICES, in_order
from eectl.recipe.data_section import DataSection
from eectl.recipe.text_sets import GLUE_PREFIX, NEWSGROUPS, TEXT_SETS

FILES = {"train": ("train",), "validation": ("validation",), "test": ("test",)}
GLUE_FILES = {"train": ("train",), "test": ("validation", "dev", "validation_matched", "dev_matched")}  # test labels are hidden
_KINDS = ", ".join(kind[1:] for kind in READERS)


@dataclass(frozen=True)
class TextPart:
    """One part of a data set: texts row by row (one or two strings), and targets as `read_targets` gives them."""

    texts: list[tuple[str, ...]]
    targets: NDArray[Any]


@dataclass(frozen=True)
class StoredTexts:
    """A data set of texts as it is stored: `parts` are train and, where it has them, other splits; `notes` say what is odd."""

    classes: tuple[str, ...]
    parts: dict[str, TextPart]
    notes: tuple[str, ...] = ()


def load_files(spec: DataSection, download: bool) -> StoredTexts:
    """Return the texts of train, and of validation and test where they are: CSV, TSV, JSONL or Parquet files in `data.root`.

    `data.root` may be one such file, which is then train.

    Classes are those of the training file. Raises EectlError for another layout, missing columns and cells that will not do.
    """
    tables = _tables(spec, FILES, download)
    classes = classes_in(tables["train"], spec)
    return StoredTexts(classes, {name: _part(table, spec, classes) for name, table in tables.items()})


def text_classes(spec: DataSection) -> tuple[str, ...]:
    """Return the classes of a text data set, from a table or its training file's target column; none for regression."""
    if spec.is_of_library:
        return load_hub_texts(spec, False).classes
    if spec.name in TEXT_SETS or spec.task == "regression":
        return TEXT_SETS[spec.name].classes if spec.name in TEXT_SETS else ()
    return classes_in(read_table(_find(spec, FILES, download=False)["train"], spec.targets), spec)


def _tables(spec: DataSection, files: Mapping[str, tuple[str, ...]], download: bool) -> dict[str, Table]:
    return {
        name: read_table(paths, list(dict.fromkeys([*spec.text, *spec.targets])))
        for name, paths in _find(spec, files, download=download).items()
    }


def _find(spec: DataSection, files: Mapping[str, tuple[str, ...]], *, download: bool) -> dict[str, list[Path]]:
    """Return the files of each part in the folder `data.root`; where it is a file, that is the training part."""
    root = spec.folder
    layout = f"expected: train.csv (or {_KINDS}), and optionally validation and test, with columns {_columns(spec)}; or one file"
    if root.is_file():
        if root.suffix not in READERS:
            raise EectlError(f"data.root is '{root}': not a file that eectl reads; it takes {_KINDS}")
        return {"train": [root]}
    if not root.is_dir():
        advice = "; --download does not apply to files of yours" if download else ""
        raise EectlError(f"data.root is '{root}': no such folder; {layout}{advice}")
    found = {name: paths for name, names in files.items() if (paths := find_table(root, names))}
    if "train" not in found:
        there = sorted(path.name for path in root.iterdir())[:4]
        raise EectlError(f"data.root is '{root}': no train file in it ({', '.join(there) or 'it is empty'}); {layout}")
    return found


def _columns(spec: DataSection) -> str:
    return ", ".join(dict.fromkeys([*spec.text, *spec.targets]))


def _part(table: Table, spec: DataSection, classes: Sequence[str], *, empty: bool = False) -> TextPart:
    """Return a table's texts and targets; raises EectlError for a class that is not among `classes`."""
    rows = list(zip(*(texts(table, name, empty=empty) for name in spec.text), strict=True))
    return TextPart(rows, read_targets(table, spec, classes))


def _load_glue(task: str, spec: DataSection, download: bool) -> StoredTexts:
    """Return a GLUE task: its training set, and as test its development set (of MNLI the matched one).

    Labels of the official test sets are hidden.

    Reads the library's Parquet files, or JSONL, CSV or TSV with the library's column names, in `data.root`, `TASK/` or
    `glue/TASK/` below it, or a folder that the library's save_to_disk wrote there. A download is kept as `root/glue/TASK/`.
    """
    root = spec.folder
    folders = [root, root / task, root / "glue" / task]
    folder = next((folder for folder in folders if _is_glue(folder)), None)
    if folder is None and download:
        folder = folders[-1]
        _download_glue(task, folder)
    if folder is None:
        raise EectlError(
            f"data.root is '{root}': {spec.name} is not there; expected: train and validation (or dev) as {_KINDS} with columns "
            f"{_columns(spec)}, in {root}, {root / task} or {folders[-1]}; or give --download"
        )
    own = spec.model_copy(update={"root": folder})
    tables = _saved_tables(folder, own) if (folder / "dataset_dict.json").is_file() else _tables(own, GLUE_FILES, download)
    if "test" not in tables:
        raise EectlError(
            f"{folder}: {spec.name} has no validation (or dev) file, which is tested on, since GLUE hides test labels"
        )
    classes = TEXT_SETS[spec.name].classes
    return StoredTexts(classes, {name: _part(table, own, classes, empty=True) for name, table in tables.items()})


def _is_glue(folder: Path) -> bool:
    return (folder / "dataset_dict.json").is_file() or (folder.is_dir() and bool(find_table(folder, GLUE_FILES["train"])))


def _saved_tables(folder: Path, spec: DataSection) -> dict[str, Table]:
    """Read what the library's save_to_disk wrote: the cells as they are stored, so that none names a file to open."""
    saved = saved_sheets(folder)
    tables = {}
    for part, names in GLUE_FILES.items():
        name = next((name for name in names if name in saved), None)
        if name is not None:
            tables[part] = table_of(saved[name], (*spec.text, *spec.targets), row=f"a text and its {spec.targets[-1]}")
    if "train" not in tables:
        raise EectlError(f"{folder}: there is no train in it, but {', '.join(saved)}")
    return tables


def load_hub_texts(spec: DataSection, download: bool) -> StoredTexts:
    """Return the texts of a data set of the datasets library, hfds/NAME: the columns that the recipe names, or the only ones.

    Targets are what `sheet_targets` finds beside them. Raises EectlError for missing columns and cells that will not do.
    """
    sheets = hub_sheets(spec, download)
    own = spec.model_copy(update={"target": target_columns(sheets["train"], spec, _may_be_class)})
    columns = _text_columns(sheets["train"], own.targets, spec)
    told = sheet_targets(sheets, own, row="a text")
    parts = {}
    for name, targets in told.targets.items():
        table = table_of(sheets[name], columns, row="a text and its target")
        parts[name] = TextPart(list(zip(*(texts(table, column, empty=True) for column in columns), strict=True)), targets)
    return StoredTexts(told.classes, parts, told.notes)


def _text_columns(sheet: Sheet, targets: Sequence[str], spec: DataSection) -> tuple[str, ...]:
    """Return the columns of texts: those that the recipe names, or the only one."""
    names = sheet.schema.names
    if set(spec.text) <= set(names):
        return spec.text
    if spec.text != type(spec).model_fields["text"].default:
        require(sheet.place, spec.text, names)
    found = [field.name for field in sheet.schema if is_string(field.type) and field.name not in targets]
    if len(found) != 1:
        raise EectlError(
            f"{sheet.place}: no column 'text', and {len(found)} others hold texts; it has {listed_columns(names)}; set data.text "
            "(--text)"
        )
    return (str(found[0]),)


def _may_be_class(kind: Any) -> bool:
    from pyarrow import types

    return bool(types.is_integer(kind))


def stored_texts(spec: DataSection, download: bool) -> StoredTexts:
    """Return the texts of a recipe's data section as they are stored."""
    return load_hub_texts(spec, download) if spec.is_of_library else TEXT_DATASETS[spec.name](spec, download)


def _download_glue(task: str, folder: Path) -> None:
    """Store the library's copy (from its cache where it has one) as Parquet, a file at a time."""
    library = datasets_library(f"{GLUE_PREFIX}{task}")
    names = {"train": "train", "validation": "validation_matched" if task == "mnli" else "validation"}
    try:
        parts = {name: library.load_dataset("nyu-mll/glue", task, split=part) for name, part in names.items()}
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise EectlError(
            f"{GLUE_PREFIX}{task} cannot be downloaded ({reason}); put it in {folder} by hand, or try again"
        ) from error
    folder.mkdir(parents=True, exist_ok=True)
    for name in reversed(names):  # train last: with it the folder counts as complete
        with replacing(folder / f"{name}.parquet") as temporary:
            parts[name].to_parquet(str(temporary))


def _load_newsgroups(spec: DataSection, download: bool) -> StoredTexts:
    """Return 20 Newsgroups by date, from `20news-bydate-train/<group>/<post>` and `…-test/` in `data.root`.

    A download is scikit-learn's archive, unpacked; its pickled cache is not read. `data.strip` takes parts of posts out by
    scikit-learn's rules; whole posts are the default, since the paper names no stripping.
    """
    from sklearn.datasets import _twenty_newsgroups as published

    root = spec.folder
    folders = {"train": root / published.TRAIN_FOLDER, "test": root / published.TEST_FOLDER}
    if download and not folders["train"].is_dir():
        _download_newsgroups(root, published.ARCHIVE)
    rules = {
        "headers": published.strip_newsgroup_header,
        "footers": published.strip_newsgroup_footer,
        "quotes": published.strip_newsgroup_quoting,
    }
    chosen = [rule for name, rule in rules.items() if name in spec.strip]  # the order in which scikit-learn applies them
    return StoredTexts(NEWSGROUPS, {name: _posts(folder, chosen) for name, folder in folders.items()})


def _posts(folder: Path, rules: Sequence[Callable[[str], str]]) -> TextPart:
    """Return all posts of a folder by group and name; raises EectlError for a group that is missing or empty."""
    layout = "expected: 20news-bydate-train/<group>/<post> and 20news-bydate-test/ with the 20 groups; or give --download"
    posts: list[tuple[str, ...]] = []
    labels = []
    for label, group in enumerate(NEWSGROUPS):
        files = sorted(path for path in (folder / group).glob("*") if path.is_file()) if folder.is_dir() else []
        if not files:
            place = "no such folder" if not folder.is_dir() else f"no posts in {group}/"
            raise EectlError(f"{folder}: {place}; {layout}")
        for path in files:
            post = path.read_bytes().decode("latin1")  # as scikit-learn reads them; every byte is a character
            for rule in rules:
                post = rule(post)
            posts.append((post,))
            labels.append(label)
    return TextPart(posts, np.array(labels, dtype=np.int64))


def _download_newsgroups(root: Path, archive: Any) -> None:
    """Download the published archive, compare its checksum and unpack it into `root`."""
    root.mkdir(parents=True, exist_ok=True)
    packed = root / archive.filename
    try:
        with urllib.request.urlopen(archive.url, timeout=60) as answer:
            content = answer.read()
    except (urllib.error.URLError, OSError) as error:
        raise EectlError(f"20newsgroups cannot be downloaded from {archive.url} ({error}); put it in {root} by hand") from error
    if sha256(content).hexdigest() != archive.checksum:
        raise EectlError(f"20newsgroups: what {archive.url} gave is not the published archive; try again")
    packed.write_bytes(content)
    with tarfile.open(packed) as file:
        file.extractall(root, filter="data")
    packed.unlink()


TEXT_DATASETS: dict[str, Callable[[DataSection, bool], StoredTexts]] = in_order(
    TEXT_CHOICES,
    {
        "text": load_files,
        "20newsgroups": _load_newsgroups,
        **{name: partial(_load_glue, name.removeprefix(GLUE_PREFIX)) for name in TEXT_SETS if name.startswith(GLUE_PREFIX)},
    },
)
