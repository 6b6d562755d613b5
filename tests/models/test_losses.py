"""Losses and weights against hand counts."""

import math

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight

from eectl.models.losses import TASKS, balanced_weights, distil, exit_points, total_weight, weighted_exit_losses


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


@pytest.mark.parametrize("name", TASKS)
def test_the_loss_is_the_mean_of_the_rows_losses(name):
    torch.manual_seed(0)
    outputs = torch.randn(6, 4 if name == "classification" else 1)
    targets = torch.randint(4, (6,))
    smoothing = 0.1 if name == "classification" else 0.0
    per_row = [TASKS[name].loss(outputs[i : i + 1], targets[i : i + 1], smoothing).item() for i in range(6)]
    assert TASKS[name].losses(outputs, targets, smoothing).tolist() == pytest.approx(per_row)
    assert TASKS[name].loss(outputs, targets, smoothing).item() == pytest.approx(sum(per_row) / 6)


def test_balanced_weights_are_scikit_learns():
    labels = torch.tensor([0] * 7 + [1] * 2 + [3])
    expected = compute_class_weight("balanced", classes=np.array([0, 1, 3]), y=labels.numpy())
    assert balanced_weights(labels)[[0, 1, 3]].numpy() == pytest.approx(expected)
    assert balanced_weights(labels)[2] == 0 and balanced_weights(labels).dtype == torch.float64
    logits = torch.randn(3, 10, 4, generator=torch.Generator().manual_seed(0))
    points = exit_points(TASKS["classification"], list(logits), labels, balanced_weights(labels)[labels]) / 10
    recalls = [np.mean([(each.argmax(1)[labels == c] == c).float().mean() for c in (0, 1, 3)]) for each in logits]
    assert points.numpy() == pytest.approx(recalls)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("mixed", [False, True])
def test_weighted_losses_are_torchs(mixed, smoothing):
    torch.manual_seed(0)
    logits, by_class = list(torch.randn(3, 9, 4)), torch.tensor([0.3, 1.0, 2.5, 4.0])
    targets = torch.softmax(torch.randn(9, 4), dim=1) if mixed else torch.randint(4, (9,))
    theirs = torch.nn.CrossEntropyLoss(weight=by_class, label_smoothing=smoothing)
    over = total_weight(targets, by_class)
    found = weighted_exit_losses(logits, targets, smoothing, class_weights=by_class, total=over)
    torch.testing.assert_close(found, torch.stack([theirs(each, targets) for each in logits]))


def kl_by_hand(student, teachers, temperature):
    """T² · Σ p log(p / q), mean over rows, in numpy."""

    def softmax(logits):
        powers = np.exp(np.asarray(logits, dtype=np.float64) / temperature)
        return powers / powers.sum(axis=1, keepdims=True)

    p, q = np.mean([softmax(teacher) for teacher in teachers], axis=0), softmax(student)
    return temperature**2 * (p * np.log(p / q)).sum(axis=1).mean()


@pytest.mark.parametrize(
    ("teacher", "pairs"),
    [
        ("last", [(0, [3]), (1, [3]), (2, [3])]),
        ("next", [(0, [1]), (1, [2]), (2, [3])]),
        ("later", [(0, [1, 2, 3]), (1, [2, 3]), (2, [3])]),
    ],
)
def test_distillation_by_hand(teacher, pairs):
    torch.manual_seed(1)
    outputs = [torch.randn(5, 3, requires_grad=True) for _ in range(4)]
    arrays = [output.detach().numpy() for output in outputs]
    loss = distil(outputs, teacher=teacher, temperature=3.0, task=TASKS["classification"])
    by_hand = np.mean([kl_by_hand(arrays[k], [arrays[j] for j in teachers], 3.0) for k, teachers in pairs])
    assert loss.item() == pytest.approx(by_hand, rel=1e-5)
    loss.backward()
    assert outputs[3].grad is None  # nobody teaches the last
    q, p = (torch.softmax(output.detach() / 3, dim=1) for output in (outputs[2], outputs[3]))
    torch.testing.assert_close(outputs[2].grad, 3.0 * (q - p) / 5 / 3)  # as a student alone: T (q - p) / rows / students


def test_distillation_of_a_regression_is_a_squared_error():
    outputs = [torch.tensor([[1.0], [2.0]], requires_grad=True), torch.tensor([[3.0], [2.0]]), torch.tensor([[5.0], [6.0]])]
    task = TASKS["regression"]
    assert distil(outputs, teacher="last", temperature=9.0, task=task).item() == pytest.approx((16 + 16 + 4 + 16) / 4)
    assert distil(outputs, teacher="next", temperature=9.0, task=task).item() == pytest.approx((4 + 0 + 4 + 16) / 4)
    assert distil(outputs, teacher="later", temperature=9.0, task=task).item() == pytest.approx((9 + 4 + 4 + 16) / 4)


def test_an_exit_alone_has_no_teacher():
    assert distil([torch.randn(3, 2)], teacher="last", temperature=1.0, task=TASKS["classification"]).item() == 0
