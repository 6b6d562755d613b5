"""The tables of `hfds/NAME`: a data set of the datasets library, on the hub or in its cache, or in a folder.

No code of a data set is run, no cell names a file to open, and the network is used only where a download was asked for.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from eectl.core.errors import EectlError, visible
from eectl.core.files import read_text, reading
from eectl.core.json_files import parse_json
from eectl.data.arrow_tables import SPLIT_NAMES, ArrowSheet, Sheet, check_end, mapped_sheet, parquet_sheet
from eectl.data.text_tables import check_parts, find_table
from eectl.recipe.choices import HUB_PREFIX
from eectl.recipe.data_paths import expand
from eectl.recipe.data_section import DataSection

SAVED = "dataset_dict.json, state.json, train*.arrow or train*.parquet"


def hub_sheets(spec: DataSection, download: bool) -> dict[str, Sheet]:
    """Return the table of each split that a data set of the datasets library has.

    Raises:
        EectlError: for a data set that is not there, or damaged, or has no training split.
    """
    own = spec.name.removeprefix(HUB_PREFIX)
    sheets = _of_folder(expand(own), spec) if own.startswith((".", "/", "~")) else _of_hub(own, spec, download)
    found: dict[str, Sheet] = {}
    for split, names in SPLIT_NAMES.items():
        there = [name for name in names if name in sheets]
        if len(there) > 1:
            raise EectlError(f"{spec.name}: its splits {' and '.join(there)} mean the same; keep one")
        if there:
            found[split] = sheets[there[0]]
    if "train" not in found:
        raise EectlError(f"{spec.name}: there is no split train in it, but {_listed(sheets)}; save one under that name")
    return found


def _of_hub(own: str, spec: DataSection, download: bool) -> dict[str, Sheet]:
    """Return the splits of a data set on the hub: from the library's cache, unless a download was asked for."""
    library = datasets_library(spec.name)
    if Path(own).is_dir():
        raise EectlError(f"data.name is '{spec.name}', and there is a folder {own}; hfds/./{own} names it, so move one of them")
    old = {"trust_remote_code": False} if int(library.__version__.split(".")[0]) < 4 else {}  # later ones have no scripts
    try:
        with quiet(library, offline=not download):
            splits = library.load_dataset(own, spec.variant, **old)
    except Exception as error:  # the library's, the hub's, Arrow's, and whatever damaged files lead to
        reason = visible(" ".join(str(error).split()))[:160]
        advice = (
            "look at its name, and at data.variant for one with several configurations"
            if download
            else "give --download, or set data.variant where it has several configurations"
        )
        where = "cannot be fetched" if download else "is not in the cache of the datasets library"
        raise EectlError(f"{spec.name}: {where} ({reason}); {advice}") from error
    return {name: _sheet(splits[name], Path(own, name)) for name in splits}


def _sheet(split: Any, place: Path) -> ArrowSheet:
    """Return the table of a data set of the library's; raises EectlError where one of its files is cut short."""
    for file in split.cache_files:
        check_end(Path(file["filename"]))
    return ArrowSheet(place, split.with_format("arrow")[:])


def _of_folder(folder: Path, spec: DataSection) -> dict[str, Sheet]:
    """Return the splits in a folder: what save_to_disk wrote, or Arrow or Parquet files named by split."""
    with reading(folder):
        is_folder = folder.is_dir()
    if not is_folder:
        raise EectlError(f"data.name is '{spec.name}': no such folder; expected in it: {SAVED}")
    if spec.variant is not None:
        raise EectlError(f"data.variant is '{spec.variant}', and {spec.name} is a folder; name the folder of that configuration")
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return saved_sheets(folder)
    for place in (folder, folder / "data"):
        sheets: dict[str, Sheet] = {}
        for name in (name for names in SPLIT_NAMES.values() for name in names):
            parquet = [path for path in find_table(place, [name]) if path.suffix == ".parquet"] if place.is_dir() else []
            arrow = sorted({*place.glob(f"{name}.arrow"), *place.glob(f"{name}-[0-9]*.arrow"), *place.glob(f"*-{name}.arrow")})
            if parquet and arrow:
                raise EectlError(f"{place}: {parquet[0].name} and {arrow[0].name} mean the same split; keep one")
            check_parts(arrow)
            if parquet or arrow:
                sheets[name] = parquet_sheet(parquet) if parquet else mapped_sheet(arrow)
        if sheets:
            return sheets
    there = sorted(path.name for path in folder.iterdir())[:4]
    raise EectlError(f"data.name is '{spec.name}': no data set in it ({_listed(there)}); expected: {SAVED}")


def saved_sheets(folder: Path) -> dict[str, Sheet]:
    """Return what save_to_disk wrote, mapped from its files; raises EectlError where it is damaged or names other files."""
    library = datasets_library(folder)
    _check_saved(folder)
    try:
        with quiet(library, offline=True):
            saved = library.load_from_disk(str(folder))
        splits = saved if isinstance(saved, Mapping) else {"train": saved}
        return {name: _sheet(splits[name], folder / name) for name in splits}
    except EectlError:
        raise
    except Exception as error:  # the library's, Arrow's, and whatever a damaged description leads to
        reason = visible(" ".join(str(error).split()))[:120]
        raise EectlError(f"{folder}: not what save_to_disk of the datasets library wrote ({reason}); save it again") from error


def _check_saved(folder: Path) -> None:
    """Raise EectlError where a description names files that lie elsewhere."""
    for path in [*folder.glob("state.json"), *sorted(folder.glob("*/state.json"))]:
        state = parse_json(read_text(path), where=path)
        files = state.get("_data_files") if isinstance(state, dict) else None
        names = [each.get("filename") for each in files if isinstance(each, dict)] if isinstance(files, list) else []
        if not names or any(not isinstance(name, str) or name != Path(name).name for name in names):
            raise EectlError(f"{path}: names no files, or others than those beside it; save the data set again")


def datasets_library(place: object) -> Any:
    """Return the datasets library; raises EectlError where it is not installed."""
    try:
        import datasets
    except ImportError as error:
        raise EectlError(f"{place}: this needs the datasets library; run pip install 'eectl[text]'") from error
    return datasets


@contextmanager
def quiet(library: Any, *, offline: bool) -> Iterator[None]:
    """Keep the library off stderr, and off the network with `offline`, while the block runs."""
    config, keys = library.config, ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
    before = {key: getattr(config, key) for key in keys if hasattr(config, key)}
    shows = library.is_progress_bar_enabled()
    level = library.logging.get_verbosity()
    library.disable_progress_bar()
    library.logging.set_verbosity_error()
    try:
        for key in before if offline else ():
            setattr(config, key, True)
        yield
    finally:
        for key, value in before.items():
            setattr(config, key, value)
        library.logging.set_verbosity(level)
        if shows:
            library.enable_progress_bar()


def _listed(names: Collection[str]) -> str:
    return ", ".join(visible(name)[:40] for name in list(names)[:4]) or "nothing"
