"""Faults in the middle of writing: SIGKILL, a full disk, two commands that write to one place. Each is tried in a child process.

The law: afterwards each output is the old file whole or the new one whole, nothing else was touched, and the next command ends
with what an undisturbed one gives and leaves no temporary file. `make faults` tries every moment at which a command changes a
file, and some at random.
"""

import argparse
import errno
import json
import os
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations_with_replacement
from pathlib import Path
from random import Random
from typing import Any

from hostile.children import FILE_SIZE, Child, Verdict, run_all, start_child
from hostile.law import copy_needed, snapshot, words_of_law
from hostile.world import SMALL, import_all, make_world, words
from running import ended

from eectl.core import files
from eectl.core.errors import EectlError
from eectl.core.json_files import check_seal
from eectl.core.tensor_files import digest, read_any_tensors

OLD = b"what an earlier command wrote\n"
MODEL, POLICY = "run/model.safetensors", "run/policy.json"
CHANGES = ("os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod")  # and opening to write
GROWING = ("os.rename", "os.link", "os.mkdir")  # of these, what a full disk refuses


@dataclass(frozen=True)
class Scenario:
    """A command that writes, from a folder in which its outputs are old files.

    Attributes:
        line: the command.
        needs: what it reads, of the world's folder.
        outputs: what it writes; for `train` one folder, which may be in any state that the next command goes on from.
    """

    name: str
    line: tuple[str, ...]
    needs: tuple[str, ...]
    outputs: tuple[str, ...]


def scenarios() -> list[Scenario]:
    """Return the commands that write files."""

    def scenario(text: str, needs: tuple[str, ...], *outputs: str) -> Scenario:
        options = [option for output in outputs for option in output.split("=")]
        name, *rest = text.split()
        return Scenario(name, (name, *rest, *options, "--overwrite"), needs, tuple(options[1::2]))

    train = ("train", "digits", *SMALL, "--regime", "mixed", "--epochs", "1", "--resume", "-o", "out")
    return [
        Scenario("train", train, (), ("out/",)),
        Scenario("find-lr", ("train", *SMALL, *words("--find-lr --device cpu -q -o l.png --overwrite")), (), ("l.png",)),
        scenario(f"attach-heads {MODEL} --after 2", (MODEL,), "-o=h.safetensors"),
        scenario(f"calibrate-thresholds {MODEL} --device cpu", (MODEL,), "-o=p.json", "--save-predictions=s.safetensors"),
        scenario(f"evaluate {MODEL} --policy {POLICY} --device cpu", (MODEL, POLICY), "-o=e.json", "--plot=e.pdf",
                 "--save-predictions=s.safetensors"),
        Scenario("analyze", words(f"analyze numerical-rank {MODEL} -o . --device cpu -q --overwrite"), (MODEL,),
                 tuple(f"numerical-rank.{form}" for form in ("json", "csv", "png", "pdf"))),
        scenario("report run", ("run/evaluation.json",), "-o=t.md", "-o=t.csv", "-o=c.pdf"),
        scenario(f"predict {MODEL} photos/red --device cpu", (MODEL, "photos/red"), "-o=a.csv"),
        scenario(f"bench {MODEL} --policy {POLICY} --batch-size 2 --rows 4 --seconds 0.01 --device cpu", (MODEL, POLICY),
                 "-o=b.json"),
    ]  # fmt: skip


@dataclass(frozen=True)
class Fault:
    """What happens: `kill` or `full`; and when: at the `at`-th `sync` or `change`, after so many `seconds`, from a `size` on."""

    what: str
    when: str
    at: float

    def arm(self, folder: Path) -> None:
        """Let it happen to this process."""
        if self.when == "sync":
            self._arm_sync()
        elif self.when == "change":
            self._arm_change(str(folder.resolve()))
        elif self.when == "size":
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(self.at), FILE_SIZE))

    def _arm_sync(self) -> None:
        count, real = Counter[str](), files.sync

        def sync(handle: int) -> None:
            count["sync"] += 1
            if count["sync"] == self.at:
                self._happen()
            real(handle)

        files.sync = sync

    def _arm_change(self, folder: str) -> None:
        count: Counter[str] = Counter()

        def hear(event: str, arguments: tuple[Any, ...]) -> None:
            if is_change(event, arguments, folder, growing=self.what == "full"):
                count["change"] += 1
                if count["change"] == self.at:
                    self._happen()

        sys.addaudithook(hear)

    def _happen(self) -> None:
        if self.what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def is_change(event: str, arguments: Sequence[Any], folder: str, *, growing: bool) -> bool:
    """Return whether an audit event is a change of the folder's files; with `growing`, one that takes room."""
    if event == "open":
        path, _, flags = arguments
        writes = isinstance(flags, int) and bool(flags & (os.O_CREAT if growing else os.O_CREAT | os.O_TRUNC))
        return writes and _lies_in(path, folder)
    return event in (GROWING if growing else CHANGES) and _lies_in(arguments[0], folder)


