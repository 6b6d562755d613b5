"""The one law of hostile input, and running a line under it, in a child process with bounds.

A line ends with exit code 0, or with one line on stderr and 1 or 2; within bounded time and memory; it starts no program, opens no
connection, unpickles nothing; and changes no file but those that it is named for.
"""

import hashlib
import json
import os
import re
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from running import ended

CPU_SECONDS = 5  # beyond what the line takes with nothing damaged
MEMORY = 2**30  # beyond what it takes so
GUARD = 4 * 2**30  # no child may have more than this beyond its parent
FILE_SIZE = 2**28
WALL_SECONDS = 120
LONGEST = 4000  # characters of a line on stderr
FORBIDDEN = {"socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "subprocess.Popen", "os.system", "os.exec",
             "os.posix_spawn", "pickle.find_class", "urllib.Request"}  # fmt: skip
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
RAW = re.compile(r"Traceback|Warning:|^  File \"", re.MULTILINE)


@dataclass(frozen=True)
class Usage:
    """What a line takes: seconds of CPU, and bytes of memory at its height."""

    seconds: float
    memory: int


@dataclass
class Verdict:
    """How a line ended: its code (None: it did not end as a program does), its answer, and what broke the law."""

    code: int | None
    answer: Any = None
    faults: list[str] = field(default_factory=list)
    said: str = ""
    usage: Usage = Usage(0.0, 0)


def run_child(work: Callable[[], Verdict], *, report: Path, usual: Usage | None = None) -> int:
    """Start a child that runs `work` within bounds and leaves its verdict in a file; returns its number."""
    seconds = int((usual.seconds if usual else 30) + CPU_SECONDS) + 1
    child = os.fork()
    if child:
        return child
    try:
        _bound(seconds)
        verdict = work()
        report.write_text(json.dumps({"code": verdict.code, "answer": verdict.answer, "faults": verdict.faults, "said": verdict.said}))
        os._exit(0)
    except BaseException:
        report.with_suffix(".crash").write_text(traceback.format_exc())
    finally:
        os._exit(70)


def _bound(seconds: int) -> None:
    """Bound this process, and give it nothing to read from."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_SIZE, FILE_SIZE))
    with open("/proc/self/status") as status:
        data = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmData"))
    resource.setrlimit(resource.RLIMIT_DATA, (data + GUARD, data + GUARD))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)


def wait_for(child: int, *, report: Path, usual: Usage | None = None) -> Verdict:
    """Wait for a child of `run_child`, no longer than it may take; returns its verdict, with what it took."""
    handle = os.pidfd_open(child)
    try:
        import select

        if not select.select([handle], [], [], WALL_SECONDS)[0]:
            os.kill(child, signal.SIGKILL)
    finally:
        os.close(handle)
    _, status, used = os.wait4(child, 0)
    return collect(status, used, report=report, usual=usual)


def collect(status: int, used: Any, *, report: Path, usual: Usage | None) -> Verdict:
    """Return the verdict of a child that has ended."""
    usage = Usage(used.ru_utime + used.ru_stime, used.ru_maxrss * 1024)
    code = os.waitstatus_to_exitcode(status)
    if report.exists():
        verdict = Verdict(**json.loads(report.read_text()))
        report.unlink()
    else:
        crash = report.with_suffix(".crash")
        how = crash.read_text() if crash.exists() else "too much CPU" if code in (-signal.SIGXCPU, -signal.SIGKILL) else "died"
        verdict = Verdict(None, faults=[f"ended with {code}: {how}"])
    verdict.usage = usage
    if usual is not None and usage.seconds > usual.seconds + CPU_SECONDS:
        verdict.faults.append(f"took {usage.seconds:.1f} s of CPU, {usual.seconds:.1f} s is usual")
    if usual is not None and usage.memory > usual.memory + MEMORY:
        verdict.faults.append(f"took {usage.memory / 2**20:.0f} MB, {usual.memory / 2**20:.0f} MB is usual")
    return verdict


def judge(
    line: Sequence[str],
    folder: Path,
    *,
    writes: Sequence[str] = (),
    answer: Callable[[Path, str], Any] | None = None,
    many: bool = False,
) -> Verdict:
    """Run a line from `folder` in this process, which must be one of its own, and say where it broke the law.

    Args:
        line: the command.
        folder: a folder of its own.
        writes: what it may make or change there; a folder's name ends with a slash.
        answer: takes its answer from the folder and from stdout.
        many: it may say several lines of `eectl: `.
    """
    before = snapshot(folder)
    seen = _watch(folder)
    try:
        code, out, err = ended(*line, cwd=folder)
    except BaseException:
        return Verdict(None, faults=[traceback.format_exc(), *_changed(before, folder, writes)])
    faults = [*words_of_law(code, out, err, many=many), *sorted(set(seen)), *_changed(before, folder, writes if code == 0 else ())]
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
            path = os.path.abspath(arguments[0])
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
    after = snapshot(folder)
    allowed = tuple(each for each in writes if each.endswith("/"))
    odd = [
        path
        for path in sorted(before.keys() | after.keys())
        if before.get(path) != after.get(path) and path not in writes and not f"{path}/".startswith(allowed)
        and not path.endswith("resume/lock") and not (path.endswith("resume") and before.get(path) is None)
    ]  # fmt: skip
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


def now() -> float:
    """Return the time, for how long something took."""
    return time.monotonic()
