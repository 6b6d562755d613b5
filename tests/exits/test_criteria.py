"""Criteria, choice and the forward pass that stops: hand-counted numbers, and offline = online."""

import math
from itertools import pairwise

import pytest
import torch
from toy_exits import WIDTH, CascadeHead, PlainHead, toy_model

from eectl.core.errors import EectlError
from eectl.exits.criteria import CRITERIA, find_criterion
from eectl.exits.policy import ALWAYS, NEVER, Policy, choose
from eectl.exits.router import early_exit
from eectl.models.losses import TASKS

CLASSIFYING = [name for name, criterion in CRITERIA.items() if criterion.task is TASKS["classification"]]


def log_of(*probabilities):
    return torch.tensor([probabilities]).log()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("max-softmax", 0.5),
        ("margin", 0.25),
        ("entropy", 1 - (0.5 * math.log(2) + 2 * 0.25 * math.log(4)) / math.log(3)),
        ("patience", 1.0),
    ],
)
def test_scores_by_hand(name, expected):
    assert CRITERIA[name].score(log_of(0.5, 0.25, 0.25), []).tolist() == pytest.approx([expected])


def test_entropy_ends():
    logits = torch.tensor([[0.0, 0.0, 0.0], [500.0, 0.0, 0.0], [0.0, -torch.inf, -torch.inf]])
    assert CRITERIA["entropy"].score(logits, []).tolist() == pytest.approx([0, 1, 1], abs=1e-6)


def test_patience_counts_the_run():
    predictions = torch.tensor([[0, 0, 0, 0], [0, 1, 1, 0], [0, 1, 2, 1], [0, 1, 2, 0]])  # [exit, row]
    scores = CRITERIA["patience"].scores(torch.nn.functional.one_hot(predictions).float())
    assert scores.tolist() == [[1, 1, 1, 1], [2, 1, 1, 2], [3, 2, 1, 1], [4, 3, 2, 1]]


def pabee(predictions, patience):
    """Exit, from 0, of one row by PABEE's counter (Zhou et al., 2020): `patience` agreements in a row with the exit before."""
    counter, before = 0, None
    for number, prediction in enumerate(predictions):
        counter = counter + 1 if prediction == before else 0
        before = prediction
        if counter == patience:
            return number
    return len(predictions) - 1


@pytest.mark.parametrize("patience", [1, 2, 3, 4])
def test_patience_is_pabees_counter(patience):
    torch.manual_seed(0)
    logits = torch.randn(5, 400, 3)
    chosen = choose(CRITERIA["patience"].scores(logits), (float(patience),) * 4).tolist()
    assert chosen == [pabee(logits[:, row].argmax(dim=1).tolist(), patience) for row in range(400)]
    assert len(set(chosen)) == max(5 - patience, 1)


@pytest.mark.parametrize("patience", [1, 2])
def test_pabee_one_row_at_a_time(patience):
    """The forward pass that stops, for single rows, against the counter on all exits' predictions."""
    model = toy_model(after=(0, 1, 2), num_outputs=2)
    inputs = torch.randn(60, WIDTH)
    with torch.inference_mode():
        predictions = torch.stack([output.logits.argmax(dim=1) for output in model(inputs)])
        found = [int(early_exit(model, row[None], Policy(CRITERIA["patience"], (float(patience),) * 3))[1]) for row in inputs]
    assert found == [pabee(predictions[:, row].tolist(), patience) for row in range(60)]
    assert len(set(found)) > 1


def test_difference():
    logits = torch.tensor([[1.0, 2.0], [1.5, 2.0], [1.0, 5.0]])[:, :, None]
    assert CRITERIA["difference"].scores(logits).tolist() == [[-math.inf] * 2, [-0.5, 0], [-0.5, -3]]
    assert choose(CRITERIA["difference"].scores(logits), (ALWAYS, ALWAYS)).tolist() == [1, 1]


@pytest.mark.parametrize("count", [1, 2])
def test_the_difference_of_several_targets_is_the_largest(count):
    torch.manual_seed(0)
    outputs = torch.randn(5, 40, 3)
    criterion = find_criterion(f"difference-{count}", task=TASKS["regression"], num_exits=5)
    scores = criterion.scores(outputs)
    for row in range(40):
        changes = [max(abs(a - b) for a, b in zip(*pair, strict=True)) for pair in pairwise(outputs[:, row].tolist())]
        expected = [-max(changes[k - count : k]) if k >= count else -math.inf for k in range(5)]
        assert scores[:, row].tolist() == pytest.approx(expected)
    assert torch.equal(criterion.score(outputs[3], list(outputs[:3])), scores[3])


