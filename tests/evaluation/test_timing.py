"""What is measured of speed: identities between the numbers and hand-counted ones. No test looks at how long anything took."""

import pytest
import torch
from tape import Tape
from toy_exits import WIDTH, CascadeHead, PlainHead, toy_model

from eectl.evaluation import timing
from eectl.evaluation.bench_tables import bench_notes, show_bench
from eectl.evaluation.timing import break_even, measure_speed
from eectl.exits import fastest
from eectl.exits import segment_times as stage_times
from eectl.exits.criteria import CRITERIA
from eectl.exits.policy import NEVER, Policy, choose
from eectl.exits.segment_times import SegmentTimes, learn_times
from eectl.exits.times import EARLY, FULL, Bench, EarlyExit, Latency, Speed, TimedRun


def test_stage_times_are_read_between_and_beyond():
    times = SegmentTimes(((0.0, 1.0, 3.0), (0.0, 2.0, 2.0)), ((0.0, 0.5, 0.75),))
    assert times.saved(1, rows=2, staying=1) == 2.0
    assert times.saved(2, rows=2, staying=1) == 0.0
    assert times.regroup(1, moved=2) == 0.75
    assert times.crowd(1, rows=1, among=2) == 1.0 - 1.5
    assert times.crowd(2, rows=1, among=2) == 1.0
    assert times.saved(1, rows=6, staying=2) == 3.0 * 6 / 2 - 3.0


def test_times_between_the_measured_ones_lie_on_lines_and_never_fall():
    assert stage_times._fill({5: 4.0, 1: 2.0, 3: 1.0}) == pytest.approx((2.0, 2.0, 2.0, 2.0, 3.0, 4.0))


def test_learned_times_cover_the_batch():
    model = toy_model(CascadeHead)
    times = learn_times(model, torch.randn(33, WIDTH), seconds=0)
    assert [len(table) for table in times.segments] == [34] * 3
    assert [len(table) for table in times.regroups] == [17] * 2  # at most half of the rows move
    assert all(table == tuple(sorted(table)) and table[1] > 0 for table in (*times.segments, *times.regroups))
    assert {rows for _, rows in model.backbone.runs} == {1, 2, 8, 16, 33}
    assert [len(table) for table in learn_times(model, torch.randn(1, WIDTH), seconds=0).regroups] == [1, 1]


@pytest.mark.parametrize(
    ("shares", "plain", "overhead", "expected"),
    [
        ((0.2, 0.2, 0.6), 10.0, 0.0, 2 / 9),  # early leavers take (1 + 5) / 2 = 3, the others 12: 12 − 9 e = 10
        ((0.3, 0.1, 0.6), 10.0, 1.0, 0.3),  # 2 and 13 − 1 for all: 13 − 10 e = 10
        ((0.4, 0.0, 0.6), 12.5, 0.0, 0.0),  # even all at the last exit are no slower
        ((0.4, 0.0, 0.6), 10.0, 9.5, None),  # 21.5 − 11 e = 10 would need more than all
        ((0.0, 0.0, 1.0), 10.0, 0.0, None),  # nobody leaves early
    ],
)
def test_break_even_by_hand(shares, plain, overhead, expected):
    found = break_even(shares, (1.0, 5.0, 12.0), plain=plain, overhead=overhead)
    assert found == (None if expected is None else pytest.approx(expected))


@pytest.mark.parametrize("size", [1, 6])
def test_numbers_hang_together(size):
    model = toy_model()
    inputs = torch.randn(48, WIDTH)
    with torch.inference_mode():
        scores = CRITERIA["margin"].scores(torch.stack([output.logits for output in model(inputs)]))
    median = tuple(row.median().item() + 1e-6 for row in scores[:-1])
    policies = {25.0: Policy(CRITERIA["margin"], median), 100.0: Policy(CRITERIA["margin"], (NEVER, NEVER))}
    model.backbone.runs.clear()
    speed = measure_speed(model, inputs.split(size), policies, cost_shares=(0.25, 0.5, 1.25), seconds=1e6)
    assert (speed.batch_size, speed.num_rows) == (size, 48)
    assert 3 <= speed.num_rounds <= 5
    kinds = [(entry.budget, entry.refill) for entry in speed.early_exit]
    assert kinds == [(25.0, False), (100.0, False)] if size == 1 else [(25.0, False), (25.0, True), (100.0, False), (100.0, True)]
    assert speed.plain_seconds == speed.plain.seconds == pytest.approx(1 / speed.plain.rows_per_second)
    assert len(speed.prefix_seconds) == 3 and speed.prefix_seconds == tuple(sorted(speed.prefix_seconds))
    for entry in speed.early_exit:
        chosen = choose(scores, policies[entry.budget].thresholds)
        assert entry.left == tuple(torch.bincount(chosen, minlength=3).tolist())
        shares = [count / 48 for count in entry.left]
        ideal = speed.plain_seconds * (0.25 * shares[0] + 0.5 * shares[1] + 1.25 * shares[2])
        reachable = sum(share * prefix for share, prefix in zip(shares, speed.prefix_seconds, strict=True))
        assert (entry.mac_ideal_seconds, entry.reachable_seconds) == (pytest.approx(ideal), pytest.approx(reachable))
        assert entry.of_reachable == pytest.approx(reachable / entry.seconds)
        assert entry.of_mac_ideal == pytest.approx(ideal / entry.seconds)
        assert entry.speed_up == pytest.approx(speed.plain_seconds / entry.seconds)
        assert entry.early_share == pytest.approx(shares[0] + shares[1])
        latency = entry.latency_ms
        assert 0 < latency.p50 <= latency.p95 <= latency.p99
        assert entry.mode == (FULL if speed.full.seconds < entry.seconds else EARLY)
    assert speed.early_exit[-1].break_even is None
    assert {rows for block, rows in model.backbone.runs if block == 0} == ({1} if size == 1 else {1, 3, 6})


