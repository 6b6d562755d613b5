"""That the law sees what breaks it: each kind of fault, planted, and files under digests that are right."""

import json
import os
import resource
import subprocess
import time
from pathlib import Path
from random import Random

import pytest
from hostile import law
from hostile.children import CPU_SECONDS, MEMORY, Usage, Verdict, run_all, start_child
from hostile.mutators import METADATA_KEY, damage_json, damage_tensors, open_tensors
from hostile.sealing import has_seal, seal_json, seal_tensors

from eectl.core.errors import EectlError
from eectl.core.json_files import json_text, read_json, sealed
from eectl.core.tensor_files import read_any_tensors


def verdict_of(work, tmp_path, usual=None):
    """The verdict on a piece of work in a child."""
    ((_, verdict),) = run_all([0], lambda _: start_child(work, report=tmp_path / "report", usual=usual), jobs=1)
    return verdict


@pytest.mark.parametrize(("code", "err", "fault"), [
    (1, "eectl: x.json: not JSON; write it again\n", None),
    (1, "note: slow\neectl: x.json: not JSON\n", None),
    (0, "note: slow\n", None),
    (2, "Usage: eectl info\n", None),
    (1, "", "0 lines"),
    (1, "eectl: a\neectl: b\n", "2 lines"),
    (3, "eectl: a\n", "exit code 3"),
    (0, "x.py:1: UserWarning: odd\n", "a library's warning"),
    (1, "eectl: \x1b[31mx\n", "control character"),
    (1, "eectl: " + "x" * 5000, "characters was printed"),
])  # fmt: skip
def test_what_is_printed(code, err, fault):
    found = law.words_of_law(code, "", err, many=False)
    assert (fault is None and not found) or (len(found) == 1 and fault in found[0])


def test_what_a_process_does(tmp_path, monkeypatch):
    """In place of the program's main: things that it must never do."""
    kept, made = tmp_path / "case", tmp_path / "elsewhere"
    kept.mkdir()
    (kept / "photo.png").write_text("mine")
    deeds = {
        "os.posix_spawn|subprocess.Popen": lambda: subprocess.run(["true"], check=True),
        "opened": lambda: made.write_text("x"),
        "photo.png": lambda: (kept / "photo.png").write_text("yours"),
        "new": lambda: (kept / "new").write_text("x"),
        "ZeroDivisionError": lambda: 1 / 0,
    }
    for words, deed in deeds.items():

        def work(deed=deed):
            monkeypatch.setattr(law, "ended", lambda *_, **__: (deed(), (0, "", ""))[1])
            return law.judge(["x"], kept)

        faults = verdict_of(work, tmp_path).faults
        assert any(word in fault for fault in faults for word in words.split("|")), words
        (kept / "photo.png").write_text("mine")
        (kept / "new").unlink(missing_ok=True)


def test_what_a_process_takes(tmp_path):
    def greedy():
        held = bytearray(MEMORY + 2**29)
        held[::4096] = b"x" * len(held[::4096])
        return Verdict(0)

    def busy():
        stop = time.process_time() + 4
        while time.process_time() < stop:
            pass
        return Verdict(0)

    pages = int(Path("/proc/self/statm").read_text().split()[1])  # a child starts with what its parent has, not with its height
    usual = Usage(0.0, pages * resource.getpagesize())
    assert "MB" in verdict_of(greedy, tmp_path, usual).faults[0]
    assert "ran for too long" in verdict_of(busy, tmp_path, Usage(1 - CPU_SECONDS, usual.memory)).faults[0]
    assert "ended with -9" in verdict_of(lambda: os.kill(os.getpid(), 9), tmp_path).faults[0]
    assert verdict_of(lambda: Verdict(1, answer=[1]), tmp_path, usual).faults == []


def test_a_seal_is_right_over_what_is_wrong(world, tmp_path):
    for name, seal in (("policy.json", seal_json), ("model.safetensors", seal_tensors)):
        whole, path, wrong = (world / "run" / name).read_bytes(), tmp_path / name, 0
        for number in range(10):
            path.write_bytes(whole)
            if seal(path, Random(number)):
                assert has_seal(path) and path.read_bytes() != whole
                text = path.read_text() if seal is seal_json else read_any_tensors(path)[1][METADATA_KEY]
                said = json.loads(text)
                assert sealed({key: item for key, item in said.items() if key != "digest"}) == said
                wrong += 1
        assert wrong > 5


def test_damage_under_a_digest_that_is_wrong_never_says_something_else(tmp_path):
    path, refused = tmp_path / "x", 0
    whole = json_text(sealed({"kind": "k", "schema": 1, "values": [1, 2, 3]})).encode()
    for number in range(60):
        path.write_bytes(damage_json(whole, Random(number)))
        if has_seal(path):
            try:
                assert read_json(path, kind="k", schema=1)["values"] == [1, 2, 3]
            except EectlError:
                refused += 1
    assert refused > 30


def test_a_case_is_the_same_each_time(world):
    whole = (world / "run/model.safetensors").read_bytes()
    assert all(damage_tensors(whole, Random(number)) == damage_tensors(whole, Random(number)) for number in range(10))
    header, data = open_tensors(whole)
    assert METADATA_KEY in header["__metadata__"] and len(data) > 10**5
