"""Write files whole or not at all, and turn what the operating system refuses into one line.

A file is written under another name, brought onto the disk, and then renamed, so it is never there half-written. What stands in
it is not known here.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import secrets
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TextIO

from eectl.core.errors import EectlError, advice

MOST_BYTES = 16 * 2**20  # of a file that is read as text: eectl's own are far smaller
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)  # of file systems on which nothing can be locked


def sync(handle: int) -> None:
    """Bring an open file or folder onto the disk. All that eectl writes passes here, so that tests can stop or fail it."""
    os.fsync(handle)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError of the block into an EectlError that `path` cannot be written."""
    try:
        yield
    except OSError as error:
        raise EectlError(
            f"{path}: cannot be written ({error.strerror or error}); nothing was changed; {advice(error)}"
        ) from error


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn an OSError of the block into an EectlError that `path` cannot be read."""
    try:
        yield
    except OSError as error:
        raise EectlError(f"{path}: cannot be read ({error.strerror or error}); {advice(error)}") from error


@contextlib.contextmanager
def replacing(path: Path, *, overwrite: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside `path` to write to; it then replaces `path` in one step, or on failure leaves it as it was.

    Missing folders are made.

    Args:
        path: the file.
        overwrite: whether a file that is there gives way, or one that came while the block ran is an error.

    Raises:
        EectlError: where nothing can be written there or the disk is full.
    """
    with replacing_all([path], overwrite=overwrite) as (temporary,):
        yield temporary


@contextlib.contextmanager
def replacing_all(paths: Sequence[Path], *, overwrite: bool = True) -> Iterator[list[Path]]:
    """Yield temporary paths to write to; they then replace all `paths`, or on failure all of these stay as they were.

    Args:
        paths: the files, each once.
        overwrite: as in `replacing`.

    Raises:
        EectlError: where one of them cannot be written.
    """
    with contextlib.ExitStack() as stack:
        temporaries = [stack.enter_context(beside(path)) for path in paths]
        with writing(paths[0]) if len(paths) == 1 else writing(Path(", ".join(map(str, paths)))):
            yield temporaries
            put_all_in_place(temporaries, paths, overwrite=overwrite)


def write_all(contents: Mapping[Path, bytes | str], *, overwrite: bool = True) -> None:
    """Write small files, all of them or none; text as `open_text` writes it.

    Args:
        contents: what each file is to hold.
        overwrite: as in `replacing`.

    Raises:
        EectlError: where one of them cannot be written.
    """
    with replacing_all(list(contents), overwrite=overwrite) as temporaries:
        for temporary, content in zip(temporaries, contents.values(), strict=True):
            temporary.write_bytes(content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content)


