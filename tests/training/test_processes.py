"""Several processes of which one is killed, or fails alone: the others say so in one line each, and what was saved is whole."""

import re
import socket
import time
from contextlib import suppress

import pytest
from forked import ended, kill, start_child

from eectl.core.tensor_files import read_any_tensors
from eectl.training.run_folder import RunFolder

LINE = ["train", "digits", "--regime", "joint", "--device", "cpu", "-q", "--set", "data.limit=150", "--set", "exits.after=[1]"]


@pytest.fixture
def processes(tmp_path):
    """Start so many processes of one run, without torchrun, which would stop them all; their numbers, and where they print."""
    started = []

    def start(*arguments, size=2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        said = [tmp_path / f"said-{rank}" for rank in range(size)]
        for rank in range(size):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
            place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            started.append(start_child(*arguments, said=said[rank], **place))
        return started, said

    yield start
    for number in started:
        with suppress(ChildProcessError):
            kill(number)


def wait_for(path):
    until = time.monotonic() + 100
    while not path.exists():
        assert time.monotonic() < until, f"{path} did not come"
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.parametrize(("size", "victim"), [(2, 1), (2, 0), pytest.param(3, 1, marks=pytest.mark.thorough)])
def test_a_process_that_is_killed_leaves_one_line_each_and_a_whole_state(processes, tmp_path, size, victim):
    folder = RunFolder(tmp_path / "run")
    numbers, said = processes(*LINE, "--epochs", "9999", "--set", "patience=9999", "-o", folder.path, size=size)
    wait_for(folder.state)
    kill(numbers[victim])
    for rank in set(range(size)) - {victim}:
        assert ended(numbers[rank]) == 1
        (line,) = said[rank].read_text().splitlines()
        gone = re.search(r"process(?:es)? ([\d, ]+) of \d (?:is|are) gone \(killed", line)[1].split(", ")
        assert str(victim) in gone and str(rank) not in gone  # of three, one may have heard of it and left before another
        assert line.endswith("the same command with --resume goes on from there")
    assert folder.load_state() is not None  # by its digest
    assert not list(folder.path.rglob("*.tmp"))


@pytest.mark.slow
@pytest.mark.process
def test_a_process_that_fails_alone_stops_the_others(processes, tmp_path):
    """Process 0 is refused before the others are waited for, then under the lock."""
    folder = RunFolder(tmp_path / "run")
    numbers, said = processes(*LINE, "--epochs", "1", "-o", folder.path)
    assert [ended(number) for number in numbers] == [0, 0]
    before = read_any_tensors(folder.model)[0]
    for path in said:
        path.unlink()
    numbers, said = processes(*LINE, "--epochs", "1", "-o", folder.path)
    assert [ended(number) for number in numbers[2:]] == [1, 1]
    assert "holds a run" in said[0].read_text()
    (line,) = said[1].read_text().splitlines()
    assert line.startswith("eectl [process 1]: process 0 of 2 is gone (killed, or stopped with a line of its own)")
    for path in said:
        path.unlink()
    numbers, said = processes(*LINE, "--epochs", "2", "--resume", "-o", folder.path)
    assert [ended(number) for number in numbers[4:]] == [1, 1]
    assert "--resume with another recipe: epochs is 1 there and 2 here" in said[0].read_text()
    (line,) = said[1].read_text().splitlines()
    assert line == "eectl [process 1]: stopped, as process 0 did with a line of its own"
    assert before.keys() == read_any_tensors(folder.model)[0].keys()


def test_the_environment_of_several_processes_is_looked_at(monkeypatch):
    from eectl.core.distributed import join
    from eectl.core.errors import EectlError

    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(EectlError, match="WORLD_SIZE is 'two' in the environment, not a number"):
        join("cpu")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(EectlError, match=r"the 2 processes do not find each other \(.*RANK.*\); start them with torchrun"):
        join("cpu")