def test_confidence_in_labels_and_levels_by_hand():
    logits = torch.tensor([[0.9, 0.2, 0.5]]).logit()
    assert CRITERIA["mean-confidence"].score(logits, []).tolist() == pytest.approx([(0.9 + 0.8 + 0.5) / 3])
    # P(y > 0) = 0.9, P(y > 1) = 0.9 · 0.8, P(y > 2) = 0.72 · 0.5: the median level is 2, of probability 0.72 − 0.36
    assert CRITERIA["level-confidence"].score(torch.tensor([[0.9, 0.8, 0.5]]).logit(), []).tolist() == pytest.approx([0.36])


@pytest.mark.parametrize("patience", [1, 2, 3])
@pytest.mark.parametrize("delta", [0.3, 0.9, 2.0])
def test_difference_n_is_pabees_counter(patience, delta):
    """Zhou et al. 2020: count agreements (a change below δ), start again where one is missing, stop when it equals patience."""
    torch.manual_seed(patience)
    values = torch.randn(6, 400)
    expected = []
    for row in range(400):
        counter, left = 0, 5
        for exit_index in range(1, 5):
            counter = counter + 1 if abs(values[exit_index, row] - values[exit_index - 1, row]) < delta else 0
            if counter == patience:
                left = exit_index
                break
        expected.append(left)
    criterion = find_criterion(f"difference-{patience}", task=TASKS["regression"], num_exits=6)
    assert choose(criterion.scores(values[:, :, None]), (-delta,) * 5).tolist() == expected
    assert len(set(expected)) == 6 - patience


def test_difference_n_needs_enough_exits():
    same = find_criterion("difference-1", task=TASKS["regression"], num_exits=3).scores(torch.eye(3)[:, :, None])
    assert torch.equal(same, CRITERIA["difference"].scores(torch.eye(3)[:, :, None]))
    with pytest.raises(EectlError, match="criterion difference-2 compares exits and needs 3 attached ones, this network has two"):
        find_criterion("difference-2", task=TASKS["regression"], num_exits=3)
    assert find_criterion("difference-2", task=TASKS["regression"], num_exits=4).task is TASKS["regression"]
    with pytest.raises(EectlError, match="difference-2 is for regression, this network does classification"):
        find_criterion("difference-2", task=TASKS["classification"], num_exits=4)
    for name in ("difference-0", "difference-x", "difference-"):
        with pytest.raises(EectlError, match=f"unknown criterion '{name}'"):
            find_criterion(name, task=TASKS["regression"], num_exits=4)


@pytest.mark.parametrize("name", CRITERIA)
def test_criteria_are_causal(name):
    torch.manual_seed(0)
    logits = torch.randn(5, 3000, 1 if name == "difference" else 7)
    whole, shortened = CRITERIA[name].scores(logits), CRITERIA[name].scores(logits[:3])
    assert whole.dtype == torch.float32 and whole.shape == (5, 3000)
    assert torch.equal(whole[:3], shortened)
    assert torch.equal(whole[4], CRITERIA[name].score(logits[4], list(logits[:4])))


@pytest.mark.parametrize("name", sorted(set(CLASSIFYING) - {"patience"}))
def test_nan_never_leaves(name):
    scores = CRITERIA[name].scores(torch.full((3, 1, 4), torch.nan))
    assert choose(scores, (ALWAYS, ALWAYS)).tolist() == [2]


def test_choose():
    scores = torch.tensor([[0.5, 0.6, 0.4, torch.nan], [0.9, 0.1, 0.5, 0.7], [0.0, 0.0, 0.0, 0.0]])
    assert choose(scores, (0.5, 0.5)).tolist() == [1, 0, 2, 1]  # strictly over
    assert choose(scores, (0.5, 0.75)).tolist() == [1, 0, 2, 2]
    assert choose(scores, (NEVER, NEVER)).tolist() == [2, 2, 2, 2]
    assert choose(scores, (ALWAYS, ALWAYS)).tolist() == [0, 0, 0, 1]
    assert choose(scores[:1], ()).tolist() == [0, 0, 0, 0]


def test_find_criterion():
    assert find_criterion(None, task=TASKS["regression"], num_exits=4) is CRITERIA["difference"]
    with pytest.raises(EectlError, match=r"did you mean 'margin'"):
        find_criterion("margins", task=TASKS["classification"], num_exits=4)
    with pytest.raises(EectlError, match="is for regression, this network does classification"):
        find_criterion("difference", task=TASKS["classification"], num_exits=4)
    with pytest.raises(EectlError, match="needs two attached ones"):
        find_criterion("patience", task=TASKS["classification"], num_exits=2)
    assert find_criterion("patience", task=TASKS["classification"], num_exits=3) is CRITERIA["patience"]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_policy_wants_finite_thresholds(bad):
    with pytest.raises(EectlError, match="finite"):
        Policy(CRITERIA["margin"], (0.5, bad))


