"""Recording and replaying, on a tape that stands for a CUDA graph."""

import pytest
import torch
from tape import Tape

from eectl.core.capture import Capture, recorder_for


def test_nothing_is_recorded_on_a_cpu() -> None:
    assert recorder_for(torch.device("cpu")) is None
    calls = []
    program = Capture(None).program(lambda: calls.append(1))
    for _ in range(5):
        program()
    assert len(calls) == 5


def test_a_program_runs_plainly_is_recorded_and_then_replayed_without_python() -> None:
    tape, calls, total = Tape(), [], torch.zeros(3)

    def add() -> torch.Tensor:
        calls.append(1)
        total.add_(1)
        return total * 2

    program = Capture(tape, plain_calls=2).program(add)
    results = [program().clone() for _ in range(6)]
    assert total.tolist() == [6.0] * 3  # recording did no work of its own
    assert [result[0].item() for result in results] == [2.0, 4.0, 6.0, 8.0, 10.0, 12.0]
    assert len(calls) == 3 and tape.rehearsals == 2 and tape.replays == 4 and tape.num_operations == [2]


def test_what_python_holds_is_baked_in_and_what_tensors_hold_is_not() -> None:
    """The tape is as strict as a CUDA graph: a number from Python stays what it was, a filled tensor does not."""
    numbers, rate, x = {"rate": 1.0}, torch.tensor(1.0), torch.zeros(1)
    by_number = Capture(Tape(), plain_calls=0).program(lambda: x * 0 + numbers["rate"])
    by_tensor = Capture(Tape(), plain_calls=0).program(lambda: x * 0 + rate)
    by_number(), by_tensor()
    numbers["rate"] = 5.0
    rate.fill_(5.0)
    assert by_number().item() == 1.0 and by_tensor().item() == 5.0


def test_a_function_is_recorded_for_each_shape_and_the_oldest_is_dropped() -> None:
    tape = Tape()
    double = Capture(tape, plain_calls=0).function(lambda x, y: x * 2 + y, most=2)
    for size in (3, 4, 3, 5, 4):
        x = torch.rand(size)
        assert torch.equal(double(x, x), x * 2 + x)
    assert tape.num_operations == [2] * 4  # 3, 4, 5, and 4 again, which was dropped for 5


def test_layouts_are_kept_apart() -> None:
    seen = []

    def look(x: torch.Tensor) -> torch.Tensor:
        seen.append(x.is_contiguous(memory_format=torch.channels_last))
        return x + 1

    function, x = Capture(Tape(), plain_calls=0).function(look), torch.rand(2, 3, 4, 4)
    function(x), function(x.contiguous(memory_format=torch.channels_last))
    assert seen == [False, True]


def test_a_failed_recording_is_said_once_and_everything_is_called_from_then_on() -> None:
    said: list[str] = []
    capture, x = Capture(Tape(), plain_calls=0, say=said.append), torch.zeros(1)

    def reads_back() -> float:
        x.add_(1)
        return float(x)

    first, second = capture.program(reads_back), capture.program(reads_back)
    assert [first(), first(), second()] == [1.0, 2.0, 3.0]
    assert len(said) == 1 and "_local_scalar_dense" in said[0]


def test_a_full_memory_is_not_a_failed_recording() -> None:
    class Full(Tape):
        num_bytes = 2_000_000_000

        def record(self, _: object) -> object:
            raise torch.OutOfMemoryError("CUDA out of memory")

    recorder = Full()
    recorder.num_bytes = 2_000_000_000
    with pytest.raises(torch.OutOfMemoryError) as error:
        Capture(recorder, plain_calls=0).program(lambda: None)()
    assert error.value.__notes__ == ["CUDA graphs hold 2.00 GB"]


def test_closing_drops_recordings() -> None:
    tape = Tape()
    capture = Capture(tape, plain_calls=0)
    program = capture.program(lambda: torch.zeros(1) + 1)
    program()
    capture.close()
    program()
    assert len(tape.num_operations) == 2


def test_a_whole_training_step_is_replayed_to_the_bit() -> None:
    """Forward, backward, clipping and AdamW with its rate in a tensor: replays give the bits of plain steps."""

    def train(recorder: Tape | None) -> list[torch.Tensor]:
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Flatten(), torch.nn.Linear(144, 5))
        rate = torch.tensor(0.0, dtype=torch.float64)
        optimizer = torch.optim.AdamW(net.parameters(), lr=rate, fused=True)

        def step(x: torch.Tensor, y: torch.Tensor) -> None:
            torch.nn.functional.cross_entropy(torch.nn.functional.dropout(net(x), 0.3), y).backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        run = Capture(recorder).function(step)
        for number in range(8):
            torch.manual_seed(number)
            rate.fill_(0.01 / (number + 1))
            run(torch.randn(6, 3, 8, 8), torch.randint(5, (6,)))
        return [each.clone() for each in net.state_dict().values()]

    tape = Tape()
    assert all(a.equal(b) for a, b in zip(train(None), train(tape), strict=True))
    assert tape.replays == 5
