"""metrics.jsonl: one row an epoch, written while a run trains and read again. Knows no run folder and draws nothing.

It is a log: a row that is damaged or missing stops no training, and is said.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from eectl.core.errors import EectlError
from eectl.core.files import reading, replacing
from eectl.core.json_files import clean_json, parse_json

LONGEST_ROW, LARGEST = 2**20, 2**28  # bytes of a row and of the file; a row of 34 exits with gradient dominance takes 30,000
Number = Annotated[float, Field(strict=True)] | None  # JSON's null is NaN
Counted = Annotated[int, Field(ge=0, strict=True)]


class TrackedEpoch(BaseModel):
    """An epoch's gradient dominance; the lists follow `exits`."""

    model_config = ConfigDict(extra="allow")

    exits: list[Counted]
    cosine: list[Number]
    prefix_cosine: list[Number]
    norms: list[list[Number]]
    batches: Counted
    every: Counted


class MetricsRow(BaseModel):
    """An epoch's row. Keys that a newer eectl adds stay."""

    model_config = ConfigDict(extra="allow")

    phase: Counted
    epoch: Counted
    step: Counted
    lr: Number
    train_loss: list[Number]
    validation_loss: list[Number]
    validation_score: list[Number]
    validation_balanced: list[Number] | None = None
    improved: Annotated[bool, Field(strict=True)]
    seconds: Number
    gradient_dominance: TrackedEpoch | None = None


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Append one row; raises EectlError where it cannot be written."""
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(clean_json(row)) + "\n")
    except OSError as error:
        raise EectlError(f"{path}: cannot be written ({error.strerror}); free some space and --resume") from error


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return all rows, none where there is no file; raises EectlError for the first that is damaged."""
    rows = []
    if path.exists():
        for number, line in enumerate(_lines(path), 1):
            row = _row(line)
            if row is None:
                raise EectlError(f"{path}: line {number} is no row of an epoch; take it out, or train again")
            rows.append(row)
    return rows


def keep_rows(path: Path, epochs: Sequence[tuple[int, int]]) -> int:
    """Cut a file to the rows of these epochs (phase and epoch, each once), in this order; returns how many it does not have.

    Rows that are younger, run together or damaged go. The file stays as it is where it has nothing else.
    """
    if not path.exists():
        return len(epochs)
    found: dict[tuple[int, int], bytes] = {}
    known, whole = set(epochs), True
    for line in _lines(path):
        row = _row(line)
        key = (row["phase"], row["epoch"]) if row else None
        whole = whole and key in known and key not in found
        if key is not None:
            found.setdefault(key, line)
    kept = [found[key] for key in epochs if key in found]
    if not whole or kept != list(found.values()):
        with replacing(path) as temporary:
            temporary.write_bytes(b"".join(line + b"\n" for line in kept))
    return len(epochs) - len(kept)


def _lines(path: Path) -> Iterator[bytes]:
    """Yield the lines without their ends, long ones cut; raises EectlError for what is no file, or too large for one."""
    with reading(path), open(path, "rb") as file:
        if not path.is_file() or path.stat().st_size > LARGEST:
            raise EectlError(
                f"{path}: a device, or larger than {LARGEST >> 20} MiB, which metrics of a run are not; take it away"
            )
        while line := file.readline(LONGEST_ROW):
            yield line.removesuffix(b"\n")


def _row(line: bytes) -> dict[str, Any] | None:
    """Return a line's row, None where it is none."""
    try:
        row = parse_json(line.decode(), where="")
        MetricsRow.model_validate(row)
    except (EectlError, UnicodeDecodeError, ValidationError):
        return None
    return dict(row)
