"""Losses and weights against hand counts."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score
from sklearn.utils.class_weight import compute_class_weight
from timm.data import Mixup
from timm.loss import BinaryCrossEntropy

from eectl.models.losses import (
    TASKS,
    balanced_weights,
    distil,
    exit_losses,
    exit_points,
    sigmoid,
    task_of,
    total_weight,
    weighted_exit_losses,
)


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
    targets = torch.randint(2, (6, 1)).float() if name == "multilabel" else torch.randint(2, (6,))
    smoothing = 0.1 if name == "classification" else 0.0
    per_row = [TASKS[name].loss(outputs[i : i + 1], targets[i : i + 1], smoothing).item() for i in range(6)]
    assert TASKS[name].losses(outputs, targets, smoothing).tolist() == pytest.approx(per_row)
    assert TASKS[name].loss(outputs, targets, smoothing).item() == pytest.approx(sum(per_row) / 6)


@pytest.mark.parametrize("threshold", [None, 0.0, 0.2])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("mixed", [False, True])
def test_bce_is_timms(mixed, smoothing, threshold):
    torch.manual_seed(0)
    logits, labels = torch.randn(9, 5), torch.randint(5, (9,))
    theirs = BinaryCrossEntropy(smoothing=smoothing, target_threshold=threshold)
    share = 0.7
    mix = Mixup(mixup_alpha=1.0, label_smoothing=smoothing, num_classes=5)
    mix._params_per_batch = lambda: (share, False)
    given = labels
    if mixed:  # timm smooths in Mixup; the images are of no matter, and 8 rows go in pairs
        logits, labels = logits[:8], labels[:8]
        theirs_given = mix(torch.zeros(8, 1, 2, 2), labels)[1].float()
        one_hot = torch.nn.functional.one_hot(labels, 5).float()
        given = share * one_hot + (1 - share) * one_hot.flip(0)
    task = task_of("classification", {"loss": "bce", "bce_target_threshold": threshold})
    found = task.loss(logits, given, smoothing)
    torch.testing.assert_close(found, theirs(logits, theirs_given if mixed else labels))
    assert task.losses(logits, given, smoothing).mean() == pytest.approx(found.item())
    assert task_of("classification", {}) is TASKS["classification"] and task.points is TASKS["classification"].points


def test_the_loss_of_labels_is_torchs():
    torch.manual_seed(0)
    logits, targets = torch.randn(7, 5), torch.randint(2, (7, 5)).float()
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, targets)
    assert TASKS["multilabel"].loss(logits, targets, 0.0) == pytest.approx(expected.item())
    several = exit_losses(TASKS["multilabel"], [logits, 2 * logits], targets, 0.0)
    expected_of = [torch.nn.functional.binary_cross_entropy_with_logits(each, targets) for each in (logits, 2 * logits)]
    assert several.tolist() == pytest.approx([each.item() for each in expected_of])


def test_the_score_of_labels_is_scikit_learns():
    torch.manual_seed(0)
    logits, targets = torch.randn(50, 4), torch.randint(2, (50, 4)).float()
    targets[:3], logits[0], logits[1] = 0, -1.0, 1.0  # a row with nothing, rightly and wrongly predicted
    points = TASKS["multilabel"].points(logits, targets)
    assert points[0] == 1 and points[1] == 0
    expected = f1_score(targets.numpy(), (logits > 0).numpy(), average="samples", zero_division=1.0)
    assert points.mean() == pytest.approx(expected)
    both = exit_points(TASKS["multilabel"], [logits, -logits], targets)
    assert both[0] == pytest.approx(points.sum().item())


def naive_corn(logits, labels):
    """Shi, Cao & Raschka (2023), equation 9, over rows and not over questions: y > k is asked of the rows with y > k − 1."""
    total = 0.0
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        for k, logit in enumerate(row):
            if label > k - 1:
                p = 1 / (1 + math.exp(-logit))
                total -= math.log(p if label > k else 1 - p)
    return total / len(labels)


def test_the_loss_of_levels_is_corns():
    torch.manual_seed(0)
    logits, labels = torch.randn(40, 4), torch.randint(5, (40,))
    task = TASKS["ordinal"]
    assert task.loss(logits, labels, 0.0) == pytest.approx(naive_corn(logits, labels), rel=1e-5)
    probabilities = task.probabilities(logits)
    own = probabilities.gather(1, labels[:, None])[:, 0]
    torch.testing.assert_close(task.losses(logits, labels, 0.0), -own.log())
    torch.testing.assert_close(probabilities.sum(dim=1), torch.ones(40))
    naive = [[math.prod(1 / (1 + math.exp(-each)) for each in row[: k + 1]) for k in range(4)] for row in logits.tolist()]
    assert task.predicted(logits).tolist() == [sum(p > 0.5 for p in row) for row in naive]
    assert task.points(logits, labels).tolist() == [
        float(a == b) for a, b in zip(task.predicted(logits).tolist(), labels.tolist(), strict=True)
    ]


def test_several_targets_by_hand():
    outputs, targets = torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.tensor([[0.0, 2.0], [1.0, 4.0]])
    assert TASKS["regression"].points(outputs, targets).tolist() == [0.5, 10.0]
    assert TASKS["regression"].loss(outputs, targets, 0.0) == 5.25
    assert exit_losses(TASKS["regression"], [outputs, targets], targets, 0.0).tolist() == [5.25, 0.0]
    assert exit_points(TASKS["regression"], [outputs, targets], targets).tolist() == [10.5, 0.0]


@pytest.mark.parametrize("task", ["multilabel", "ordinal"])
def test_labels_learn_from_later_exits(task):
    torch.manual_seed(0)
    logits = [torch.randn(6, 3) for _ in range(3)]
    teacher = np.mean([1 / (1 + np.exp(-each.numpy() / 2)) for each in logits[1:]], axis=0)
    student, last = (1 / (1 + np.exp(-each.numpy() / 2)) for each in (logits[0], logits[1]))
    final = 1 / (1 + np.exp(-logits[2].numpy() / 2))

    def kl(p, q):
        return 4 * (p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))).mean()

    found = distil(logits, teacher="later", temperature=2.0, task=TASKS[task])
    assert found == pytest.approx((kl(teacher, student) + kl(final, last)) / 2, rel=1e-4)


def test_a_sigmoid_of_a_row_is_the_same_whatever_comes_with_it():
    torch.manual_seed(0)
    logits = torch.randn(1000, 7) * 20
    assert torch.equal(sigmoid(logits)[:333], sigmoid(logits[:333]))
    torch.testing.assert_close(sigmoid(logits), logits.sigmoid())


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
