"""Some damaged files of each kind, through the commands that read them; `make fuzz` tries thousands."""

from collections import Counter

from hostile.fuzz import draw_cases, run_cases, table
from hostile.targets import all_targets

SEED, CASES = 14, 40


def test_damaged_files_are_refused_in_one_line_or_change_no_answer(world, tmp_path):
    """A different target for each case: a stride through the table, the same in every run."""
    targets = all_targets()
    cases = draw_cases(len(targets) * 2, SEED, targets)[:: len(targets) * 2 // CASES]
    counts: dict[str, Counter[str]] = {}
    for case, verdict in run_cases(cases, world, jobs=2, measured=False, keep=tmp_path / "kept"):
        assert not verdict.faults, f"{case.target.name}, case {case.number}: {verdict.faults}"
        counts.setdefault(case.target.kind, Counter())["accepted" if verdict.code == 0 else "refused"] += 1
    assert sum(each["refused"] for each in counts.values()) > CASES // 3, table(counts)
