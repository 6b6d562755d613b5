"""Scoring a split with a network that looks its outputs up, against the table of them: alone, in two processes, from a file."""

import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from toy_exits import score, toy_outputs

from eectl.core import distributed
from eectl.core.distributed import World
from eectl.core.errors import EectlError
from eectl.data.splits import Split
from eectl.evaluation.opened import Session, pass_kept, score_split
from eectl.exits.criteria import find_criterion
from eectl.models.backbone import Backbone
from eectl.models.checkpoint import Checkpoint
from eectl.models.heads import ExitOutput
from eectl.models.losses import TASKS
from eectl.recipe.augment_section import AugmentSection

NUM_ROWS = 35


class Lookup(nn.Module):
    """Gives the rows of `logits` [exit, row, class] that its inputs name."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits
        self.num_exits = len(logits)
        self.backbone = SimpleNamespace(lies_channels_last=lambda wish: False)  # noqa: ARG005

    def forward(self, inputs):
        return [ExitOutput(each[inputs]) for each in self.logits]


class Images(nn.Module):
    """A convolution of images that notes how they and its weights lie in memory."""

    def __init__(self, *, prefers):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.num_exits = 1
        self.backbone = SimpleNamespace(
            prefers_channels_last=prefers, lies_channels_last=lambda wish: Backbone.lies_channels_last(self.backbone, wish)
        )
        self.seen = set()

    def forward(self, inputs):
        self.seen |= {each.is_contiguous(memory_format=torch.channels_last) for each in (inputs, self.conv.weight)}
        return [ExitOutput(self.conv(inputs).mean(dim=(2, 3)))]


class RowNumbers:
    """Inputs that are their rows' numbers."""

    def read(self, batches, *, draw=None, visits=None):  # noqa: ARG002
        yield from batches


def session_of(logits, labels, *, task, lengths=None, world=None):
    about = SimpleNamespace(
        task=task,
        eval_batch_size=8,
        recipe={},
        spec=SimpleNamespace(num_outputs=logits.shape[2]),
        data_spec=SimpleNamespace(augment=AugmentSection()),
    )
    ids = np.arange(len(labels), dtype=np.uint64)
    split = Split("test", RowNumbers(), labels, ids, device=torch.device("cpu"), lengths=lengths)
    info = SimpleNamespace(kind="text", mean=(), std=(), classes=())
    data = SimpleNamespace(info=info, splits={"test": split, "other": split})
    checkpoint = Checkpoint(Path("model.safetensors"), Lookup(logits).eval(), about, "digest")
    return Session(checkpoint, data, None, world or World(0, 1, torch.device("cpu")), ())


def made(task, by_length):
    logits, labels = toy_outputs(num_exits=4, num_rows=NUM_ROWS, task=task)
    lengths = torch.randint(3, 20, (NUM_ROWS,), generator=torch.Generator().manual_seed(1)) if by_length else None
    return logits, labels, lengths


def rule_of(task, criterion=None):
    return find_criterion(criterion, task=TASKS[task], num_exits=4)


MAX_SOFTMAX = rule_of("classification")


def same(found, expected):
    names = ("scores", "outcome", "labels") + (("values",) if expected.made.task.predicts_number else ())
    return all(torch.equal(getattr(found, name), getattr(expected, name)) for name in names)


@pytest.mark.parametrize("by_length", [False, True])
@pytest.mark.parametrize(("task", "criterion"), [("classification", "patience"), ("classification", None), ("regression", None)])
def test_a_pass_and_its_file(tmp_path, task, criterion, by_length):
    logits, labels, lengths = made(task, by_length)
    session = session_of(logits, labels, task=task, lengths=lengths)
    expected, rule = score(logits, labels, criterion=criterion, task=task), rule_of(task, criterion)
    for size in (1, 8, NUM_ROWS, 100):
        path = tmp_path / f"{size}"
        found = score_split(session, "test", criterion=rule, save_to=path, batch_size=size)
        assert same(found, expected) and same(score_split(session, "test", criterion=rule, batch_size=size), expected)
        assert torch.equal(load_file(path)["logits"], logits) and torch.equal(load_file(path)["labels"], labels)
    again = score_split(session, "test", criterion=rule, file=path)
    assert same(again, expected) and (again.criterion, again.made.split, again.made.checkpoint) == (rule, "test", "digest")
    assert again.made.fingerprint == found.made.fingerprint == session.data.splits["test"].fingerprint


