"""Targets in tables of Parquet and Arrow: which columns they are, and classes by the names that the datasets library gives them.

What the cells mean is `targets`' business.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from eectl.core.errors import EectlError, visible
from eectl.data.arrow_tables import Sheet, is_list, listed_columns, require, table_of
from eectl.data.targets import classes_in, read_targets
from eectl.data.text_tables import Table, class_cells, classes_among
from eectl.recipe.data_section import MOST_TARGETS, DataSection

MOST_CLASSES = 10**6
_LISTS = ("Sequence", "List", "LargeList")  # what the library calls a column of lists


@dataclass(frozen=True)
class SheetTargets:
    """The classes of a data set, levels and labels included, and the targets of each split that tells them.

    `notes` say which splits do not, and which classes no training row has.
    """

    classes: tuple[str, ...]
    targets: dict[str, NDArray[Any]]
    notes: tuple[str, ...]


def sheet_targets(sheets: Mapping[str, Sheet], spec: DataSection, *, row: str) -> SheetTargets:
    """Return the targets in the columns `spec.targets` of each split's table, `train` among them, as `read_targets` gives them.

    Classes are those of the training rows, in the library's order where it names them; labels all that it names. A split whose
    classes are hidden is left out. `row` says in words what a row is.

    Raises:
        EectlError: for columns that are not there, cells that will not do, and classes that the training rows do not have.
    """
    train, target = sheets["train"], spec.targets[0]
    known = class_columns(train.schema).get(target) if len(spec.targets) == 1 and spec.task != "regression" else None
    tables = {name: table_of(sheet, spec.targets, row=f"{row} and its {target}") for name, sheet in sheets.items()}
    if known is None:
        classes = classes_in(tables["train"], spec)
        return SheetTargets(classes, {name: read_targets(table, spec, classes) for name, table in tables.items()}, ())
    named = {name: _named(table, target, known, spec) for name, table in tables.items()}
    hidden = sorted(
        name for name, table in named.items() if name != "train" and all(cell is None for cell in table.columns[target])
    )
    told = {name: table for name, table in named.items() if name not in hidden}
    for table in told.values():
        _check_told(table, target)
    notes = [f"{spec.name}: the classes of its {name} split are not told, so it is left out" for name in hidden]
    if spec.task == "multilabel":
        classes = tuple(dict.fromkeys(known))
        if len(classes) > MOST_TARGETS:
            raise EectlError(f"{train.place}: column '{target}' has {len(classes):,} labels; at most {MOST_TARGETS:,} are taken")
    elif spec.levels is not None:
        classes = spec.levels
    else:
        classes = classes_among(told["train"].columns[target], known, train.place, target)
        if unused := [each for each in known if each not in classes]:
            shown = ", ".join(map(visible, unused[:3])) + ", …" * (len(unused) > 3)
            notes.append(f"{spec.name}: no training row is of class {shown}")
    return SheetTargets(classes, {name: read_targets(table, spec, classes) for name, table in told.items()}, tuple(notes))


def _named(table: Table, target: str, known: Sequence[str], spec: DataSection) -> Table:
    """Return a table with the names of classes in place of their numbers, and None where the class is hidden."""
    if spec.task != "multilabel":
        return Table(table.path, {target: class_cells(table, target, known)})
    cells = []
    for row, value in enumerate(table.columns[target]):
        numbers = value if isinstance(value, list) else [value]
        wrong = [each for each in numbers if type(each) is not int or not 0 <= each < len(known)]
        if wrong:
            raise EectlError(
                f"{table.where(row)}: column '{target}' has {wrong[0]!r:.80} among its labels, and its {len(known)} labels count "
                "from 0"
            )
        cells.append([known[each] for each in numbers])
    return Table(table.path, {target: cells})


def _check_told(table: Table, target: str) -> None:
    """Raise EectlError where some row's class is hidden, and not all are."""
    row = next((row for row, cell in enumerate(table.columns[target]) if cell is None), None)
    if row is not None:
        raise EectlError(f"{table.where(row)}: column '{target}' is not told; take the row out")


def class_columns(schema: Any) -> Mapping[str, tuple[str, ...]]:
    """Return the columns that the datasets library marked as classes, or as lists of classes, each with the classes' names.

    Raises EectlError where what it wrote beside the schema is damaged.
    """
    stored = (schema.metadata or {}).get(b"huggingface", b"{}")
    try:
        features = json.loads(stored).get("info", {}).get("features", {})
        found = {name: _class_names(_element(feature)) for name, feature in features.items()}
    except (ValueError, RecursionError, AttributeError) as error:
        fault = f"what the datasets library wrote beside the columns is damaged ({visible(str(error))[:80]})"
        raise EectlError(f"{fault}; save it again") from error
    return {name: names for name, names in found.items() if names and name in schema.names}


def _element(feature: Any) -> Any:
    """Return what a column has in each cell, or in the list in each: the library writes lists in two ways."""
    if isinstance(feature, list) and len(feature) == 1:
        return feature[0]
    return feature.get("feature") if isinstance(feature, dict) and feature.get("_type") in _LISTS else feature


def _class_names(feature: Any) -> tuple[str, ...]:
    """Return the names of classes that a feature of the library's has, none where it is of another kind."""
    names = feature.get("names") if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" else None
    is_named = isinstance(names, list) and 0 < len(names) <= MOST_CLASSES and all(isinstance(name, str) for name in names)
    return tuple(names) if isinstance(names, list) and is_named else ()


def target_columns(sheet: Sheet, spec: DataSection, may_be_class: Callable[[Any], bool]) -> tuple[str, ...]:
    """Return the columns to predict: those that the recipe names, or the only one that there may be.

    That is one that the library marked as classes, or as lists of them, else one of a type that the task may have;
    `may_be_class` says it of classes. Raises EectlError where there is no such column, or more than one.
    """
    names, is_default = sheet.schema.names, spec.target == type(spec).model_fields["target"].default
    if not is_default or spec.target in names:
        require(sheet.place, spec.targets, names)
        return spec.targets
    wanted = {"multilabel": is_list, "regression": _is_fraction}.get(spec.task, may_be_class)
    there = [field.name for field in sheet.schema if wanted(field.type)]
    marked = [name for name in class_columns(sheet.schema) if name in there]
    found = marked or there
    if len(found) != 1:
        raise EectlError(
            f"{sheet.place}: no column 'label', and {len(found)} others may be the target; it has {listed_columns(names)}; set "
            "data.target (--target)"
        )
    return (str(found[0]),)


def _is_fraction(kind: Any) -> bool:
    from pyarrow import types

    return bool(types.is_floating(kind))
