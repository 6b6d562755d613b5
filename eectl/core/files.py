"""Write files whole or not at all, and turn what the operating system refuses into one line.

A file is written under another name and then renamed, so it is never there half-written. What stands in it is not known here.
"""

import contextlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from eectl.core.errors import EectlError


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` to write to; it then replaces `path` in one step, or on failure leaves it as it was.

    Missing folders are made. Raises EectlError where nothing can be written there or the disk is full.
    """
    with writing(path):
        temporary = make_beside(path)
        try:
            yield temporary
            put_in_place(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError of the block into an EectlError that `path` cannot be written."""
    try:
        yield
    except OSError as error:
        raise EectlError(
            f"{path}: cannot be written ({error.strerror or error}); nothing was changed; free some space or name another place"
        ) from error


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn an OSError of the block into an EectlError that `path` cannot be read."""
    try:
        yield
    except OSError as error:
        raise EectlError(f"{path}: cannot be read ({error.strerror or error})") from error


def make_beside(path: Path) -> Path:
    """Make an empty file in the folder of `path`, under a name of its own that begins with a dot; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    return Path(name)


def put_in_place(temporary: Path, path: Path) -> None:
    """Replace `path` by a file that has been written, in one step and on the disk, with the usual permissions."""
    with open(temporary, "rb") as written:
        os.fsync(written.fileno())
    os.chmod(temporary, 0o666 & ~_umask())
    os.replace(temporary, path)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def check_outputs(outputs: Sequence[Path | None], *, inputs: Sequence[Path | None], overwrite: bool) -> None:
    """Raise EectlError where an output exists without `--overwrite`, is one of the inputs, or is named twice; None is no file."""
    given = [path.resolve() for path in inputs if path is not None]
    seen: set[Path] = set()
    for path in outputs:
        if path is None:
            continue
        if path.resolve() in given:
            raise EectlError(f"{path} is read by this command and cannot be written by it; give the output another name")
        if path.resolve() in seen:
            raise EectlError(f"{path} is named for two outputs; give each its own name")
        if path.exists() and not overwrite:
            raise EectlError(f"{path} exists; give another name, or --overwrite to replace it")
        seen.add(path.resolve())


def unreadable(path: Path, error: OSError) -> EectlError:
    """Return the error for a file that the system cannot read."""
    return EectlError(f"{path}: cannot be read ({error.strerror or error})")


def as_path(path: str | Path | None) -> Path | None:
    """Return a path that a caller gave as text or as a Path, None where none was given."""
    return None if path is None else Path(path)
