"""Images that lie in a column of a table, as the datasets library and Parquet keep them, with their targets in others."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eectl.core.errors import EectlError
from eectl.data.arrow_tables import Sheet, is_bytes, is_picture, is_string, listed_columns, parquet_sheet, pyarrow, require
from eectl.data.encoded import MOST_ENCODED, Column
from eectl.data.folder import IMAGENET_MEAN, IMAGENET_STD, encoded_part, first_shape
from eectl.data.hub import hub_sheets
from eectl.data.images import StoredImages
from eectl.data.sheet_targets import sheet_targets, target_columns
from eectl.data.text_tables import find_table
from eectl.recipe.data_section import DataSection

PARQUET_NAMES = {"train": ("train",), "validation": ("val", "validation"), "calibration": ("calibration",), "test": ("test",)}


def load_hub_images(spec: DataSection, download: bool) -> StoredImages:
    """Return the images of a data set of the datasets library, hfds/NAME; raises EectlError as `images_of` does."""
    return images_of(hub_sheets(spec, download), spec)


def parquet_files(root: Path) -> dict[str, list[Path]]:
    """Return the Parquet files of each split in a folder, or the one file that `root` is; nothing where there are none."""
    if root.is_file():
        return {"train": [root]} if root.suffix == ".parquet" else {}
    found = {name: find_table(root, names) for name, names in PARQUET_NAMES.items()}
    return {name: paths for name, paths in found.items() if paths and paths[0].suffix == ".parquet"}


def load_parquet(files: Mapping[str, Sequence[Path]], spec: DataSection) -> StoredImages:
    """Return the images in Parquet files of one's own; raises EectlError as `images_of` does."""
    return images_of({name: parquet_sheet(paths) for name, paths in files.items()}, spec)


def images_of(sheets: Mapping[str, Sheet], spec: DataSection) -> StoredImages:
    """Return the images in a table for each split, with the targets that `sheet_targets` finds beside them.

    Raises:
        EectlError: for a table without the columns that are asked for, or with several that they may be; cells that are empty,
            too large, or no target; and a class that is not among those of the training rows.
    """
    train = sheets["train"]
    image = _image_column(train, spec)
    told = sheet_targets(sheets, spec.model_copy(update={"target": target_columns(train, spec, _may_be_class)}), row="a picture")
    parts = {}
    shape: tuple[int, int, int] | None = None
    for name, targets in told.targets.items():
        encoded = _pictures(sheets[name], image)
        shape = shape or first_shape(encoded, spec)
        parts[name] = encoded_part(encoded, targets, shape, spec, resize=spec.image_size is not None)
    return StoredImages(told.classes, IMAGENET_MEAN, IMAGENET_STD, parts, told.notes)


def _image_column(sheet: Sheet, spec: DataSection) -> str:
    """Return the column that holds the images."""
    there = [field.name for field in sheet.schema if is_picture(field.type)]
    if spec.image is not None:
        require(sheet.place, [spec.image], sheet.schema.names)
        if spec.image not in there:
            kind = sheet.schema.field(spec.image).type
            raise EectlError(
                f"{sheet.place}: column '{spec.image}' holds {str(kind)[:80]}, not the bytes of pictures; name another"
            )
        return spec.image
    if len(there) != 1:
        texts = "; for texts set data.kind=texts, or data.text" if spec.is_of_library and not there else ""
        found = f"{len(there)} columns that may hold the images ({listed_columns(there)})" if there else "no column of images"
        columns = "" if there else f" among {listed_columns(sheet.schema.names)}"
        raise EectlError(f"{sheet.place}: {found}{columns}; set data.image to one with the bytes of pictures{texts}")
    return str(there[0])


def _may_be_class(kind: Any) -> bool:
    from pyarrow import types

    return is_string(kind) or bool(types.is_integer(kind))


def _pictures(sheet: Sheet, image: str) -> Column:
    """Return the pictures of a table."""
    arrow = pyarrow(sheet.place)
    import pyarrow.compute as compute

    require(sheet.place, [image], sheet.schema.names)
    table = sheet.read([image])
    if not is_picture(table.schema.field(image).type):
        raise EectlError(f"{sheet.place}: column '{image}' holds no pictures here; write it as in the training split")
    cells = table.column(image)
    cells = cells if is_bytes(cells.type) else compute.struct_field(cells, "bytes")
    column = Column(sheet.place, cells, np.arange(table.num_rows))
    if cells.null_count:
        row = int(compute.index(compute.is_null(cells), arrow.scalar(True)).as_py())
        fault = f"no picture in column '{image}', at most a path, and no file is opened that a table names"
        raise EectlError(f"{sheet.place}: row {row + 1}: {fault}; save the data set again with the pictures in it")
    lengths = compute.binary_length(cells)
    if compute.max(lengths).as_py() > MOST_ENCODED:
        row = int(compute.index(lengths, compute.max(lengths)).as_py())
        raise EectlError(f"{column.path(row)}: a picture of more than {MOST_ENCODED >> 20} MiB; make it smaller or take it out")
    return column