def _lies_in(path: object, folder: str) -> bool:
    return isinstance(path, str | bytes | os.PathLike) and Path(os.fsdecode(path)).absolute().is_relative_to(folder)


@dataclass(frozen=True)
class Calm:
    """What an undisturbed command leaves and takes: outputs, moments, seconds."""

    outputs: Mapping[str, bytes]
    num_syncs: int
    num_changes: int
    num_growing: int
    seconds: float


def fill(scenario: Scenario, world: Path, folder: Path) -> None:
    """Make the folder of a scenario, with old outputs."""
    folder.mkdir()
    copy_needed(world, folder, scenario.needs)
    for name in scenario.outputs:
        if not name.endswith("/"):
            (folder / name).write_bytes(OLD)


def calm(scenario: Scenario, world: Path, folder: Path) -> Calm:
    """Run a scenario undisturbed, in a child, counting the moments at which it could be disturbed."""
    fill(scenario, world, folder)
    note = folder.with_suffix(".counts")

    def work() -> int:
        count, real = Counter[str](), files.sync
        inside = str(folder.resolve())

        def sync(handle: int) -> None:
            count["syncs"] += 1
            real(handle)

        def hear(event: str, arguments: tuple[Any, ...]) -> None:
            count["changes"] += is_change(event, arguments, inside, growing=False)
            count["growing"] += is_change(event, arguments, inside, growing=True)

        files.sync = sync
        sys.addaudithook(hear)
        began = time.monotonic()
        code, _, err = ended(*scenario.line, cwd=folder)
        took = time.monotonic() - began
        assert code == 0, err
        note.write_text(json.dumps({"counts": count, "seconds": took}))
        return 0

    assert run_apart(work) == 0, scenario.name
    said = json.loads(note.read_text())
    counts = Counter(said["counts"])
    left = {name: (folder / name).read_bytes() for name in read_outputs(scenario, folder)}
    shutil.rmtree(folder)
    return Calm(left, counts["syncs"], counts["changes"], counts["growing"], said["seconds"])


def read_outputs(scenario: Scenario, folder: Path) -> list[str]:
    """Return the names of a scenario's files; of a run those that say what came of it."""
    if scenario.outputs == ("out/",):
        return ["out/model.safetensors", "out/phase-1.safetensors", "out/metrics.jsonl"]
    return list(scenario.outputs)


def run_apart(work: Callable[[], int], *, kill_after: float | None = None) -> int:
    """Run `work` in a child, killed after so many seconds; its return value, or the negative number of a signal that ended it."""
    child = os.fork()
    if child == 0:
        code = 70
        try:
            code = work()
        finally:
            os._exit(code)
    if kill_after is not None:
        handle = os.pidfd_open(child)
        if not select.select([handle], [], [], kill_after)[0]:
            os.kill(child, signal.SIGKILL)
        os.close(handle)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def try_fault(scenario: Scenario, fault: Fault, undisturbed: Calm, world: Path, folder: Path) -> Verdict:
    """Disturb a scenario, look at what is left, and run the next command."""
    fill(scenario, world, folder)
    before, note = snapshot(folder), folder.with_suffix(".said")

    def work() -> int:
        fault.arm(folder)
        said = ended(*scenario.line, cwd=folder)
        resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_SIZE, FILE_SIZE))
        note.write_text(json.dumps(said))
        return said[0]

    code = run_apart(_quiet(work, note), kill_after=fault.at if fault.when == "seconds" else None)
    faults = []
    if note.exists():
        said = json.loads(note.read_text())
        if isinstance(said, str):
            faults.append(f"it broke: {said}")
        else:
            code, out, err = said
            faults += words_of_law(code, out, err, many=False)
    faults += [f"after {fault}: {each}" for each in whats_left(scenario, before, undisturbed, folder, ended_well=code == 0)]
    if fault.what == "full":
        faults += [f"left behind: {name}" for name in snapshot(folder) if name.endswith(".tmp")]
    faults += _next(scenario, undisturbed, folder)
    return Verdict(code, faults=faults)


