"""A few kills, full disks and races over the commands that write; `make faults` tries every moment, and hundreds at random."""

import pytest
from hostile.faults import fault_trials, race_trials, races, run_trials

SEED = 14


def broken(trials, room):
    """What broke the law."""
    tried = list(run_trials(trials, room, jobs=2))
    assert len(tried) == len(trials) > 0
    return [f"{name}: {verdict.faults}" for name, verdict in tried if verdict.faults]


@pytest.mark.slow
def test_a_kill_or_a_full_disk_loses_nothing(world, tmp_path):
    assert not broken(fault_trials(world, tmp_path, seed=SEED, kills=6, fulls=6, moments=1), tmp_path)


@pytest.mark.slow
def test_of_two_commands_that_write_to_one_name_one_wins_whole(world, tmp_path):
    assert not broken(race_trials(world, races()[::6]), tmp_path)


@pytest.mark.slow
@pytest.mark.thorough
def test_more_moments_of_writing(world, tmp_path):
    assert not broken(fault_trials(world, tmp_path, seed=SEED + 1, kills=8, fulls=8, moments=4), tmp_path)
