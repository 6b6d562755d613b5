"""Damaged files by the thousand: every line of the table of targets, again and again, each case named by a number.

`make fuzz` prints a table and keeps each case that broke the law under build/fuzz with the line that repeats it. A case is a
target, a seed and a number: the same everywhere.
"""

import argparse
import os
import resource
import shutil
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random

from hostile.children import Child, Usage, Verdict, run_all, start_child
from hostile.law import copy_needed, judge
from hostile.sealing import has_seal
from hostile.targets import OPTION, Target, all_targets
from hostile.world import import_all, make_world

USUAL_SECONDS = 3.0  # of CPU, at most, that a line takes with nothing damaged
SEALED = 0.25  # share of the cases of a file with digests in which they are right


@dataclass(frozen=True)
class Case:
    """A target, and the number that all of its damage is drawn from."""

    target: Target
    number: str

    def prepare(self, world: Path, folder: Path) -> tuple[tuple[str, ...], bool]:
        """Fill the folder with what the line reads, damaged; returns the line, and whether no digest can betray it."""
        target, draw = self.target, Random(self.number)
        copy_needed(world, folder, target.needs)
        if OPTION in target.line:
            value = os.fsdecode(target.damage(target.source.encode(), draw))
            return tuple(value if each == OPTION else each for each in target.line), False
        copy_needed(world, folder, [target.source])
        path = folder / target.source
        if target.seal is not None and draw.random() < SEALED and target.seal(path, draw):
            return target.line, True
        path.write_bytes(target.damage(path.read_bytes(), draw))
        return target.line, target.seal is not None and not has_seal(path)


@dataclass(frozen=True)
class Known:
    """What a target's line does with nothing damaged: its answer, what it takes, and where that broke the law already."""

    answer: object
    usage: Usage
    faults: tuple[str, ...] = ()


def learn(targets: Sequence[Target], world: Path, room: Path, *, jobs: int, measured: bool) -> dict[str, Known]:
    """Run each target's line with nothing damaged, which should end well and within the law.

    Without `measured` only those are run whose answers are compared, and what the others take is guessed.
    """
    here = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found = {target.key: Known(None, Usage(USUAL_SECONDS, here)) for target in targets}

    def start(task: tuple[int, Target]) -> Child:
        number, target = task
        folder = room / f"calm-{number}"

        def work() -> Verdict:
            folder.mkdir()
            line = tuple(target.source if each == OPTION else each for each in target.line)
            copy_needed(world, folder, target.needs if OPTION in target.line else (*target.needs, target.source))
            return _judge(line, folder, target)

        return start_child(work, report=folder.with_suffix(".report"))

    to_run = [target for target in targets if measured or target.answer is not None]
    for (number, target), verdict in run_all(enumerate(to_run), start, jobs=jobs):
        bad = [verdict.said] if verdict.code != 0 and OPTION not in target.line else []
        faults = tuple(f"with nothing damaged: {fault}" for fault in (*bad, *verdict.faults))
        found[target.key] = Known(verdict.answer, verdict.usage, faults)
        shutil.rmtree(room / f"calm-{number}")
    return found


def _judge(line: Sequence[str], folder: Path, target: Target) -> Verdict:
    stdin = folder / target.source if "-" in line else None
    return judge(line, folder, writes=target.writes, answer=target.answer, many=target.many, stdin=stdin)


def run_cases(
    cases: Sequence[Case], world: Path, *, jobs: int, measured: bool = True, keep: Path | None = None
) -> Iterator[tuple[Case, Verdict]]:
    """Run cases, `jobs` at a time; gives each with its verdict as it ends. Those that broke the law are kept under `keep`."""
    with tempfile.TemporaryDirectory(prefix="eectl-fuzz-") as scratch:
        room = Path(scratch)
        targets = list({case.target.key: case.target for case in cases}.values())
        facts = learn(targets, world, room, jobs=jobs, measured=measured)

        def start(task: tuple[int, Case]) -> Child:
            number, case = task
            target, folder, known = case.target, room / str(number), facts[case.target.key]

            def work() -> Verdict:
                folder.mkdir()
                if known.faults:
                    return Verdict(None, faults=list(known.faults))
                line, may_differ = case.prepare(world, folder)
                verdict = _judge(line, folder, target)
                if verdict.code == 0 and target.answer is not None and not may_differ and verdict.answer != known.answer:
                    verdict.faults.append("a damaged file was accepted, and the answer is another")
                verdict.answer = None
                return verdict

            return start_child(work, report=folder.with_suffix(".report"), usual=known.usage)

        for (number, case), verdict in run_all(enumerate(cases), start, jobs=jobs):
            if verdict.faults and keep is not None:
                _keep(case, verdict, world, keep)
            shutil.rmtree(room / str(number), ignore_errors=True)
            yield case, verdict


