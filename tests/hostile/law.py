"""The one law of hostile input, and running a line under it in this process, which must be one of its own.

A line ends with exit code 0, or with one line on stderr and 1 or 2; it starts no program, opens no connection, unpickles nothing;
and it changes no file but those that it is named for. Time and memory are bounded where the process is started.
"""

import hashlib
import os
import re
import shutil
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hostile.children import Verdict
from running import ended

LONGEST = 4000  # characters of a line on stderr
FORBIDDEN = {"socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "subprocess.Popen", "os.system", "os.exec",
             "os.posix_spawn", "pickle.find_class", "urllib.Request"}  # fmt: skip
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
RAW = re.compile(r"Traceback|Warning:|^  File \"", re.MULTILINE)


def judge(
    line: Sequence[str],
    folder: Path,
    *,
    writes: Sequence[str] = (),
    answer: Callable[[Path, str], Any] | None = None,
    many: bool = False,
    stdin: Path | None = None,
) -> Verdict:
    """Run a line from `folder` and say where it broke the law.

    Args:
        line: the command.
        folder: a folder of its own.
        writes: what it may make or change there; a folder's name ends with a slash.
        answer: takes its answer from the folder and from stdout.
        many: it may say several lines of `eectl: `.
        stdin: what it reads there.
    """
    if stdin is not None:
        sys.stdin = open(stdin, encoding="utf-8")  # noqa: SIM115
    before = snapshot(folder)
    seen = _watch(folder)
    try:
        code, out, err = ended(*line, cwd=folder)
    except BaseException:
        return Verdict(None, faults=[traceback.format_exc(), *_changed(before, folder, writes)])
    faults = [*words_of_law(code, out, err, many=many), *sorted(set(seen)), *_changed(before, folder, writes)]
    found = None
    if code == 0 and answer is not None:
        try:
            found = answer(folder, out)
        except Exception:
            faults.append("it says that all is well, but the answer cannot be read: " + traceback.format_exc())
    return Verdict(code, found, faults, said=err[-2000:])


def words_of_law(code: int, out: str, err: str, *, many: bool) -> list[str]:
    """Return where an exit code and what was printed break the law."""
    faults = []
    blamed = [line for line in err.splitlines() if line.startswith("eectl: ")]
    if code not in (0, 1, 2):
        faults.append(f"exit code {code}")
    if code == 1 and (not blamed or (len(blamed) > 1 and not many)):
        faults.append(f"{len(blamed)} lines that begin with 'eectl: '")
    if code == 2 and not (err.startswith("Usage: ") or blamed):
        faults.append("exit code 2 without a line on how to use it")
    if RAW.search(err) or RAW.search(out):
        faults.append("a traceback or a library's warning was printed")
    if CONTROL.search(err) or CONTROL.search(out):
        faults.append("a control character was printed")
    if any(len(each) > LONGEST for each in err.splitlines()):
        faults.append(f"a line of more than {LONGEST} characters was printed")
    return [f"{fault}: {err[-1500:]}" for fault in faults]


def _watch(folder: Path) -> list[str]:
    """Note, from now on, what this process must not do: programs, connections, unpickling, writing outside the folder."""
    seen: list[str] = []
    inside = (str(folder.resolve()), "/dev/", "/proc/")

    def hear(event: str, arguments: tuple[Any, ...]) -> None:
        if event in FORBIDDEN:
            seen.append(f"it did {event} {arguments!r:.200}")
        elif event == "open" and isinstance(arguments[0], str) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            path = str(Path(arguments[0]).absolute())
            if not path.startswith(inside) and "__pycache__" not in path:
                seen.append(f"it opened {path} for writing")

    sys.addaudithook(hear)
    return seen


def snapshot(folder: Path) -> Mapping[str, str]:
    """Return what every file and folder below a folder holds: digests by relative path."""
    found = {}
    for parent, folders, names in os.walk(folder):
        for name in [*folders, *names]:
            path = Path(parent, name)
            key = str(path.relative_to(folder))
            if path.is_symlink():
                found[key] = f"-> {path.readlink()}"
            else:
                found[key] = "folder" if path.is_dir() else hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
    return found


def _changed(before: Mapping[str, str], folder: Path, writes: Sequence[str]) -> list[str]:
    """Say which files and folders are not as they were, though the line may not write there."""
    after = snapshot(folder)
    folders = tuple(each for each in writes if each.endswith("/"))
    odd = [
        path
        for path in sorted(before.keys() | after.keys())
        if before.get(path) != after.get(path) and path not in writes and not f"{path}/".startswith(folders)
    ]
    return [f"changed, made or removed: {', '.join(odd[:5])}"] if odd else []


def copy_needed(world: Path, folder: Path, paths: Sequence[str]) -> None:
    """Copy files and folders of the world into a new folder."""
    for name in paths:
        source, target = world / name, folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, dirs_exist_ok=True)
        elif not target.exists():
            shutil.copyfile(source, target)
