"""A few kills, full disks and races over the commands that write; `make faults` tries every moment, and hundreds at random."""

import pytest
from hostile.faults import fault_trials, race_trials, races, run_trials

SEED = 14


def broken(trials, room):
    """What broke the law."""
    tried = list(run_trials(iter(trials), room, jobs=2))
    assert tried
    return [f"{name}: {verdict.faults}" for name, verdict in tried if verdict.faults]


@pytest.mark.slow
def test_a_kill_or_a_full_disk_loses_nothing(world, tmp_path):
    trials = fault_trials(world, tmp_path, seed=SEED, every=False, kills=8, fulls=8)
    assert not broken(trials, tmp_path)


@pytest.mark.slow
def test_of_two_commands_that_write_to_one_name_one_wins_whole(world, tmp_path):
    assert not broken(race_trials(world, races()[::6]), tmp_path)


@pytest.mark.slow
@pytest.mark.thorough
def test_moments_of_writing(world, tmp_path):
    """A kill and a full disk at every fourth of the syncs and of the changes of a file."""
    trials = fault_trials(world, tmp_path, seed=SEED, every=True, kills=0, fulls=0)
    assert not broken(list(trials)[::4], tmp_path)