def _quiet(work: Callable[[], int], note: Path) -> Callable[[], int]:
    """Let an exception of `work` be noted, not printed."""

    def run() -> int:
        import traceback

        try:
            return work()
        except BaseException:
            text = json.dumps(traceback.format_exc())
            resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_SIZE, FILE_SIZE))
            with open(os.open(note, os.O_WRONLY | os.O_CREAT), "w") as file:
                file.write(text)
            return 70

    return run


def whats_left(
    scenario: Scenario, before: Mapping[str, str], undisturbed: Calm, folder: Path, *, ended_well: bool
) -> Iterator[str]:
    """Say what is neither as before nor as an undisturbed command leaves it."""
    for name in scenario.outputs:
        if name.endswith("/"):
            continue
        path = folder / name
        is_old = path.is_file() and path.read_bytes() == OLD
        if not (is_old and not ended_well) and not is_whole(path, undisturbed.outputs[name]):
            yield f"{name} is {'still the old one' if is_old else 'neither the old file nor the new one'}"
    after = snapshot(folder)
    own = tuple(each.rstrip("/") for each in scenario.outputs)
    for name in before.keys() | after.keys():
        if before.get(name) != after.get(name) and not name.startswith(own) and not name.endswith(".tmp"):
            yield f"{name} was changed, made or removed"


def is_whole(path: Path, expected: bytes) -> bool:
    """Return whether a file says what an undisturbed command wrote, as far as that is the same each time."""
    if not path.is_file():
        return False
    found = path.read_bytes()
    if path.suffix == ".pdf":  # says when it was made
        return found.startswith(b"%PDF") and found.rstrip().endswith(b"%%EOF")
    if path.suffix == ".safetensors":
        with tempfile.NamedTemporaryFile(suffix=".safetensors") as other:
            other.write(expected)
            other.flush()
            try:
                return digest(read_any_tensors(path)[0]) == digest(read_any_tensors(Path(other.name))[0])
            except EectlError:
                return False
    if path.name == "b.json":  # holds times
        try:
            check_seal(json.loads(found), where=path, again="")
        except (EectlError, ValueError):
            return False
        return True
    if path.suffix == ".jsonl":
        return _rows(found) == _rows(expected)
    return found == expected


def _rows(content: bytes) -> list[dict[str, Any]]:
    try:
        return [{key: item for key, item in json.loads(line).items() if key != "seconds"} for line in content.splitlines()]
    except ValueError:
        return [{"not": "rows"}]


def _next(scenario: Scenario, undisturbed: Calm, folder: Path) -> Iterator[str]:
    """Run the same command again, undisturbed, and say what is not as it should then be."""
    note = folder.with_suffix(".next")

    def work() -> int:
        note.write_text(json.dumps(ended(*scenario.line, cwd=folder)))
        return 0

    run_apart(_quiet(work, note))
    said = json.loads(note.read_text())
    if isinstance(said, str) or said[0] != 0:
        yield f"the next command did not end well: {said if isinstance(said, str) else said[2]}"
        return
    for name in read_outputs(scenario, folder):
        if not is_whole(folder / name, undisturbed.outputs[name]):
            yield f"after the next command {name} is not what an undisturbed one writes"
    yield from (f"after the next command {name} is still there" for name in snapshot(folder) if name.endswith(".tmp"))


def every_fault(undisturbed: Calm) -> Iterator[Fault]:
    """Give a kill and a full disk at every moment at which a scenario changes a file."""
    for number in range(1, undisturbed.num_syncs + 1):
        yield Fault("kill", "sync", number)
        yield Fault("full", "sync", number)
    yield from (Fault("kill", "change", number) for number in range(1, undisturbed.num_changes + 1))
    yield from (Fault("full", "change", number) for number in range(1, undisturbed.num_growing + 1))


def random_faults(undisturbed: Calm, draw: Random, *, kills: int, fulls: int) -> Iterator[Fault]:
    """Give kills after random times, and disks on which no file can grow beyond a random size."""
    largest = max(map(len, undisturbed.outputs.values()))
    yield from (Fault("kill", "seconds", draw.uniform(0, 1.1 * undisturbed.seconds)) for _ in range(kills))
    yield from (Fault("full", "size", draw.randrange(largest)) for _ in range(fulls))