def _keep(case: Case, verdict: Verdict, world: Path, keep: Path) -> None:
    """Keep the files of a case as they were before the line ran, and how to run it again."""
    folder = keep / case.number.replace(":", "-")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    line, _ = case.prepare(world, folder)
    shown = " ".join(map(repr, ("eectl", *line)))
    again = f"PYTHONPATH=.:tests python -m hostile.fuzz --case '{case.number}'"
    (folder / "FAULTS").write_text(
        f"{shown}\n{again}\n\n" + "\n".join(verdict.faults) + "\n", encoding="utf-8", errors="backslashreplace"
    )


def draw_cases(count: int, seed: int, targets: Sequence[Target]) -> list[Case]:
    """Return `count` cases, the targets in turn."""
    return [_case(targets[index % len(targets)], seed, index // len(targets)) for index in range(count)]


def _case(target: Target, seed: int, number: int) -> Case:
    return Case(target, f"{target.key}:{seed}:{number}")


def _named(name: str, targets: Sequence[Target]) -> Case:
    key, seed, number = name.split(":")
    return _case(next(target for target in targets if target.key == key), int(seed), int(number))


def main() -> None:
    """Fuzz, print a table, and end with 1 where a case broke the law."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-n", type=int, default=20_000, help="how many cases")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--kind", action="append", help="only this kind of file; may be repeated")
    parser.add_argument("--case", action="append", help="only this case; may be repeated")
    parser.add_argument("--keep", type=Path, default=Path(__file__).parents[2] / "build" / "fuzz")
    parser.add_argument("--world", type=Path, help="a folder that an earlier call has made, which spares making it")
    given = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    import_all()
    os.environ["OMP_NUM_THREADS"] = "1"
    targets = [target for target in all_targets() if not given.kind or target.kind in given.kind]
    cases = [_named(number, targets) for number in given.case] if given.case else draw_cases(given.n, given.seed, targets)
    with tempfile.TemporaryDirectory(prefix="eectl-world-") as made:
        world = given.world or Path(made)
        if not any(world.iterdir()):
            make_world(world)
        counts: dict[str, Counter[str]] = defaultdict(Counter)
        with suppress(KeyboardInterrupt):  # what was tried until then is shown
            for done, (case, verdict) in enumerate(run_cases(cases, world, jobs=given.jobs, keep=given.keep), 1):
                counts[case.target.kind][_outcome(verdict)] += 1
                if verdict.faults:
                    print(
                        "\n    ".join([f"{case.number} {case.target.name}", *_last_lines(verdict)]), file=sys.stderr, flush=True
                    )
                if given.case:
                    print(verdict.said)
                if done % 1000 == 0:
                    print(f"{done:,} of {len(cases):,}", file=sys.stderr, flush=True)
    print(table(counts))
    sys.exit(1 if any(each["failures"] for each in counts.values()) else 0)


def _last_lines(verdict: Verdict) -> list[str]:
    return [line for fault in verdict.faults for line in fault.strip().splitlines()[-3:]]


def _outcome(verdict: Verdict) -> str:
    return "failures" if verdict.faults else "accepted" if verdict.code == 0 else "refused"


def table(counts: Mapping[str, Counter[str]]) -> str:
    """Return the table of kinds: cases, refused, accepted, failures."""
    columns = ("refused", "accepted", "failures")
    total: Counter[str] = sum(counts.values(), Counter())
    lines = [f"{'kind':<18}{'cases':>8}" + "".join(f"{name:>10}" for name in columns)]
    for kind, each in [*counts.items(), ("all", total)]:
        lines.append(f"{kind:<18}{each.total():>8}" + "".join(f"{each[name]:>10}" for name in columns))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
