"""What is measured beside the score: against scikit-learn and scipy, at single exits and where rows leave at several."""

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn import metrics
from toy_exits import toy_scored

from eectl.evaluation.measures import auroc, average_precision, measures_at
from eectl.exits.decisions import choose_decisions, decide
from eectl.recipe.choices import MEASURE_CHOICES


def exits_of(num_rows):
    """Rows that leave at all three exits."""
    return torch.arange(num_rows) % 3


def taken(scored, exits):
    """Outputs [row, output] and predictions [row] of each row at its exit."""
    rows = torch.arange(len(exits))
    return scored.outputs[exits, rows].numpy(), scored.values[exits, rows].long().numpy()


@pytest.mark.parametrize("seed", range(3))
def test_two_classes(seed):
    scored = toy_scored(num_classes=2, num_rows=150, seed=seed)
    found = measures_at(scored, exits_of(150))
    probabilities, predicted = taken(scored, exits_of(150))
    labels = scored.labels.numpy()
    assert found["measures"] == {
        "mcc": pytest.approx(metrics.matthews_corrcoef(labels, predicted)),
        "f1": pytest.approx(metrics.f1_score(labels, predicted)),
        "auroc": pytest.approx(metrics.roc_auc_score(labels, probabilities[:, 1])),
    }


@pytest.mark.parametrize("seed", range(3))
def test_many_classes(seed):
    scored = toy_scored(num_classes=5, num_rows=150, seed=seed)
    found = measures_at(scored, exits_of(150))
    probabilities, predicted = taken(scored, exits_of(150))
    labels = scored.labels.numpy()
    assert found["measures"] == {
        "mcc": pytest.approx(metrics.matthews_corrcoef(labels, predicted)),
        "auroc": pytest.approx(metrics.roc_auc_score(labels, probabilities, multi_class="ovr", average="macro"), abs=1e-6),
    }
    assert found["balanced"] == pytest.approx(metrics.balanced_accuracy_score(labels, predicted))
    assert found["macro_f1"] == pytest.approx(metrics.f1_score(labels, predicted, average="macro"))


@pytest.mark.parametrize("calibrated", [False, True])
def test_labels(calibrated):
    scored = toy_scored(num_classes=5, num_rows=150, task="multilabel")
    decisions = choose_decisions(toy_scored(num_classes=5, task="multilabel", seed=1)) if calibrated else None
    exits = exits_of(150)
    found = measures_at(scored, exits, decisions=decisions)
    probabilities, _ = taken(scored, exits)
    cuts = np.array(decisions)[exits.numpy()] if calibrated else 0.5
    labels, predicted = scored.labels.numpy(), probabilities > cuts
    assert found == {
        "macro_f1": pytest.approx(metrics.f1_score(labels, predicted, average="macro")),
        "measures": {
            "map": pytest.approx(metrics.average_precision_score(labels, probabilities, average="macro"), abs=1e-6),
            "micro_f1": pytest.approx(metrics.f1_score(labels, predicted, average="micro")),
        },
    }


def test_levels():
    scored = toy_scored(num_classes=5, num_rows=150, task="ordinal")
    found = measures_at(scored, exits_of(150))
    _, predicted = taken(scored, exits_of(150))
    labels = scored.labels.numpy()
    assert found["measures"] == {
        "mae": pytest.approx(metrics.mean_absolute_error(labels, predicted)),
        "kappa": pytest.approx(metrics.cohen_kappa_score(labels, predicted, weights="quadratic")),
    }
    assert found["balanced"] == pytest.approx(metrics.balanced_accuracy_score(labels, predicted))


@pytest.mark.parametrize("names", [(), ("a", "b", "c")])
def test_numbers(names):
    generator = torch.Generator().manual_seed(0)
    labels = torch.rand(60, 3, generator=generator) * 5
    from toy_exits import score

    scored = score(labels + torch.randn(3, 60, 3, generator=generator), labels, task="regression")
    found = measures_at(scored, exits_of(60), targets=names)
    outputs, true = taken(scored, exits_of(60))[0], labels.numpy()
    assert list(found["by_target"]) == list(names or "123")
    for column, each in enumerate(found["by_target"].values()):
        own = outputs[:, column], true[:, column]
        assert each == {
            "mse": pytest.approx(metrics.mean_squared_error(*own[::-1])),
            "mae": pytest.approx(metrics.mean_absolute_error(*own[::-1])),
            "r2": pytest.approx(metrics.r2_score(*own[::-1])),
            "pearson": pytest.approx(stats.pearsonr(*own)[0]),
            "spearman": pytest.approx(stats.spearmanr(*own)[0]),
        }
    assert found["measures"] == {
        "mae": pytest.approx(metrics.mean_absolute_error(true, outputs)),
        "r2": pytest.approx(metrics.r2_score(true, outputs)),
    }
    assert found["spearman"] == pytest.approx(np.mean([each["spearman"] for each in found["by_target"].values()]))


def test_one_number():
    scored = toy_scored(num_rows=90, task="regression")
    found = measures_at(scored, exits_of(90))
    outputs = scored.values.gather(0, exits_of(90)[None])[0].numpy()
    assert scored.outputs is None and "by_target" not in found
    assert found["measures"] == {
        "mae": pytest.approx(metrics.mean_absolute_error(scored.labels, outputs)),
        "r2": pytest.approx(metrics.r2_score(scored.labels, outputs)),
    }


def test_ties_and_what_is_not_defined():
    scores, labels = np.array([0.1, 0.4, 0.4, 0.4, 0.9], dtype=np.float32), np.array([False, True, False, True, False])
    assert auroc(scores, labels) == pytest.approx(metrics.roc_auc_score(labels, scores))
    assert average_precision(scores, labels) == pytest.approx(metrics.average_precision_score(labels, scores))
    nothing = np.zeros(5, dtype=bool)
    assert np.isnan(auroc(scores, nothing)) and np.isnan(auroc(scores, ~nothing)) and np.isnan(average_precision(scores, nothing))


def test_decisions_are_the_best_there_are():
    """Against every cut between two probabilities, label by label; the highest of equally good ones."""
    scored = toy_scored(num_classes=4, num_rows=40, task="multilabel")
    labels = scored.labels.numpy().astype(bool)
    labels[:, 3] = False
    scored.labels[:, 3] = 0
    decisions = choose_decisions(scored)
    for probabilities, own in zip(scored.outputs.numpy(), decisions, strict=True):
        for label in range(3):
            values = np.unique(probabilities[:, label])
            cuts = [0.0, *(values[1:] / 2 + values[:-1] / 2)]
            best = max(metrics.f1_score(labels[:, label], probabilities[:, label] > cut, zero_division=0) for cut in cuts)
            found = metrics.f1_score(labels[:, label], probabilities[:, label] > own[label])
            assert found == pytest.approx(best)
        assert own[3] == 0.5
    assert torch.equal(decide(scored.outputs, None), scored.outputs > 0.5)


def test_every_measure_is_taken_of_some_task():
    seen = set()
    for task, classes in (("classification", 2), ("regression", 1), ("multilabel", 3), ("ordinal", 3)):
        found = measures_at(toy_scored(num_classes=classes, task=task), exits_of(200))
        seen |= {*found, *found["measures"]} - {"measures", "by_target"}
    assert seen == set(MEASURE_CHOICES)