# Two commands at once: the lines write to one place, and each says which of two it was by what it writes.
@dataclass(frozen=True)
class Race:
    """Two lines that share their outputs, started at the same moment; `needs` are read, `overwrite` is given to both or none."""

    lines: tuple[tuple[str, ...], tuple[str, ...]]
    needs: tuple[str, ...]
    outputs: tuple[str, ...]

    @property
    def name(self) -> str:
        """The two commands and what they share."""
        return f"{self.lines[0][0]} and {self.lines[1][0]}{' --overwrite' * ('--overwrite' in self.lines[0])}"

    @property
    def may_mix(self) -> bool:
        """Predictions are there as soon as the pass is done: of two commands that overwrite both, one file of each may stay."""
        return "--save-predictions" in self.lines[0] and "--overwrite" in self.lines[0]


def races() -> list[Race]:
    """Return each pair of commands that write to one name, with and without --overwrite."""
    device, both, budgets = ("--device", "cpu"), ("-o", "x.json", "--save-predictions", "x.safetensors"), ("30", "60")
    bench = ("bench", MODEL, "--batch-size", "2", "--rows", "4", "--seconds", "0.01", *device, "-o", "x.json")
    writers: dict[tuple[str, ...], list[tuple[tuple[str, ...], ...]]] = {
        ("x.json", "x.safetensors"): [
            _twice("calibrate-thresholds", MODEL, *device, *both, "--budgets", of=budgets),
            _twice("evaluate", MODEL, *device, *both, "--budgets", of=budgets),
        ],
        ("x.json",): [
            (bench, bench),
            _twice("report", "run", "-o", "x.json", "--label", of=("run=a", "run=b")),
            _twice("evaluate", MODEL, *device, "-o", "x.json", "--budgets", of=budgets),
        ],
        ("x.safetensors",): [_twice("attach-heads", MODEL, "-o", "x.safetensors", "--after", of=("2", "3"))],
        ("x.csv", ): [
            _twice("predict", MODEL, *device, "-o", "x.csv", of=("photos/red", "photos/green")),
            _twice("report", "run", "-o", "x.csv", "--label", of=("run=a", "run=b")),
        ],
        ("x.pdf", "x.csv"): [_twice("report", "run", "-o", "x.pdf", "-o", "x.csv", "--label", of=("run=a", "run=b"))],
        ("x/model.safetensors", "x/metrics.jsonl"): [
            _twice("train", "digits", *SMALL, "--epochs", "1", "-o", "x", "--regime", "joint", "--seed", of=("1", "2")),
        ],
    }  # fmt: skip
    found = []
    for outputs, lines in writers.items():
        for one, two in combinations_with_replacement(lines, 2):
            for more in ((), ("--overwrite",)):
                pair = ((*one[0], *more), (*two[1], *more))
                found.append(Race(pair, (MODEL, POLICY, "run/evaluation.json", "photos"), outputs))
    return found


