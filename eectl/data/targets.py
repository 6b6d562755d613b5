"""Columns of a table as what a network is to predict: classes, levels, sets of labels, numbers. Every complaint names its row."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eectl.core.errors import EectlError, visible
from eectl.data.text_tables import Table, names_of, numbers, sorted_classes
from eectl.recipe.choices import TASK_CHOICES, in_order
from eectl.recipe.data_section import MOST_TARGETS, DataSection
from eectl.recipe.text_sets import TEXT_SETS

MOST_FRACTIONS = 20  # more different numbers with fractions than this are the values of a regression, not classes
MOST_CELLS = 2**30  # rows times labels: 4 GiB
BETWEEN = "|"  # labels of a cell that is a text
_SHOWN = 80  # characters of a name in a message


def classes_in(table: Table, spec: DataSection) -> tuple[str, ...]:
    """Return the classes, levels or labels of a training table's target, none for numbers; raises EectlError for too few."""
    return _CLASSES[spec.task](table, spec)


def read_targets(table: Table, spec: DataSection, classes: Sequence[str]) -> NDArray[Any]:
    """Return the targets of a table's rows; raises EectlError for a class that is not among `classes`, and for odd cells.

    Returns:
        Classes and levels: int64 [row]. Labels: float32 [row, label] of 0 and 1. Numbers: float64 [row], or of several targets
        [row, target].
    """
    return _TARGETS[spec.task](table, spec, classes)


def _no_classes(table: Table, spec: DataSection) -> tuple[str, ...]:  # noqa: ARG001
    return ()


def _classes(table: Table, spec: DataSection) -> tuple[str, ...]:
    target = spec.targets[0]
    names = names_of(table, target)
    classes = sorted_classes(names)
    if len(classes) < 2:
        raise EectlError(f"{table.path}: {table.noun} '{target}' has the one class '{classes[0]:.80}'; two or more are needed")
    if _are_values(classes, len(names)):
        raise EectlError(
            f"{table.path}: {table.noun} '{target}' has {len(classes)} different numbers in {len(names)} rows, which are no "
            "classes; set data.task to regression (--task regression)"
        )
    return classes


def _are_values(classes: Sequence[str], rows: int) -> bool:
    """Return whether the `classes` of a column are a number's values: half as many as rows, or more than 20 with fractions."""
    try:
        values = [float(name) for name in classes]
    except ValueError:
        return False
    fractions = any(not number.is_integer() for number in values)
    return 2 * len(classes) > rows or (fractions and len(classes) > MOST_FRACTIONS)


def _levels(table: Table, spec: DataSection) -> tuple[str, ...]:
    """Return the levels in their order: those that the recipe names, or whole numbers."""
    target = spec.targets[0]
    levels = spec.levels or sorted_classes(names_of(table, target))
    if len(levels) < 2:
        raise EectlError(
            f"{table.path}: {table.noun} '{target}' has the one level '{levels[0]:.{_SHOWN}}'; two or more are needed"
        )
    odd = [name for name in levels if not name.removeprefix("-").isdecimal()] if spec.levels is None else []
    if odd:
        raise EectlError(
            f"{table.path}: {table.noun} '{target}' has levels such as '{odd[0]:.{_SHOWN}}', whose order is not known; name them "
            "in their order, as --set data.levels=[low, mid, high]"
        )
    if len(levels) > MOST_TARGETS:
        raise EectlError(f"{table.path}: {table.noun} '{target}' has {len(levels):,} levels; set data.task to regression")
    return tuple(levels)


def _labels(table: Table, spec: DataSection) -> tuple[str, ...]:
    """Return the labels there are: the columns, or what the cells of the one column name, sorted."""
    if len(spec.targets) > 1:
        return spec.targets
    width = _flags_in(table, spec.targets[0])
    if width is not None:
        labels = tuple(map(str, range(width)))
    else:
        labels = sorted_classes(name for names in _label_sets(table, spec.targets[0]) for name in names)
    if not labels or len(labels) > MOST_TARGETS:
        raise EectlError(
            f"{table.path}: {table.noun} '{spec.targets[0]}' names {len(labels):,} labels, and 1 to {MOST_TARGETS:,} are taken; "
            f"a cell is a list of labels, or a text such as a{BETWEEN}b"
        )
    return labels


def _label_sets(table: Table, name: str) -> list[list[str]]:
    """Return the labels in each cell of a column: a list, or a text with | between labels; an empty one has none."""
    found = []
    for row, value in enumerate(table.columns[name]):
        if isinstance(value, str):
            value = [part.strip() for part in value.split(BETWEEN)] if value.strip() else []
        if not isinstance(value, list):
            what = "is empty" if value is None else f"is {value!r:.{_SHOWN}}, neither a list nor a text"
            raise EectlError(f"{table.where(row)}: {table.noun} '{name}' {what}; give labels as a list, or as a{BETWEEN}b")
        if not all(isinstance(each, str) for each in value) and len(set(map(repr, value))) < len(value):
            raise EectlError(
                f"{table.where(row)}: {table.noun} '{name}' is {value!r:.{_SHOWN}}, which names a label twice; lists of 0 and 1, "
                "one for each label, have the same length in all rows, and two of them are given as 0.0 and 1.0"
            )
        labels = [str(each) if type(each) is int else each for each in value]
        wrong = [each for each in labels if not isinstance(each, str) or not each]
        if wrong:
            raise EectlError(f"{table.where(row)}: {table.noun} '{name}' has {wrong[0]!r:.{_SHOWN}} among its labels; give texts")
        found.append(labels)
    return found


