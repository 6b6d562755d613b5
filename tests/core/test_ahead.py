"""Making ahead: nothing on a CPU, and on a GPU, here a pretended one, the next group while the last one is being used."""

import contextlib

import pytest
import torch

from eectl.core.ahead import ahead


def test_a_cpu_makes_nothing_before_it_is_asked_for():
    made = []

    def groups():
        for number in range(3):
            made.append(number)
            yield [(number, "a"), (number, "b")]

    items = ahead(groups(), torch.device("cpu"))
    assert not made
    assert [next(items), next(items)] == [(0, "a"), (0, "b")] and made == [0]
    assert list(items) == [(1, "a"), (1, "b"), (2, "a"), (2, "b")]


class FakeStream:
    """A stream that notes what is asked of it."""

    def __init__(self, log, name):
        self._log, self._name = log, name

    def wait_stream(self, other):
        self._log.append(f"{self._name} waits for {other._name}")

    def record_event(self):
        return len(self._log)

    def wait_event(self, event):
        self._log.append(f"{self._name} waits for what was done when '{self._log[event - 1]}'")


def test_a_gpu_makes_the_next_group_when_the_first_item_is_used(monkeypatch):
    log = []
    main, own = FakeStream(log, "main"), FakeStream(log, "own")
    current = [main]

    @contextlib.contextmanager
    def on(stream):
        current.append(stream)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "Stream", lambda _device: own)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: current[-1])
    kept = []
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: kept.append((int(tensor), stream)))

    def groups():
        for number in range(2):
            log.append(f"make {number} on {current[-1]._name}")
            yield [(torch.tensor(10 * number + place), (torch.tensor(50 + 10 * number + place),)) for place in range(2)]

    for item, (_,) in ahead(groups(), torch.device("cuda")):
        log.append(f"use {int(item)}")
    done = "main waits for what was done when"
    assert log == ["own waits for main", "make 0 on own", f"{done} 'make 0 on own'", "use 0", "make 1 on own", "use 1",
                   f"{done} 'make 1 on own'", "use 10", "use 11"]  # fmt: skip
    assert kept == [(number, main) for number in (0, 50, 1, 51, 10, 60, 11, 61)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_what_a_real_gpu_makes_ahead_is_whole():
    device = torch.device("cuda")
    start = torch.ones(2**22, device=device)

    def groups():
        for number in range(20):
            values = start * number
            for _ in range(20):
                values = values + 1
            yield list(values.view(4, -1).split(1))

    for number, part in enumerate(ahead(groups(), device)):
        assert bool((part == number // 4 + 20).all())
