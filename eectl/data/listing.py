"""Images of a folder that a file lists with their targets: labels, numbers or levels. Decoding is `images`' business.

The file is `metadata.csv` (or .tsv, .jsonl, .parquet) beside the images, with a column `file_name`, as the `datasets` library
reads a folder of images.
"""

from collections.abc import Mapping
from pathlib import Path

from eectl.core.errors import EectlError
from eectl.core.files import reading
from eectl.data.encoded import Files
from eectl.data.folder import FOLDERS, IMAGENET_MEAN, IMAGENET_STD, LISTED, encoded_part, first_shape, only_folder
from eectl.data.images import StoredImages
from eectl.data.pictures import EXTENSIONS, shown_path
from eectl.data.targets import classes_in, read_targets
from eectl.data.text_tables import READERS, Table, find_table, read_table, texts
from eectl.recipe.data_section import DataSection

FILE_NAME = "file_name"  # the column of a path, from the folder of the file that lists it
STEM = "metadata"


def is_listed(spec: DataSection) -> bool:
    """Return whether a file lists the images of a folder: one is there, and class folders cannot say the target or do not."""
    with reading(spec.folder):
        is_there = any(find_table(folder, (STEM,)) for folder in (spec.folder / "train", spec.folder))
    return is_there and (spec.task != "classification" or spec.target != type(spec).model_fields["target"].default)


def load_listed(spec: DataSection) -> StoredImages:
    """Return the images under `data.root` that `train/metadata.csv` lists, with `val/` and `test/` where they are there.

    A root with none of these folders holds the file itself. Raises EectlError for another layout, a path that leaves its folder
    or is no image, and cells that will not do.
    """
    tables = {name: read_table(files, [FILE_NAME, *spec.targets]) for name, files in _find(spec).items()}
    classes = classes_in(tables["train"], spec)
    files = {name: Files(tuple(_paths(table)), spec.folder) for name, table in tables.items()}
    shape = first_shape(files["train"], spec)
    parts = {
        name: encoded_part(files[name], read_targets(table, spec, classes), shape, spec, resize=spec.image_size is not None)
        for name, table in tables.items()
    }
    return StoredImages(classes, IMAGENET_MEAN, IMAGENET_STD, parts)


def _find(spec: DataSection) -> Mapping[str, list[Path]]:
    """Return the files that list each part."""
    root = spec.folder
    kinds, columns = (", ".join(names) for names in ((kind[1:] for kind in READERS), (FILE_NAME, *spec.targets)))
    layout = f"expected: train/{STEM}.csv (or {kinds}) with columns {columns}, beside the images"
    with reading(root):
        is_folder = root.is_dir()
    if not is_folder:
        raise EectlError(f"data.root is '{root}': no such folder; {layout}")
    folders = {name: folder for name, names in FOLDERS.items() if (folder := only_folder(root, names)) is not None}
    folders = folders or {"train": root}
    found = {name: find_table(folder, (STEM,)) for name, folder in folders.items()}
    missing = [folders[name] for name, files in found.items() if not files]
    if "train" not in found or missing:
        raise EectlError(f"{shown_path(missing[0] if missing else root / 'train')}: no {STEM} file in it; {layout}")
    return found


def _paths(table: Table) -> list[Path]:
    """Return the images that a table names; raises EectlError for a path that leaves its folder, and for what is no image."""
    folder, found = table.path.parent, []
    for row, name in enumerate(texts(table, FILE_NAME)):
        path = Path(name)
        if path.is_absolute() or ".." in path.parts:
            raise EectlError(f"{table.where(row)}: '{shown_path(path)}' leads out of the folder; name images below it")
        if not name.lower().endswith(EXTENSIONS):
            raise EectlError(f"{table.where(row)}: '{shown_path(path)}' is no image; {LISTED} are read")
        with reading(folder / path):
            is_file = (folder / path).is_file()
        if not is_file:
            raise EectlError(
                f"{table.where(row)}: no image '{shown_path(path)}' in {shown_path(folder)}; mend the row or take it out"
            )
        found.append(folder / path)
    return found