@contextlib.contextmanager
def beside(path: Path) -> Iterator[Path]:
    """Yield an empty file in the folder of `path`, under a name of its own that begins with a dot, and remove it afterwards.

    It is locked as long as the block runs, so that the next process tells what a killed one left there for the same `path`, and
    removes it. Missing folders are made. Raises EectlError where it cannot be made.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_left_behind(path)
        temporary, handle = _make_locked(path)
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)
        os.close(handle)


def remove_left_behind(path: Path) -> None:
    """Remove the temporary files that killed processes left beside `path`: those that nobody has locked."""
    start = _start_of_name(path)
    try:
        there = list(path.parent.iterdir())
    except PermissionError:  # one may write to a folder that one may not list
        return
    for each in there:
        if each.name.startswith(start) and each.name.endswith(".tmp"):
            with contextlib.suppress(OSError):  # another process writes it, or was quicker
                handle = os.open(each, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    each.unlink()
                finally:
                    os.close(handle)


def _make_locked(path: Path) -> tuple[Path, int]:
    """Make a temporary file for `path` and lock it; returns its path and the handle that holds the lock."""
    while True:
        temporary = path.parent / f"{_start_of_name(path)}{secrets.token_hex(4)}.tmp"
        handle = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        with contextlib.suppress(FileNotFoundError):  # taken for a file left behind, before it was locked
            if temporary.stat().st_ino == os.fstat(handle).st_ino:
                return temporary, handle
        os.close(handle)


def _start_of_name(path: Path) -> str:
    """Return how the names of the temporary files for `path` begin, which leave room for the rest of the name."""
    name = path.name if len(os.fsencode(path.name)) <= 200 else hashlib.sha256(os.fsencode(path.name)).hexdigest()
    return f".{name}."


def put_in_place(temporary: Path, path: Path, *, overwrite: bool = True) -> None:
    """Replace `path` by a file that has been written, in one step and on the disk, with the usual permissions.

    Raises EectlError where `overwrite` is false and `path` is there.
    """
    put_all_in_place([temporary], [path], overwrite=overwrite)


def put_all_in_place(temporaries: Sequence[Path], paths: Sequence[Path], *, overwrite: bool = True) -> None:
    """Replace each of `paths` by a file that has been written, as `put_in_place` does, or on failure none of them."""
    for temporary in temporaries:
        with _opened(temporary) as handle:
            sync(handle)
        os.chmod(temporary, 0o666 & ~_umask())
    for path in paths:  # after this no rename of theirs has a reason to fail
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    with contextlib.ExitStack() as undo:
        for temporary, path in zip(temporaries, paths, strict=True):
            if overwrite:
                os.replace(temporary, path)
            else:
                _put_where_nothing_is(temporary, path)
                undo.callback(path.unlink)
        undo.pop_all()
    for folder in dict.fromkeys(path.parent for path in paths):
        _sync_folder(folder)


def _put_where_nothing_is(temporary: Path, path: Path) -> None:
    """Give a file its name in one step, which fails where that name is taken."""
    try:
        os.link(temporary, path)
    except FileExistsError as error:
        raise EectlError(
            f"{path} came into being while this command ran; give another name, or --overwrite to replace it"
        ) from error
    except OSError:  # a file system without links: the moment between the question and the answer stays
        if path.exists():
            raise
        os.replace(temporary, path)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    handle = os.open(path, os.O_RDONLY)
    try:
        yield handle
    finally:
        os.close(handle)


def _sync_folder(folder: Path) -> None:
    """Bring a folder onto the disk, and with it the new names in it; some file systems have no such thing."""
    with _opened(folder) as handle:
        try:
            sync(handle)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise EectlError(
                    f"{folder}: the files in it are written, and may be lost if the machine stops now ({error.strerror}); look "
                    "after the disk"
                ) from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def check_outputs(outputs: Sequence[Path | None], *, inputs: Sequence[Path | None], overwrite: bool) -> None:
    """Raise EectlError where an output will not do; None is no file.

    That is one that exists without `--overwrite`, is one of the inputs, is named twice, is a folder or a device, or has no place
    where a file can be made.
    """
    given = [real(path) for path in inputs if path is not None]
    seen: set[Path] = set()
    for path in outputs:
        if path is None:
            continue
        if real(path) in given:
            raise EectlError(f"{path} is read by this command and cannot be written by it; give the output another name")
        if real(path) in seen:
            raise EectlError(f"{path} is named for two outputs; give each its own name")
        with writing(path):
            _check_place(path)
        if os.path.lexists(path) and not overwrite:
            raise EectlError(f"{path} exists; give another name, or --overwrite to replace it")
        seen.add(real(path))


def real(path: Path) -> Path:
    """Return where a path leads, with the symbolic links in it followed; one that leads back to itself is left as it is."""
    return Path(os.path.realpath(path))  # Path.resolve raises RuntimeError for such a link


def _check_place(path: Path) -> None:
    """Raise OSError where no file can be made at `path`, and EectlError where something else than a file is there."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:  # nothing is there, or a link that leads to nothing
        mode = None
    if mode is not None and not stat.S_ISREG(mode):
        raise EectlError(f"{path}: not a file, but a {'folder' if stat.S_ISDIR(mode) else 'device'}; name a file")
    folder = next(each for each in path.absolute().parents if each.exists())
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def read_text(path: Path) -> str:
    """Return a file of text whole.

    Raises:
        EectlError: where it cannot be read, is a folder or a device, has more than `MOST_BYTES`, or is not UTF-8.
    """
    with reading(path):
        mode = path.stat().st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISFIFO(mode)):  # a pipe is what a shell's <(…) names
            raise EectlError(f"{path}: not a file, but a {'folder' if stat.S_ISDIR(mode) else 'device'}; name a file")
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe that nobody writes to is empty, and not waited for
        os.set_blocking(handle, True)
        with open(handle, "rb") as file:
            content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise EectlError(f"{path}: larger than {MOST_BYTES >> 20} MiB, which no file of this kind is; name the right file")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise EectlError(f"{path}: byte {error.start} is not UTF-8, so this is not text; name the right file") from error


def as_path(path: str | Path | None) -> Path | None:
    """Return a path that a caller gave as text or as a Path, None where none was given."""
    return None if path is None else Path(path)


def open_text(path: Path) -> TextIO:
    """Open a file to write text into: UTF-8, ends of lines as they come, an escape for what a file's name had undecodable."""
    return path.open("w", encoding="utf-8", errors="backslashreplace", newline="")
