"""Losses and weights against hand counts."""

import math

import pytest
import torch

from eectl.errors import EectlError
from eectl.losses import TASKS, exit_weights


def test_classification_loss_by_hand():
    logits = torch.tensor([[0.0, math.log(3.0)], [0.0, 0.0]])
    targets = torch.tensor([1, 0])
    assert TASKS["classification"].loss(logits, targets, 0.0) == pytest.approx((math.log(4 / 3) + math.log(2)) / 2)
    soft = torch.tensor([[0.5, 0.5], [1.0, 0.0]])
    by_hand = (0.5 * math.log(4) + 0.5 * math.log(4 / 3) + math.log(2)) / 2
    assert TASKS["classification"].loss(logits, soft, 0.0) == pytest.approx(by_hand)
    assert TASKS["classification"].points(logits, targets).tolist() == [1.0, 1.0]


def test_label_smoothing_mixes_with_the_uniform_distribution():
    logits, targets = torch.randn(5, 4), torch.tensor([0, 1, 2, 3, 0])
    smooth = 0.9 * torch.nn.functional.one_hot(targets, 4) + 0.1 / 4
    loss = TASKS["classification"].loss
    assert loss(logits, targets, 0.1) == pytest.approx(loss(logits, smooth, 0.0).item())


def test_regression_by_hand():
    outputs, targets = torch.tensor([[1.0], [3.0]]), torch.tensor([0.0, 1.0])
    assert TASKS["regression"].loss(outputs, targets, 0.0) == 2.5
    assert TASKS["regression"].points(outputs, targets).tolist() == [1.0, 4.0]
    assert not TASKS["regression"].higher_is_better


def test_weights():
    assert exit_weights("uniform", num_exits=4, taking_part=[2, 4]) == [0.5, 0.5]
    assert exit_weights([1, 1, 2], num_exits=3, taking_part=[1, 2, 3]) == [0.25, 0.25, 0.5]
    assert exit_weights([1, 1, 3], num_exits=3, taking_part=[2, 3]) == [0.25, 0.75]
    with pytest.raises(EectlError, match="2 numbers for 3 exits"):
        exit_weights([1, 1], num_exits=3, taking_part=[1])
    with pytest.raises(EectlError, match="all have weight 0"):
        exit_weights([1, 0], num_exits=2, taking_part=[2])
