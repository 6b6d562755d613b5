"""Trained networks for the tests of this folder, and what evaluate sees of their test splits, row by row."""

import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from eectl.cli import app as cli
from eectl.core.distributed import World
from eectl.evaluation.opened import open_session, preparing, score_split
from eectl.exits.policy import Policy, choose, read_policies, write_policies
from eectl.training.train import train

ALONE = World(0, 1, torch.device("cpu"))


def run_cli(*arguments):
    """Run the program in this process; its exit code."""
    before, sys.argv = sys.argv, ["eectl", *map(str, arguments)]
    try:
        with pytest.raises(SystemExit) as stop:
            cli.main()
    finally:
        sys.argv = before
    return stop.value.code or 0


def made(recipe, folder):
    """Train `recipe` into `folder` and calibrate it; the paths."""
    train(recipe, out=folder, device="cpu", quiet=True)
    checkpoint, policy = folder / "model.safetensors", folder / "policy.json"
    assert run_cli("calibrate-thresholds", checkpoint, "--budgets", "1,40,60,100", "-o", policy, "--device", "cpu") == 0
    return SimpleNamespace(folder=folder, checkpoint=checkpoint, policy=policy)


def copy_with_budget_50(folder, to):
    """Copy a network and its policy, whose budget of 60 % the documentation's examples call 50."""
    (to / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    policies = read_policies(folder / "policy.json")
    renamed = [replace(entry, budget=50.0) if entry.budget == 60 else entry for entry in policies.budgets]
    write_policies(to / "policy.json", replace(policies, budgets=tuple(renamed)))


def expected(run, budget):
    """What evaluate sees of the test split: exits from 1, all exits' logits [row, exit, class], and which rows' scores lie clear
    of every threshold."""
    session = open_session(run.checkpoint, world=ALONE, needs=("test",))
    policies = read_policies(run.policy)
    found = score_split(session, "test", criterion=policies.criterion)
    rule = Policy(policies.criterion, next(each.thresholds for each in policies.budgets if each.budget == budget))
    near = (found.scores[:-1] - torch.tensor(rule.thresholds)[:, None]).abs().amin(0)
    split = session.data.splits["test"]
    with torch.inference_mode():
        parts = [preparing(session)(split.rows(torch.tensor([row]))) for row in range(len(split))]
        logits = [torch.cat([each.logits for each in session.checkpoint.model(part)]) for part in parts]
    return SimpleNamespace(
        exits=(choose(found.scores, rule.thresholds) + 1).tolist(), logits=torch.stack(logits).float(), found=found,
        clear=(near > 1e-5).tolist(), split=split, costs=session.costs.shares, parts=parts,
    )  # fmt: skip


def check_same(answers, rows, classes):
    """Each clear row's answer is what the network says at the exit that evaluate chose."""
    assert len(answers) == len(rows.exits) and sum(rows.clear) > 0.9 * len(rows.clear)
    for row, answer in enumerate(answers):
        if not rows.clear[row]:
            continue
        assert answer.exit == rows.exits[row]
        logits = rows.logits[row, answer.exit - 1]
        if not classes:
            assert answer.value == pytest.approx(float(logits[0]), abs=1e-4)
            continue
        assert answer.probability == pytest.approx(float(logits.softmax(0).max()), abs=1e-4)
        assert answer.label == classes[int(logits.argmax())]
