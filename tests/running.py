"""Running the program in tests: in this process, which spares the start-up, or as a process where that is what is tested."""

import ctypes
import os
import pickle
import resource
import signal
import struct
import subprocess
import sys
import traceback
from contextlib import chdir, contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import pytest

from eectl.cli import app as cli

ROOT = Path(__file__).parents[1]


def environment(**variables):
    """The environment of a process that is to import this checkout's eectl."""
    return os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"} | variables


def eectl_process(*arguments, cwd=None, code=0):
    """Run the program as a process of its own, which must end with `code`; (stdout, stderr). Its test is marked `process`."""
    line = [sys.executable, "-m", "eectl", *map(str, arguments)]
    done = subprocess.run(
        line, cwd=cwd, env=environment(COLUMNS="200", NO_COLOR="1"), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout, done.stderr


def ended(*arguments, cwd=None, columns=200):
    """Run the program in this process, from the folder `cwd`, which must end as a program does; (code, stdout, stderr)."""
    out, err = StringIO(), StringIO()
    with pytest.MonkeyPatch.context() as patched, chdir(cwd or "."), _signals_kept():
        patched.setattr(sys, "argv", ["eectl", *map(str, arguments)])
        patched.setenv("COLUMNS", str(columns))
        patched.setenv("NO_COLOR", "1")
        with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as stop:
            cli.main()
    return stop.value.code or 0, out.getvalue(), err.getvalue()


def eectl(*arguments, cwd=None, code=0, columns=200):
    """Run the program in this process, from the folder `cwd`; it must end with `code`; (stdout, stderr)."""
    found, out, err = ended(*arguments, cwd=cwd, columns=columns)
    assert found == code, out + err
    return out, err


def succeeded(*arguments, cwd=None, **_fixtures):
    """As `eectl`; fixtures that a caller hands over (monkeypatch, capsys) are not needed."""
    return eectl(*arguments, cwd=cwd, columns=os.environ.get("COLUMNS", 200))


def refused(*arguments, cwd=None, code=1, **_fixtures):
    """Run the program in this process, where it must refuse and print nothing on stdout; what it says on stderr."""
    out, err = eectl(*arguments, cwd=cwd, code=code)
    assert out == ""
    return err


def in_child(run, *, most_bytes=None):
    """What `run()` returns in a forked process for which permissions count, though root's, and which writes no larger files."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            _drop_capabilities()
            if most_bytes is not None:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write then fails in the middle, as on a full disk
                resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))
            answer = pickle.dumps(run())
            with open(writing, "wb") as file:
                file.write(answer)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        os._exit(1)
    os.close(writing)
    with open(reading, "rb") as file:
        answer = file.read()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    return pickle.loads(answer)


def _drop_capabilities():
    """Give up root's right to pass over permissions; who has no such right keeps what he has."""
    header, none = struct.pack("Ii", 0x20080522, 0), bytes(24)
    assert ctypes.CDLL(None).capset(header, none) == 0


@contextmanager
def _signals_kept():
    """The program takes over what SIGINT and SIGTERM do: afterwards they do again what they did."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
