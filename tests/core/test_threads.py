"""Threads are settled before torch is there: quotas of made-up control groups, a job's share, and what the user has set."""

import os
import subprocess
import sys

import pytest

from eectl.core import threads
from eectl.core.threads import SHORT, settle_threads


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine of 8 CPUs; write files of its proc and sys, and settle."""
    monkeypatch.setattr(threads, "_usable_cpus", lambda: 8)

    def settle(files=None, **environment):
        for name, text in (files or {}).items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        settle_threads(environment, root=tmp_path)
        return environment

    return settle


V2 = {"proc/self/cgroup": "0::/docker/abc\n"}
V1 = {"proc/self/cgroup": "5:memory:/x\n4:cpu,cpuacct:/docker/abc\n1:name=systemd:/\n0::/\n"}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        (V2 | {"sys/fs/cgroup/docker/abc/cpu.max": "max 100000\n"}, None),
        (V2 | {"sys/fs/cgroup/docker/abc/cpu.max": "350000 100000\n"}, "3"),
        (V2 | {"sys/fs/cgroup/docker/cpu.max": "200000 100000\n", "sys/fs/cgroup/docker/abc/cpu.max": "400000 100000\n"}, "2"),
        (V2 | {"sys/fs/cgroup/cpu.max": "50000 100000\n"}, "1"),  # half a CPU is one thread
        (V2 | {"sys/fs/cgroup/cpu.max": "1600000 100000\n"}, None),  # more than there are
        (
            V1
            | {
                "sys/fs/cgroup/cpu,cpuacct/docker/abc/cpu.cfs_quota_us": "200000\n",
                "sys/fs/cgroup/cpu,cpuacct/docker/abc/cpu.cfs_period_us": "50000\n",
            },
            "4",
        ),
        (V1 | {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"}, None),
        (V1 | {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "300000\n", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"}, "3"),
    ],
)
def test_a_quota_limits_the_threads(machine, files, expected):
    assert machine(files).get("OMP_NUM_THREADS") == expected


def test_a_slurm_job_has_its_share(machine):
    assert machine(SLURM_CPUS_PER_TASK="2")["OMP_NUM_THREADS"] == "2"
    assert machine(V2 | {"sys/fs/cgroup/cpu.max": "300000 100000"}, SLURM_CPUS_PER_TASK="4")["OMP_NUM_THREADS"] == "3"
    assert "OMP_NUM_THREADS" not in machine({"proc/self/cgroup": ""}, SLURM_CPUS_PER_TASK="many")


@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "MKL_NUM_THREADS"])
def test_what_the_user_has_set_stays(machine, name):
    assert machine(SLURM_CPUS_PER_TASK="2", **{name: "5"}) == {"SLURM_CPUS_PER_TASK": "2", name: "5"} | SHORT


@pytest.mark.parametrize("name", ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"])
def test_waiting_is_cut_short_unless_the_user_says_how(machine, name):
    assert machine() == SHORT
    assert machine(**{name: "active"}) == {name: "active"}


def test_the_program_settles_before_torch_is_imported():
    """The number reaches torch, and a machine without limits keeps torch's own choice."""
    code = (
        "import os, sys; from eectl.core.threads import settle_threads; settle_threads(os.environ); "
        "assert 'torch' not in sys.modules; import torch; print(torch.get_num_threads())"
    )
    clean = {name: value for name, value in os.environ.items() if name not in (*threads.NUMBERS, *threads.WAITING)}

    def count(code, **more):
        line = [sys.executable, "-c", code]
        return int(subprocess.run(line, env=clean | more, capture_output=True, text=True, check=True).stdout)

    assert count(code, SLURM_CPUS_PER_TASK="1") == 1
    limit = threads._allowed_cpus({}, threads.Path("/"))
    own = count("import torch; print(torch.get_num_threads())")
    assert count(code) == (own if limit is None else min(own, limit))