def _twice(*line: str, of: tuple[str, str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    return (*line, of[0]), (*line, of[1])


def try_race(race: Race, world: Path, folder: Path) -> Verdict:
    """Run both lines at the same moment, and each alone; the outputs must be those of one of them, whole."""
    expected = []
    for number, line in enumerate(race.lines):
        alone = folder.with_name(f"{folder.name}-{number}")
        alone.mkdir()
        copy_needed(world, alone, race.needs)
        assert run_apart(lambda line=line, alone=alone: ended(*line, cwd=alone)[0]) == 0, line
        expected.append({name: (alone / name).read_bytes() for name in race.outputs})
        shutil.rmtree(alone)
    folder.mkdir()
    copy_needed(world, folder, race.needs)
    ends, faults = _run_both(race, folder), []
    for said in ends:
        faults += [f"it broke: {said}"] if isinstance(said, str) else words_of_law(*said, many=False)
    codes = [said[0] if isinstance(said, list) else 70 for said in ends]
    won = [
        number for number, files_ in enumerate(expected) if all(_same(folder / name, content) for name, content in files_.items())
    ]
    each_of_one = all(any(_same(folder / name, files_[name]) for files_ in expected) for name in race.outputs)
    if 0 in codes and not (won or (race.may_mix and each_of_one)):
        faults.append(f"the outputs are not those of one of the two: codes {codes}")
    if codes == [0, 0] and "--overwrite" not in race.lines[0]:
        faults.append("both say that all is well, and the outputs of one were replaced")
    if sorted(codes) == [0, 1] and won and codes.index(0) not in won:
        faults.append("the outputs are those of the one that says it failed")
    faults += [f"left behind: {name}" for name in snapshot(folder) if name.endswith(".tmp")]
    return Verdict(max(codes), faults=faults)


def _same(path: Path, content: bytes) -> bool:
    return (
        is_whole(path, content)
        if path.suffix != ".json" or b'"bench"' not in content[:200]
        else b'"bench"' in path.read_bytes()[:200]
    )


def _run_both(race: Race, folder: Path) -> list[Any]:
    """Start two children, let them go together, and return how each ended."""
    gate_out, gate_in = os.pipe()
    children, notes = [], [folder.with_suffix(f".said-{number}") for number in (0, 1)]
    for line, note in zip(race.lines, notes, strict=True):

        def work(line: tuple[str, ...] = line, note: Path = note) -> int:
            os.close(gate_in)
            os.read(gate_out, 1)  # ends when the parent closes the other end
            note.write_text(json.dumps(ended(*line, cwd=folder)))
            return 0

        child = os.fork()
        if child == 0:
            try:
                _quiet(work, note)()
            finally:
                os._exit(0)
        children.append(child)
    os.close(gate_in)
    for child in children:
        os.waitpid(child, 0)
    os.close(gate_out)
    return [json.loads(note.read_text()) for note in notes]


Trial = tuple[str, Callable[[Path], Verdict]]


def fault_trials(world: Path, room: Path, *, seed: int, kills: int, fulls: int, moments: int | None = None) -> list[Trial]:
    """Return disturbances of each scenario: `kills` and `fulls` at random over all, and so many of each one's moments of writing.

    Without `moments` all of them are taken.
    """
    table, trials = scenarios(), []
    draw = Random(seed)
    for number, scenario in enumerate(table):
        undisturbed = calm(scenario, world, room / f"calm-{number}")
        share = [count // len(table) + (number < count % len(table)) for count in (kills, fulls)]
        chosen = list(random_faults(undisturbed, draw, kills=share[0], fulls=share[1]))
        every = list(every_fault(undisturbed))
        chosen += every if moments is None else draw.sample(every, min(moments, len(every)))
        for fault in chosen:
            work = partial(try_fault, scenario, fault, undisturbed, world)
            trials.append((f"{scenario.name}: {fault.what} at {fault.when}", work))
    return trials


def race_trials(world: Path, chosen: Sequence[Race]) -> list[Trial]:
    """Return what tries each race."""
    return [(race.name, partial(try_race, race, world)) for race in chosen]


def run_trials(trials: Sequence[Trial], room: Path, *, jobs: int) -> Iterator[tuple[str, Verdict]]:
    """Run trials in children, `jobs` at a time; gives each one's name and verdict."""

    def start(task: tuple[int, Trial]) -> Child:
        number, (_, work) = task
        folder = room / f"trial-{number}"
        return start_child(lambda: work(folder), report=folder.with_suffix(".report"))

    for (number, (name, _)), verdict in run_all(enumerate(trials), start, jobs=jobs):
        yield name, verdict
        for path in (*room.glob(f"trial-{number}"), *room.glob(f"trial-{number}.*")):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def main() -> None:
    """Try all faults, print a table, and end with 1 where one broke the law."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200, help="how many kills at random, over all commands")
    parser.add_argument("--fulls", type=int, default=200, help="how many full disks at random")
    parser.add_argument("--moments", type=int, help="at most so many moments of writing of each command; default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--world", type=Path, help="a folder that an earlier call has made, which spares making it")
    given = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    import_all()
    with tempfile.TemporaryDirectory(prefix="eectl-faults-") as made:
        room = Path(made)
        world = given.world or room / "world"
        world.mkdir(exist_ok=True)
        if not any(world.iterdir()):
            make_world(world)
        trials = [*fault_trials(world, room, seed=given.seed, kills=given.kills, fulls=given.fulls, moments=given.moments),
                  *race_trials(world, races())]  # fmt: skip
        counts: dict[str, Counter[str]] = defaultdict(Counter)
        for name, verdict in run_trials(trials, room, jobs=given.jobs):
            counts[name]["tried"] += 1
            counts[name]["broken"] += bool(verdict.faults)
            if verdict.faults:
                print(
                    f"{name}\n    " + "\n    ".join(line for each in verdict.faults for line in each.splitlines()[-3:]),
                    file=sys.stderr,
                )
    for name, each in sorted(counts.items()):
        print(f"{name:<60}{each['tried']:>6}{each['broken']:>6}")
    print(f"{'all':<60}{sum(each['tried'] for each in counts.values()):>6}{sum(each['broken'] for each in counts.values()):>6}")
    sys.exit(1 if any(each["broken"] for each in counts.values()) else 0)


if __name__ == "__main__":
    main()