@pytest.mark.parametrize("head", [PlainHead, CascadeHead])
def test_recorded_programs_are_timed_where_a_device_records(monkeypatch, head):
    """On a tape: no Python of the network runs in the last round, and rows are counted as on a CPU."""
    model, inputs, tapes = toy_model(head), torch.randn(48, WIDTH), []

    def tape(device):
        tapes.append(Tape())
        return tapes[-1]

    policies = {50.0: Policy(CRITERIA["margin"], (0.3, 0.3))}
    expected = measure_speed(model, inputs.split(6), policies, cost_shares=(0.25, 0.5, 1.25), seconds=1e6)
    monkeypatch.setattr(timing, "recorder_for", tape)
    for module in (timing, fastest):
        monkeypatch.setattr(module, "is_static", bool)
    rounds = []
    real = timing._Prefixes.__call__
    monkeypatch.setattr(
        timing._Prefixes, "__call__", lambda self, batches: (rounds.append(len(model.backbone.runs)), real(self, batches))[1]
    )
    model.backbone.runs.clear()
    speed = measure_speed(model, inputs.split(6), policies, cost_shares=(0.25, 0.5, 1.25), seconds=1e6)
    assert len(rounds) == speed.num_rounds + 2 and len(set(rounds[2:])) == 1  # after two for warming up
    assert len(tapes) == 1 and tapes[0].replays
    assert [entry.left for entry in speed.early_exit] == [entry.left for entry in expected.early_exit]
    assert len(set(speed.early_exit[0].left)) > 1


def test_few_batches_where_time_is_short():
    model = toy_model()
    batches = torch.randn(100, WIDTH).split(4)
    speed = measure_speed(
        model, batches, {100.0: Policy(CRITERIA["margin"], (NEVER, NEVER))}, cost_shares=(1, 1, 1), seconds=1e-9
    )
    assert (speed.num_rounds, speed.num_rows) == (3, 32)  # eight batches of four: fewer rows have no mix to speak of


def made_up(speed_up, refilled, *, break_even=0.4, early=0.5, mode=EARLY, full=0.01):
    """A bench of one budget at batch size 32, and one that is out of reach."""
    latency = Latency(1.0, 2.0, 3.0)
    entries = tuple(
        EarlyExit(
            **{"seconds": 0.01 / each, "rows_per_second": 100 * each, "latency_ms": latency, "budget": 75.0, "refill": refill},
            **{"left": (5, 5), "speed_up": each, "mac_ideal_seconds": 0.005, "reachable_seconds": 0.008},
            **{"of_mac_ideal": 0.005 / 0.01 * each, "of_reachable": 0.008 / 0.01 * each},
            early_share=early,
            break_even=break_even,
            mode=mode,
        )
        for refill, each in ((False, speed_up), (True, refilled))
    )
    run = TimedRun(0.01, 100.0, latency)
    speed = Speed(32, 10, 3, 0.01, (0.004, 0.012), run, TimedRun(full, 1 / full, latency), entries, channels_last=True)
    named = {"checkpoint": "digest", "device": "CPU", "threads": 2, "channels_last": True, "task": "classification"}
    rest = {"criterion": "margin", "split": "test", "num_rows": 10, "seed": 0, "out_of_reach": (1.0,)}
    return Bench(**named, **rest, versions={"torch": "2.14"}, measured=(speed,))


def test_what_does_not_pay_is_said():
    """The full pass takes the plain backbone's time here, so it is what is taken where early exit takes longer."""
    at = "At batch size 32 and 75%"
    line = f"{at} the full pass takes 1.00 × the plain backbone's time, early exit 1.08 ×"
    assert bench_notes(made_up(0.93, 0.99, mode=FULL))[0] == f"{line}."
    assert bench_notes(made_up(0.93, 1.25, mode=FULL))[0] == f"{line}; refilling makes it 0.80 ×."
    assert bench_notes(made_up(1.5, 1.0)) == ["Out of reach: 1%; even leaving at the first exit costs more."]
    slower, advice = made_up(0.8, 0.5, full=0.013), "; that does not pay: predict without --policy, or take a smaller budget"
    line = f"{at} early exit takes 1.25 × the plain backbone's time, the full pass 1.30 ×"
    assert bench_notes(slower)[0] == f"{line}{advice} or another batch size."
    assert (
        bench_notes(made_up(0.96, 0.5, full=0.013))[0]
        == f"{at} early exit takes 1.04 × the plain backbone's time, the full pass 1.30 ×."
    )


def test_the_tables(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    show_bench(made_up(1.25, 0.5))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["plain", "backbone", "100", "1.00", "1.00", "2.00", "3.00"] in lines
    assert ["early", "exit", "75%,", "refilling", "50.0", "0.50", "1.00", "2.00", "3.00"] in lines
    assert ["75%", "2.00", "62%", "1.25", "100%", "50.0%", "40.0%"] in lines
    assert ["1", "50.0"] in lines
    for changes, word in (({"break_even": None}, "never"), ({"break_even": None, "early": 0.0}, "-")):
        show_bench(made_up(1.25, 0.5, **changes))
        assert [line.split()[-1] for line in capsys.readouterr().out.splitlines() if line.strip().startswith("75% ")] == [word]
