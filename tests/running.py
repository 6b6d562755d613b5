"""Running the program in tests: as a process of its own, or in this one, where it must succeed or refuse."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from eectl.cli import app as cli


def eectl(*arguments, cwd=None, code=0):
    """Run the real program; returns (stdout, stderr)."""
    root = str(Path(__file__).parents[1])
    env = os.environ | {"PYTHONPATH": f"{root}:{os.environ.get('PYTHONPATH', '')}", "COLUMNS": "200", "NO_COLOR": "1"}
    line = [sys.executable, "-m", "eectl", *map(str, arguments)]
    done = subprocess.run(line, cwd=cwd, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout, done.stderr


def succeeded(*arguments, monkeypatch, capsys):
    """Run the program in this process, where it must succeed; (stdout, stderr)."""
    monkeypatch.setattr(sys, "argv", ["eectl", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    out, err = capsys.readouterr()
    assert not stop.value.code, err
    return out, err


def refused(*arguments, monkeypatch, capsys, code=1):
    """Run the program in this process, where it must refuse; returns its one line on stderr."""
    monkeypatch.setattr(sys, "argv", ["eectl", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    out, err = capsys.readouterr()
    assert stop.value.code == code, err
    assert out == ""
    return err
