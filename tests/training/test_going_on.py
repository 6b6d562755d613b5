"""Runs that meet what they must not lose, and runs that go on: the resume state, the metrics, kills, power cuts, full disks.

The law of a damaged state: it is refused in one line that names the way out, or what it held is used to the bit.
"""

import errno
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from forked import ended, fork, kill, start_child
from PIL import Image
from running import eectl

from eectl.core import files
from eectl.core.errors import EectlError, Interrupted
from eectl.core.tensor_files import read_any_tensors, read_tensors, write_tensors
from eectl.training.metrics import keep_rows, read_rows
from eectl.training.resume import StateError
from eectl.training.run_folder import KIND, SCHEMA, RunFolder
from eectl.training.train import train
from tests.conftest import small_recipe

VIT = "backbone={name: vit, args: {patch_size: 4, dim: 16, mlp_dim: 16, depth: 2, heads: 2}}"
CHANGES = ["regime=mixed", "epochs=3", "patience=3", "data.limit=100", VIT, "exits.after=[0]"]


def weights(path):
    return read_any_tensors(path)[0]


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def rows(folder):
    """The rows of metrics.jsonl without their times."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in found]


def go(folder, *changes, **more):
    """Train into a folder; the lines that it says."""
    said = []
    train(small_recipe(*CHANGES, *changes), out=folder, device="cpu", say=said.append, **more)
    return said


def stop_at_epoch(folder, number):
    """Train, and send SIGINT when the epoch with this number, of all phases, is shown."""
    shown = []

    def say(line):
        shown.extend([line] if "/3 " in line or " 1/3" in line else [])
        if len(shown) == number:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted):
        train(small_recipe(*CHANGES), out=folder, device="cpu", say=say)


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    """A run that nothing disturbed: two phases of three epochs."""
    folder = tmp_path_factory.mktemp("calm") / "run"
    go(folder)
    return folder


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """A run that was stopped in its second phase, of which one epoch is done."""
    folder = tmp_path_factory.mktemp("half") / "run"
    stop_at_epoch(folder, 4)
    return folder


@pytest.fixture
def stopped(half, tmp_path):
    """A copy of it."""
    return Path(shutil.copytree(half, tmp_path / "run"))


def refused(folder):
    """The one line with which --resume refuses."""
    with pytest.raises(EectlError) as error:
        go(folder, resume=True)
    (line,) = str(error.value).splitlines()
    return line


def test_a_stopped_run_goes_on_to_the_same_weights(stopped, calm):
    state = RunFolder(stopped).load_state()
    assert (state.run.done, state.phase.epoch) == (1, 1)
    said = go(stopped, resume=True)
    assert any("going on with phase 2" in line for line in said) and not any("missing" in line for line in said)
    assert same(weights(stopped / "model.safetensors"), weights(calm / "model.safetensors"))
    assert rows(stopped) == rows(calm)


def test_a_run_that_was_finished_meanwhile_is_not_replaced(tmp_path):
    """B has seen an empty folder and reads its data; A comes and ends; B goes on. Then the same with two processes."""
    folder, other = tmp_path / "run", []

    def say(line):
        if not other and "saves nothing" in line:  # said between the first look at the folder and the lock
            other.append(go(folder, "seed=1"))

    with pytest.raises(EectlError, match="holds a run; --resume to go on with it"):
        train(small_recipe(*CHANGES, "exits.after=[0, 1]"), out=folder, device="cpu", say=say)
    assert other and (folder / "recipe.yaml").read_text().count("seed: 1\n") == 1
    assert [path.name for path in folder.glob("phase-*")] and not (folder / "replaced").exists()


@pytest.mark.parametrize(
    "line",
    [
        ["attach-heads", "MODEL", "--after", "1", "-o", "OUT.safetensors"],
        ["calibrate-thresholds", "MODEL", "--budgets", "90", "-o", "policy.json", "--save-predictions", "OUT.safetensors"],
        ["evaluate", "MODEL", "--budgets", "90", "--save-predictions", "OUT.safetensors"],
        ["predict", "MODEL", "picture.png", "-o", "OUT.csv"],
    ],
    ids=lambda line: line[0],
)
def test_an_output_that_another_command_made_meanwhile_is_not_replaced(calm, tmp_path, monkeypatch, line):
    """It comes after the look at the outputs, when the new file is written and has yet to get its name."""
    Image.new("L", (8, 8)).save(tmp_path / "picture.png")
    out = tmp_path / line[-1]

    def sync(handle):
        if Path(f"/proc/self/fd/{handle}").readlink().name.startswith(".OUT."):
            out.write_text("of another command")
        os.fsync(handle)

    monkeypatch.setattr(files, "sync", sync)
    line = [calm / "model.safetensors" if each == "MODEL" else each for each in line]
    _, said = eectl(*line, *([] if line[0] == "attach-heads" else ["--device", "cpu"]), cwd=tmp_path, code=1)
    assert f"{out.name} came into being while this command ran" in said.splitlines()[-1]
    assert out.read_text() == "of another command" and not list(tmp_path.glob(".OUT*"))


@pytest.mark.process
def test_a_run_that_another_process_has_begun_is_not_replaced(calm, tmp_path):
    """B, a process, waits between its first look at the folder and the lock while A trains, and while A has ended."""
    folder, recipe = RunFolder(tmp_path / "run"), small_recipe(*CHANGES, "exits.after=[0, 1]")
    reached, go_on = os.pipe(), os.pipe()

    def say(line):
        if "saves nothing" in line:
            os.write(reached[1], b".")
            os.read(go_on[0], 1)

    def refusal():
        try:
            train(recipe, out=folder.path, device="cpu", say=say)
        except EectlError as error:
            print(error)
            sys.exit(1)

    numbers = [fork(refusal, said=tmp_path / name) for name in ("first", "second")]
    assert os.read(reached[0], 1) + os.read(reached[0], 1) == b".."
    with folder.locked():  # as A has it while it trains
        os.write(go_on[1], b".")
        (first,) = [number for number in [os.wait()[0]] if number in numbers]
        shutil.copytree(calm, folder.path, dirs_exist_ok=True)
    before = {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()}
    os.write(go_on[1], b".")
    (second,) = set(numbers) - {first}
    assert ended(second) == 1
    said = {number: (tmp_path / name).read_text() for number, name in zip(numbers, ("first", "second"), strict=True)}
    assert "another run is writing here" in said[first] and "holds a run" in said[second]
    assert {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()} == before


def test_a_folder_with_somebodys_recipe_is_not_taken_for_an_empty_one(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    folder.recipe.write_text("seed: 3\n")
    with folder.locked() as holds_a_run:
        assert holds_a_run
    with RunFolder(tmp_path / "other").locked() as holds_a_run:
        assert not holds_a_run


def test_what_was_to_be_replaced_is_kept_whole_when_moving_it_is_stopped(calm, tmp_path):
    """A kill after the first file was moved: the next --overwrite moves the rest, and mixes nothing."""
    folder = RunFolder(Path(shutil.copytree(calm, tmp_path / "run")))
    before = {path.name: path.read_bytes() for path in [*folder.results(), folder.recipe]}
    (folder.path / "replaced").mkdir()
    folder.model.rename(folder.path / "replaced" / folder.model.name)
    folder.set_aside()
    assert {path.name: path.read_bytes() for path in (folder.path / "replaced").iterdir()} == before
    folder.model.write_text("of a replacement that did not come to its end")
    folder.recipe.write_text("{}")
    folder.set_aside()
    assert {path.name: path.read_bytes() for path in (folder.path / "replaced").iterdir()} == before
    assert not folder.results()


def damaged(content, draw):
    """A copy with one flipped bit, a stretch of zeros, an end that is cut off, or a stretch that stands twice."""
    copy, at = bytearray(content), draw.randrange(len(content))
    length = draw.choice([1, 8, 512, 4096, len(content) // 2])
    kind = draw.choice(["flip", "flip", "flip", "zeros", "cut", "twice"])
    if kind == "flip":
        copy[draw.choice([at, at % 4096])] ^= 1 << draw.randrange(8)
    elif kind == "zeros":
        copy[at : at + length] = bytes(len(copy[at : at + length]))
    elif kind == "cut":
        del copy[at:]
    else:
        copy[at:at] = copy[at : at + length]
    return bytes(copy)


def test_a_damaged_state_is_refused_or_holds_what_was_saved(half, tmp_path):
    """Random damage; the header, where numbers of epochs and names stand, is hit as often as the tensors, which are larger."""
    folder, draw, taken = RunFolder(tmp_path), random.Random(14), 0
    content, whole = RunFolder(half).state.read_bytes(), RunFolder(half).load_state()
    folder.state.parent.mkdir()
    for _ in range(240):
        folder.state.write_bytes(damaged(content, draw))
        try:
            found = folder.load_state()
        except StateError as error:
            assert str(folder.state) in str(error) and "\n" not in str(error)
            continue
        taken += 1
        assert (found.run, found.phase) == (whole.run, whole.phase) and same(found.tensors, whole.tensors)
    assert taken < 24  # such as bits of values that nobody reads


def test_a_damaged_state_names_the_last_whole_phase_from_which_training_goes_on(stopped, calm, tmp_path):
    folder = RunFolder(stopped)
    content = folder.state.read_bytes()
    folder.state.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    line = refused(stopped)
    assert "the tensors are not those that were saved" in line and "write it again" not in line
    assert f"eectl train {folder.recipe} --phase 2 --from {folder.phase(1)} -o OTHER goes on from the last whole phase" in line
    assert line.endswith("--overwrite trains again from the start")
    train(folder.recipe, phase=2, start=folder.phase(1), out=tmp_path / "other", device="cpu")
    assert same(weights(tmp_path / "other" / "model.safetensors"), weights(calm / "model.safetensors"))


GONE = object()
FLOAT = torch.tensor(1.0)


@pytest.mark.parametrize(
    ("place", "value", "says"),
    [
        ("phase.epoch", 99, "says 99 epochs of phase 2; phase 2 has up to 3"),
        ("phase.batch", 99, "says epoch 1 and step 99"),
        ("phase.epoch", -1, "phase.epoch: input should be greater than or equal to 0"),
        ("phase.epoch", True, "phase.epoch: input should be a valid integer"),
        ("phase.best_epoch", 3, "says what no 1 epochs"),
        ("phase.best_validation", {"loss": [0.1]}, "has a validation of"),
        ("phase.stopper.best", {"9": 0.5}, "says what no 1 epochs"),
        ("phase.more", 1, "phase.more: extra inputs are not permitted"),
        ("phase.seconds", GONE, "phase.seconds: field required"),
        ("run.done", 7, "says that 7 phases are done, of 2"),
        ("run.spec.num_outputs", 1000, "is the state of another network"),
        ("run.spec.num_outputs", 2 * 10**9, "run.spec.num_outputs: input should be less than or equal to 1000000"),
        ("run.history", [], "says that 1 phases are done"),
        ("run.parent", "0" * 64, "phase-1.safetensors: not the network that the resume state goes on from"),
        ("tensors/optimizer.0.exp_avg", GONE, "optimizer.0.exp_avg is missing"),
        ("tensors/optimizer.0.step", torch.zeros(3), "optimizer.0.step is float32 [3], this run has float32 []"),
        ("tensors/optimizer.999.step", FLOAT, "optimizer.999.step is not part of this run"),
        ("tensors/best.x", FLOAT, "best.x is not part of this run"),
        ("tensors/x", FLOAT, "x is not part of this run"),
        ("tensors/sums", torch.zeros(2, 5), "sums is missing, or of another shape"),
        ("tensors/model.heads.0.linear.bias", torch.zeros(10, dtype=torch.float64), "model.heads.0.linear.bias is"),
    ],
)
def test_a_state_that_another_hand_wrote_is_refused(stopped, place, value, says):
    """Its digest is right, and something else is not."""
    folder = RunFolder(stopped)
    tensors, values = read_tensors(folder.state, kind=KIND, schema=SCHEMA)
    path = place.split("/") if "/" in place else place.split(".")
    *above, last = path
    target = {"tensors": tensors, **values}
    for each in above:
        target = target[each]
    target.pop(last) if value is GONE else target.update({last: value})
    write_tensors(folder.state, tensors, values)
    line = refused(stopped)
    assert says in line and line.endswith("--overwrite trains again from the start")


def test_a_state_without_digests_and_one_of_an_older_eectl(stopped):
    from safetensors.torch import save_file

    folder = RunFolder(stopped)
    tensors, metadata = read_any_tensors(folder.state)
    told = json.loads(metadata["eectl"])
    for change in ({"digest": None}, {"digest": None, "tensors": None}, {"digest": None, "schema": 1}):
        left = {key: value for key, value in {**told, **change}.items() if value is not None}
        save_file(tensors, folder.state, metadata={**metadata, "eectl": json.dumps(left)})
        line = refused(stopped)
        assert line.startswith(f"{folder.state}: ") and line.endswith("--overwrite trains again from the start")


def test_a_phase_that_is_missing_or_of_another_run(stopped, calm, tmp_path):
    folder, other = RunFolder(stopped), RunFolder(tmp_path / "other")
    go(other.path, "seed=1", "epochs=1")
    shutil.copy(other.phase(1), folder.phase(1))
    assert f"{folder.phase(1)}: not the network that the resume state goes on from" in refused(stopped)
    folder.phase(1).write_bytes(b"x" * 100)
    assert f"{folder.phase(1)}: not a safetensors file" in refused(stopped)
    folder.phase(1).unlink()
    said = go(stopped, resume=True)
    assert f"{folder.phase(1)} is missing; the run goes on without it" in said
    assert same(weights(folder.model), weights(calm / "model.safetensors"))


def test_a_run_whose_last_checkpoint_is_gone_before_it_could_be_copied(calm, tmp_path):
    """The kill came between the last state and model.safetensors."""
    folder = RunFolder(Path(shutil.copytree(calm, tmp_path / "run")))
    said = []

    def say(line):
        said.append(line)

    folder.model.unlink()
    train(small_recipe(*CHANGES), out=tmp_path / "twin", device="cpu", say=say)
    # a state after the last phase, as it lies there for a moment
    from eectl.models.checkpoint import load_checkpoint, read_about

    about, loaded = read_about(folder.phase(2)), load_checkpoint(folder.phase(2))
    run = {"done": 2, "splits": about.splits, "spec": about.spec.model_dump(mode="json"), "history": list(about.history)}
    tensors = {f"model.{name}": tensor for name, tensor in loaded.model.state_dict().items()}
    metadata = {"kind": KIND, "schema": SCHEMA, "run": {**run, "parent": loaded.digest}, "phase": None}
    write_tensors(folder.state, tensors, metadata)
    kept = folder.phase(2).read_bytes()
    folder.phase(2).unlink()
    assert "cannot be read" in refused(folder.path)
    folder.phase(2).write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    assert "not those that were saved" in refused(folder.path)
    folder.phase(2).write_bytes(kept)
    go(folder.path, resume=True)
    assert same(weights(folder.model), weights(calm / "model.safetensors")) and rows(folder.path) == rows(calm)


def test_other_things_that_stand_in_the_way_are_one_line_each(stopped):
    folder = RunFolder(stopped)
    recipe = folder.recipe.read_bytes()
    folder.recipe.write_bytes(recipe[:100] + bytes(50) + recipe[150:])
    assert "put it back, or --overwrite to train again" in refused(stopped)
    folder.recipe.write_bytes(recipe)
    folder.metrics.unlink()
    folder.metrics.mkdir()
    assert f"{folder.metrics}: cannot be read (Is a directory)" in refused(stopped)
    lock = folder.state.parent / "lock"
    lock.unlink()
    lock.mkdir()
    assert "cannot be written (Is a directory); name another folder with -o" in refused(stopped)
    lock.rmdir()
    os.mkfifo(lock)  # nobody waits for its other end
    assert f"{folder.metrics}: cannot be read (Is a directory)" in refused(stopped)


def test_what_a_killed_run_left_is_removed_by_the_next(stopped):
    left = [stopped / ".phase-2.safetensors.0a1b2c3d.tmp", stopped / "resume" / ".state.safetensors.0a1b2c3d.tmp"]
    for path in left:
        path.write_bytes(b"half")
    (stopped / ".mine.tmp").write_bytes(b"mine")
    with pytest.raises(EectlError, match="another recipe"):
        go(stopped, "seed=1", resume=True)
    assert not any(path.exists() for path in left) and (stopped / ".mine.tmp").exists()


def test_metrics_are_cut_to_the_rows_that_the_state_knows(stopped, calm):
    """Two epochs that the state does not know, the second half-written."""
    whole = (calm / "metrics.jsonl").read_text().splitlines(keepends=True)
    mine = (stopped / "metrics.jsonl").read_text()
    assert len(mine.splitlines()) == 4
    (stopped / "metrics.jsonl").write_text(mine + whole[4] + whole[5][:70])
    said = go(stopped, resume=True)
    assert rows(stopped) == rows(calm) and not any("missing" in line for line in said)


@pytest.mark.parametrize("kind", ["gone", "empty", "zeros", "run together", "cut in the middle", "not text"])
def test_rows_that_are_lost_are_said_and_cost_no_weights(stopped, calm, kind):
    path = stopped / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    lost = {
        "gone": b"",
        "empty": b"",
        "zeros": lines[0] + bytes(len(lines[1])) + b"".join(lines[2:]),
        "run together": lines[0] + lines[1][:50] + b"".join(lines[2:]),
        "cut in the middle": b"".join(lines)[: len(lines[0]) + 60],
        "not text": lines[0] + lines[1] + lines[2] + b"\xff\xfe\n",
    }[kind]
    path.write_bytes(lost)
    if kind == "gone":
        path.unlink()
    said = go(stopped, resume=True)
    kept = {"zeros": [0, 3, 4, 5], "run together": [0, 3, 4, 5], "cut in the middle": [0, 4, 5], "not text": [0, 1, 2, 4, 5]}
    assert rows(stopped) == [rows(calm)[index] for index in kept.get(kind, [4, 5])]
    assert any(f"{path}: {6 - len(rows(stopped))} of 4 rows missing or damaged" in line for line in said)
    assert same(weights(stopped / "model.safetensors"), weights(calm / "model.safetensors"))


def test_rows_are_kept_by_phase_and_epoch(tmp_path):
    path = tmp_path / "metrics.jsonl"
    more = {"step": 1, "lr": 0.1, "improved": True, "seconds": 1.0}
    more |= {name: [None, 0.5] for name in ("train_loss", "validation_loss", "validation_score")}
    lines = {key: json.dumps({"phase": key[0], "epoch": key[1], **more}) for key in [(1, 1), (1, 2), (2, 1)]}
    text = "".join(line + "\n" for line in lines.values())
    for content, wanted, missing, left in [
        (text, [(1, 1), (1, 2), (2, 1)], 0, text),
        (text, [(1, 1)], 0, lines[1, 1] + "\n"),
        (text, [(1, 1), (1, 2), (1, 3)], 1, lines[1, 1] + "\n" + lines[1, 2] + "\n"),
        (text + text, [(1, 1), (2, 1)], 0, lines[1, 1] + "\n" + lines[2, 1] + "\n"),
        (lines[1, 1] + lines[1, 2] + "\n" + lines[2, 1], [(1, 1), (2, 1)], 1, lines[2, 1] + "\n"),
        (text, [], 0, ""),
    ]:
        path.write_text(content)
        assert keep_rows(path, wanted) == missing and path.read_text() == left
    path.write_text(text + "[1]\n")
    with pytest.raises(EectlError, match=r"metrics\.jsonl: line 4 is no row of an epoch"):
        read_rows(path)
    path.unlink()
    path.symlink_to("/dev/zero")
    with pytest.raises(EectlError, match="a device, or larger than 256 MiB"):
        read_rows(path)


class Disk:
    """What would be on the disk after a power cut: a file's bytes when it was last brought there, a folder's names likewise.

    A file that has a name and no bytes on the disk is empty. It stands in for `files.sync`, through which all writing passes.
    """

    def __init__(self, root, at):
        self.root, self.at, self.calls, self.bytes, self.names = root, at, 0, {}, {root: {}}
        self.states = []  # for each state that was brought there: the rows written, and those on the disk

    def __call__(self, handle):
        self.calls += 1
        path = Path(f"/proc/self/fd/{handle}").readlink()
        if path.is_dir():
            self.names[path] = {each.name: each.stat().st_ino for each in path.iterdir()}
        else:
            self.bytes[path.stat().st_ino] = path.read_bytes()
        if path.name.startswith(".state.safetensors"):
            metrics = self.root / "metrics.jsonl"
            there = metrics.read_bytes() if metrics.exists() else b""
            self.states.append((there, self.bytes.get(metrics.stat().st_ino) if metrics.exists() else b""))
        if self.calls == self.at:
            raise KeyboardInterrupt

    def write(self, folder, of=None):
        folder.mkdir()
        for name, inode in self.names.get(of or self.root, {}).items():
            inner = (of or self.root) / name
            if inner in self.names or name in ("resume", "replaced"):
                self.write(folder / name, inner)
            else:
                (folder / name).write_bytes(self.bytes.get(inode, b""))


@pytest.mark.slow
def test_a_power_cut_at_any_moment_loses_no_epoch_that_a_state_counts_on(calm, tmp_path, monkeypatch):
    monkeypatch.setattr(RunFolder, "due", lambda _: True)  # as often in every run, however quick its disk is
    disk, really = Disk(tmp_path / "run", at=None), files.sync
    monkeypatch.setattr(files, "sync", disk)
    go(tmp_path / "run")
    assert len(disk.states) >= 2 and all(there == kept for there, kept in disk.states)
    for number, at in enumerate(range(3, disk.calls, max(disk.calls // 6, 1))):
        run, after = tmp_path / f"run-{number}", tmp_path / f"after-{number}"
        cut = Disk(run, at)
        monkeypatch.setattr(files, "sync", cut)
        with pytest.raises(KeyboardInterrupt):
            go(run)
        monkeypatch.setattr(files, "sync", really)
        cut.write(after)
        said = go(after, resume=True)
        assert not any("missing" in line for line in said)
        assert same(weights(after / "model.safetensors"), weights(calm / "model.safetensors")) and rows(after) == rows(calm)


@pytest.mark.slow
def test_a_disk_that_is_full_at_every_other_write_loses_nothing(calm, tmp_path, monkeypatch):
    """Each time the same line; the first write that fails is one later each time, so that a run comes further and further."""
    folder, failures = tmp_path / "run", 0
    for number in range(1, 60):
        left = [number]

        def sync(handle, left=left):
            left[0] -= 1
            if not left[0]:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(handle)

        monkeypatch.setattr(files, "sync", sync)
        try:
            go(folder, resume=True, track_to="none")  # a tracker that cannot write stops nothing
        except EectlError as error:
            failures += 1
            assert "No space left on device" in str(error) and "\n" not in str(error)
            assert not list(folder.rglob("*.tmp"))
            continue
        break
    assert failures >= 5
    assert same(weights(folder / "model.safetensors"), weights(calm / "model.safetensors")) and rows(folder) == rows(calm)


@pytest.mark.thorough
@pytest.mark.slow
@pytest.mark.process
def test_sigkill_at_random_moments_ends_in_the_same_weights(calm, tmp_path):
    """The program, killed again and again; it is only ever given the same line."""
    folder, said, draw = tmp_path / "run", tmp_path / "said", random.Random(time.time_ns())
    line = ["train", calm / "recipe.yaml", "--device", "cpu", "-q", "--resume", "-o", folder]
    began = time.monotonic()
    assert ended(start_child(*line, said=said)) == 0
    seconds, kills = time.monotonic() - began, 0
    for _ in range(200):
        if (folder / "model.safetensors").exists() and not RunFolder(folder).state.exists():
            assert same(weights(folder / "model.safetensors"), weights(calm / "model.safetensors")) and rows(folder) == rows(calm)
            assert not list(folder.rglob("*.tmp"))
            if kills >= 20:
                break
            shutil.rmtree(folder)
        number = start_child(*line, said=said)
        time.sleep(draw.uniform(0, seconds))
        if os.waitpid(number, os.WNOHANG)[0]:
            continue
        kill(number)
        kills += 1
    assert kills >= 20 and "Traceback" not in said.read_text()