def _flags_in(table: Table, name: str) -> int | None:
    """Return the length of a column's lists where they have a 0 or a 1 for each label; None where they name labels.

    They are lists of one length in which all values are 0 or 1. Whole numbers may also be labels called 0 and 1, of which a row
    names each once: lists of up to two of these are taken for names.
    """
    cells = table.columns[name]
    width = len(cells[0]) if isinstance(cells[0], list) else 0
    if not all(isinstance(cell, list) and len(cell) == width and _are_flags(cell) for cell in cells):
        return None
    is_sure = width > 2 or any(type(each) is not int for cell in cells for each in cell)
    return width if width and is_sure else None


def _are_flags(cell: Sequence[Any]) -> bool:
    return all(isinstance(each, int | float) and each in (0, 1) for each in cell)


def _class_targets(table: Table, spec: DataSection, classes: Sequence[str]) -> NDArray[np.int64]:
    target = spec.targets[0]
    index = {name: label for label, name in enumerate(classes)}
    if spec.name in TEXT_SETS:  # labels may be numbers, as in the library's files
        index |= {str(label): label for label in range(len(classes))}
    names = names_of(table, target)
    return np.array([_place(index, name, table, row, target) for row, name in enumerate(names)], dtype=np.int64)


def _place(index: Mapping[str, int], name: str, table: Table, row: int, target: str) -> int:
    """Return a class's number; raises EectlError where there is no such class."""
    if name not in index:
        known = list(index)
        listed = ", ".join(visible(each)[:_SHOWN] for each in known[:5]) + (", …" if len(known) > 5 else "")
        raise EectlError(
            f"{table.where(row)}: {table.noun} '{target}' is '{visible(name)[:_SHOWN]}', which is not among the {len(known)} "
            f"classes ({listed})"
        )
    return index[name]


def _label_targets(table: Table, spec: DataSection, classes: Sequence[str]) -> NDArray[np.float32]:
    if len(spec.targets) > 1:
        return np.stack([_flags(table, name) for name in spec.targets], axis=1)
    index, target = {name: label for label, name in enumerate(classes)}, spec.targets[0]
    rows = len(table.columns[target])
    if rows * len(classes) > MOST_CELLS:
        raise EectlError(
            f"{table.path}: {len(classes):,} labels for {rows:,} rows, over {MOST_CELLS:,} in all; take fewer labels"
        )
    width = _flags_in(table, target)
    if width == len(classes):
        return np.array(table.columns[target], dtype=np.float32)
    if width is not None:
        raise EectlError(
            f"{table.where(0)}: {table.noun} '{target}' has {width:,} numbers, and the training rows have {len(classes):,} "
            "labels; give one for each label"
        )
    found = np.zeros((rows, len(classes)), dtype=np.float32)
    for row, names in enumerate(_label_sets(table, target)):
        found[row, [_place(index, name, table, row, target) for name in names]] = 1
    return found


def _flags(table: Table, name: str) -> NDArray[np.float32]:
    """Return a column of 0 and 1, or of truth values; raises EectlError for another cell."""
    found = np.empty(len(table.columns[name]), dtype=np.float32)
    for row, value in enumerate(table.columns[name]):
        flag = _FLAGS.get(value) if isinstance(value, str | int | float) else None
        if flag is None:
            raise EectlError(f"{table.where(row)}: {table.noun} '{name}' is {value!r:.{_SHOWN}}; a column of a label is 0 or 1")
        found[row] = flag
    return found


def _number_targets(table: Table, spec: DataSection, classes: Sequence[str]) -> NDArray[np.float64]:  # noqa: ARG001
    columns = [numbers(table, name) for name in spec.targets]
    return columns[0] if len(columns) == 1 else np.stack(columns, axis=1)


_FLAGS: dict[Any, int] = {0: 0, 1: 1, "0": 0, "1": 1, "0.0": 0, "1.0": 1, "true": 1, "false": 0, "True": 1, "False": 0}
_CLASSES: dict[str, Callable[[Table, DataSection], tuple[str, ...]]] = in_order(
    TASK_CHOICES,
    {"classification": _classes, "regression": _no_classes, "multilabel": _labels, "ordinal": _levels},
)
_TARGETS: dict[str, Callable[[Table, DataSection, Sequence[str]], NDArray[Any]]] = in_order(
    TASK_CHOICES,
    {"classification": _class_targets, "regression": _number_targets, "multilabel": _label_targets, "ordinal": _class_targets},
)