def thresholds_for(name, scores):
    """Thresholds at which some rows leave at each exit."""
    if name == "patience":
        return [(0.0, 0.0), (1.0, 1.0), (2.0, 2.0), (NEVER, 1.0)]
    finite = scores[:-1].flatten().masked_fill(scores[:-1].flatten().isinf(), -9.0)
    quantiles = torch.quantile(finite, torch.tensor([0.3, 0.6, 0.8])).tolist()
    return [(q, q) for q in quantiles] + [(quantiles[2], quantiles[0]), (ALWAYS, ALWAYS), (NEVER, NEVER)]


@pytest.mark.parametrize("head", [PlainHead, CascadeHead])
@pytest.mark.parametrize("name", CRITERIA)
def test_online_equals_offline(name, head):
    model = toy_model(head, num_outputs=1 if name == "difference" else 4)
    inputs = torch.randn(97, WIDTH)
    with torch.inference_mode():
        offline = torch.stack([output.logits for output in model(inputs)])
        scores = CRITERIA[name].scores(offline)
        for thresholds in thresholds_for(name, scores):
            logits, exits = early_exit(model, inputs, Policy(CRITERIA[name], thresholds))
            chosen = choose(scores, thresholds)
            distance = (scores[:2] - torch.tensor(thresholds)[:, None]).abs().amin(dim=0)
            clear = distance > (-1 if name == "patience" else 1e-5)  # counts are exact
            assert clear.sum() > 80
            assert torch.equal(exits[clear], chosen[clear])
            torch.testing.assert_close(logits[clear], offline[chosen, torch.arange(97)][clear])


def test_blocks_run_for_survivors_only():
    model = toy_model()
    inputs = torch.randn(50, WIDTH)
    with torch.inference_mode():
        scores = CRITERIA["margin"].scores(torch.stack([output.logits for output in model(inputs)]))
        threshold = float(scores[0].median())
        model.backbone.runs.clear()
        _, exits = early_exit(model, inputs, Policy(CRITERIA["margin"], (threshold, threshold)))
    left = torch.bincount(exits, minlength=3).tolist()
    assert all(left)
    assert model.backbone.runs == [(0, 50), (1, 50 - left[0]), (2, left[2])]


@pytest.mark.parametrize(("thresholds", "leaves_at"), [((ALWAYS, ALWAYS), 0), ((NEVER, ALWAYS), 1), ((NEVER, NEVER), 2)])
@pytest.mark.parametrize("num_rows", [1, 7])
def test_whole_batch_leaves_at_once(thresholds, leaves_at, num_rows):
    model = toy_model()
    inputs = torch.randn(num_rows, WIDTH)
    with torch.inference_mode():
        expected = model(inputs)[leaves_at].logits
        model.backbone.runs.clear()
        logits, exits = early_exit(model, inputs, Policy(CRITERIA["max-softmax"], thresholds))
    assert exits.tolist() == [leaves_at] * num_rows
    assert torch.equal(logits, expected)
    assert model.backbone.runs == [(block, num_rows) for block in range(leaves_at + 1)]


@pytest.mark.parametrize("head", [PlainHead, CascadeHead])
def test_one_survivor(head):
    model = toy_model(head)
    inputs = torch.randn(9, WIDTH)
    with torch.inference_mode():
        offline = [output.logits for output in model(inputs)]
        least = CRITERIA["margin"].score(offline[0], []).sort().values[:2].mean()
        logits, exits = early_exit(model, inputs, Policy(CRITERIA["margin"], (float(least), NEVER)))
    assert sorted(exits.tolist()) == [0] * 8 + [2]
    row = int(exits.argmax())
    torch.testing.assert_close(logits[row], offline[2][row])


def test_network_without_exits():
    model = toy_model(after=())
    logits, exits = early_exit(model, torch.ones(3, WIDTH), Policy(CRITERIA["max-softmax"], ()))
    assert exits.tolist() == [0, 0, 0] and logits.shape == (3, 4)


def test_train_mode_is_our_mistake():
    model = toy_model()
    model.exits[1].train()
    with pytest.raises(AssertionError):
        early_exit(model, torch.ones(3, WIDTH), Policy(CRITERIA["max-softmax"], (0.5, 0.5)))