def test_refusals(tmp_path):
    logits, labels, _ = made("classification", by_length=False)
    session = session_of(logits, labels, task="classification")
    score_split(session, "test", criterion=MAX_SOFTMAX, save_to=tmp_path / "p")
    with pytest.raises(EectlError, match=r"--save-predictions .* and --predictions stands in for the pass; leave one out"):
        score_split(session, "test", criterion=MAX_SOFTMAX, file=tmp_path / "p", save_to=tmp_path / "q")
    other = session_of(logits[:, 1:], labels[1:], task="classification")
    with pytest.raises(EectlError, match="holds the test split, or other rows, where other is needed"):
        score_split(other, "other", criterion=MAX_SOFTMAX, file=tmp_path / "p")
    with pytest.raises(EectlError, match="35 rows for 36 processes"):
        score_split(
            session_of(logits, labels, task="classification", world=World(0, 36, torch.device("cpu"))),
            "test",
            criterion=MAX_SOFTMAX,
        )
    logits[2, 30] = torch.nan
    (tmp_path / "old").write_text("old")
    with pytest.raises(EectlError, match=r"not finite at exit 3 \(1 of 35 rows\)"):
        score_split(session, "test", criterion=MAX_SOFTMAX, save_to=tmp_path / "old")
    assert (tmp_path / "old").read_text() == "old" and {path.name for path in tmp_path.iterdir()} == {"p", "old"}


@pytest.mark.parametrize(
    ("prefers", "recipe", "expected"), [(True, {}, True), (False, {}, False), (True, {"channels_last": False}, False)]
)
def test_channels_last_where_training_has_it(prefers, recipe, expected):
    images = torch.randint(256, (NUM_ROWS, 3, 5, 5), dtype=torch.uint8)
    labels = torch.arange(NUM_ROWS) % 4
    session = session_of(torch.empty(1, NUM_ROWS, 4), labels, task="classification")
    session.data.info.kind, session.data.info.mean, session.data.info.std = "image", (0.5, 0.4, 0.3), (0.2, 0.2, 0.1)
    session.data.splits["test"]._inputs = SimpleNamespace(read=lambda batches, **_: (images[rows] for rows in batches))
    model = Images(prefers=prefers).eval()
    with torch.no_grad():
        plain = (images / 255 - torch.tensor([0.5, 0.4, 0.3])[:, None, None]) / torch.tensor([0.2, 0.2, 0.1])[:, None, None]
        logits = model(plain)[0].logits
    model.seen.clear()
    session.checkpoint.about.recipe = recipe
    session = replace(session, checkpoint=replace(session.checkpoint, model=model))
    found = score_split(session, "test", criterion=MAX_SOFTMAX)
    torch.testing.assert_close(found.scores[0], logits.softmax(dim=1).amax(dim=1))
    assert model.seen == {expected}


def two_processes(folder):
    """What each of two processes does: all cases, and one in which the second process fails."""
    world = distributed.join("cpu")
    for task, criterion in (("classification", "patience"), ("regression", "difference")):
        for by_length in (False, True):
            logits, labels, lengths = made(task, by_length)
            path, rule = folder / f"{task}-{by_length}", rule_of(task, criterion)
            session = session_of(logits, labels, task=task, lengths=lengths, world=world)
            found = score_split(session, "test", criterion=rule, save_to=path)
            assert same(found, score(logits, labels, criterion=criterion, task=task)), path
            if world.is_main:
                assert torch.equal(load_file(path)["logits"], logits) and torch.equal(load_file(path)["labels"], labels), path
    if not world.is_main:
        session.checkpoint.model.forward = None  # a bug, in one process alone
    score_split(session, "test", criterion=rule, save_to=folder / "failed")


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return str(probe.getsockname()[1])


@pytest.mark.process
def test_two_processes_and_one_that_fails(tmp_path):
    """An odd number of rows; a process that fails leaves no file, under any name."""
    line = [
        sys.executable,
        "-c",
        f"import pathlib; from tests.evaluation import test_opened; test_opened.two_processes(pathlib.Path({str(tmp_path)!r}))",
    ]
    tests = Path(__file__).parents[1]
    settings = {
        "PYTHONPATH": f"{tests.parent}:{tests}",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": free_port(),
    }
    both = []
    for rank in ("0", "1"):
        env = os.environ | settings | {"RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": "1"}
        both.append(subprocess.Popen(line, env=env, stderr=subprocess.PIPE, text=True))
    said = [process.communicate(timeout=120)[1] for process in both]
    assert "'NoneType' object is not callable" in said[1]
    assert {path.name for path in tmp_path.iterdir()} == {
        f"{task}-{by_length}" for task in ("classification", "regression") for by_length in (False, True)
    }, said


def test_a_fault_after_the_pass_says_that_it_is_kept():
    with (
        pytest.raises(EectlError, match=r"^x: full; the pass is kept: give --predictions z\.safetensors"),
        pass_kept(Path("z.safetensors")),
    ):
        raise EectlError("x: full")
    with pytest.raises(EectlError, match=r"^x: full$"), pass_kept(None):
        raise EectlError("x: full")
