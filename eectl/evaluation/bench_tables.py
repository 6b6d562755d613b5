"""The tables that `eectl bench` prints, and a sentence wherever early exit does not pay. Measures nothing."""

from rich.table import Table

from eectl.core.console import make_console, make_table, print_table
from eectl.evaluation.tables import budget_name
from eectl.exits.times import FULL, Bench, EarlyExit, Speed, TimedRun

TOLERATED = 1.05  # of the plain backbone's time: what a policy may take

_LEGEND = (
    "x plain: speed against the plain backbone. MAC-ideal: the speed-up if time went as MACs; reachable: with the same mix of "
    "exits, each row at its prefix's own time on full batches; got: how much of each was reached. Break-even: the share of "
    "rows that must leave early, at the same exits, for early exit to take the plain backbone's time."
)


def show_bench(bench: Bench) -> None:
    """Print times, yardsticks and where rows leave, by batch size, and where early exit does not pay."""
    console = make_console()
    layout = ", channels_last" if bench.channels_last else ""
    threads = f"{bench.threads} thread{'s' * (bench.threads > 1)}"
    console.print(
        f"{bench.device}, {threads}, torch {bench.versions['torch']}; {bench.criterion}; rows of the {bench.split} split, "
        f"already on the device and normalised, {bench.precision}{layout}; medians of interleaved rounds",
        markup=False,
    )
    for speed in bench.measured:
        layout = ", not channels_last" if bench.channels_last and not speed.channels_last else ""
        title = f"batch size {speed.batch_size}: {speed.num_rows:,} rows, {speed.num_rounds} rounds{layout}"
        print_table(console, title, _speed_table(speed))
        print_table(console, f"batch size {speed.batch_size}: what early exit reached", _yardstick_table(speed))
    most = max(bench.measured, key=lambda speed: speed.num_rows)
    print_table(console, f"% of {most.num_rows:,} rows that leave at each exit, by budget", _leave_table(most))
    console.print(_LEGEND, markup=False)
    for sentence in bench_notes(bench):
        console.print(sentence, markup=False)


def bench_notes(bench: Bench) -> list[str]:
    """Return sentences on what a policy does not make faster, where the full pass is taken, and on budgets out of reach."""
    entries = [(speed, entry) for speed in bench.measured for entry in speed.early_exit if not entry.refill]
    notes = [_note(speed, entry) for speed, entry in entries if entry.mode == FULL or entry.speed_up < 1]
    if bench.out_of_reach:
        budgets = ", ".join(map(budget_name, bench.out_of_reach))
        notes.append(f"Out of reach: {budgets}; even leaving at the first exit costs more.")
    return notes


def _note(speed: Speed, entry: EarlyExit) -> str:
    """Return what a budget's better way takes as a multiple of the plain backbone's time, and what to do where it is much."""
    ways = {name: run.seconds / speed.plain_seconds for name, run in (("early exit", entry), ("the full pass", speed.full))}
    (taken, least), (other, more) = sorted(ways.items(), key=lambda way: way[1])
    streams = [each.seconds / speed.plain_seconds for each in speed.early_exit if each.refill and each.budget == entry.budget]
    mends = f"; refilling makes it {streams[0]:.2f} ×" if streams and streams[0] < 1 else ""
    said = f"{taken} takes {least:.2f} × the plain backbone's time, {other} {more:.2f} ×{mends}"
    advice = ""
    if least > TOLERATED and not mends:
        advice = "; that does not pay: predict without --policy, or take a smaller budget or another batch size"
    return f"At batch size {speed.batch_size} and {budget_name(entry.budget)} {said}{advice}."


def _speed_table(speed: Speed) -> Table:
    table = make_table("", "rows/s", "x plain", "p50 ms", "p95 ms", "p99 ms")
    table.columns[0].justify = "left"
    runs: list[tuple[str, TimedRun]] = [("plain backbone", speed.plain), ("all exits, then decide", speed.full)]
    runs += [(f"early exit {_name(entry)}", entry) for entry in speed.early_exit]
    for name, run in runs:
        latency = run.latency_ms
        cells = (_short(run.rows_per_second), f"{speed.plain_seconds / run.seconds:.2f}")
        table.add_row(name, *cells, *map(_short, (latency.p50, latency.p95, latency.p99)))
    return table


def _yardstick_table(speed: Speed) -> Table:
    table = make_table("", "MAC-ideal", "got", "reachable", "got", "leave early", "break-even")
    table.columns[0].justify = "left"
    for entry in speed.early_exit:
        ideal, reachable = (speed.plain_seconds / each for each in (entry.mac_ideal_seconds, entry.reachable_seconds))
        even = "-" if not entry.early_share else "never" if entry.break_even is None else f"{entry.break_even:.1%}"
        table.add_row(
            _name(entry),
            f"{ideal:.2f}",
            f"{entry.of_mac_ideal:.0%}",
            f"{reachable:.2f}",
            f"{entry.of_reachable:.0%}",
            f"{entry.early_share:.1%}",
            even,
        )
    return table


def _leave_table(speed: Speed) -> Table:
    entries = [entry for entry in speed.early_exit if not entry.refill]
    table = make_table("exit", *(budget_name(entry.budget) for entry in entries))
    for index in range(len(speed.prefix_seconds)):
        counts = [entry.left[index] for entry in entries]
        table.add_row(str(index + 1), *(f"{100 * count / speed.num_rows:.1f}" if count else "·" for count in counts))
    return table


def _name(entry: EarlyExit) -> str:
    return f"{budget_name(entry.budget)}{', refilling' * entry.refill}"


def _short(number: float) -> str:
    """Return a number with three digits, whole from 100 on."""
    return f"{number:,.0f}" if number >= 99.95 else f"{number:#.3g}"
