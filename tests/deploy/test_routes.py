"""Which way batches are answered: looked for once it is worth it, and without a trace in the answers."""

import pytest
import torch
from exits.rigged import build_network, spread

from eectl.deploy import routes
from eectl.deploy.routes import Routes
from eectl.exits import fastest
from eectl.exits.criteria import CRITERIA
from eectl.exits.fastest import choose_layout, quickest
from eectl.exits.policy import Policy, choose
from eectl.exits.router import Router
from eectl.exits.times import EARLY, FULL


@torch.inference_mode()
def network_with_policy(name):
    """A network, one batch, the policy under which rows leave at every exit, and what it says of them."""
    with torch.inference_mode(mode=False):
        model, batches = build_network(name)
    batch = batches[0]
    logits = torch.stack([output.logits for output in model(batch)])
    scores = CRITERIA["margin"].scores(logits)
    policy = Policy(CRITERIA["margin"], spread(scores, 0.3))
    exits = choose(scores, policy.thresholds)
    return model, batch, policy, logits[exits, torch.arange(len(batch))], exits


@pytest.mark.parametrize("mode", [EARLY, FULL])
@pytest.mark.parametrize("last", [True, False])
@torch.inference_mode()
def test_answers_are_the_same_in_every_way(mode, last, monkeypatch):
    model, batch, policy, logits, exits = network_with_policy("resnet")
    weight = next(each for each in model.backbone.parameters() if each.dim() == 4 and each.shape[1] > 1)
    lies: list[tuple[int, bool]] = []
    shortest = {EARLY: mode != EARLY, FULL: mode != FULL}
    layouts = []

    def chosen(model, batches, **_):
        layouts.append(len(batches))
        best = last == (len(batches[0]) == 8)  # batches of eight lie otherwise than smaller ones
        fastest.lay_weights(model, channels_last=best)
        return best

    monkeypatch.setattr(fastest, "quickest", lambda ways, **_: min(ways, key=lambda name: shortest[name]))
    monkeypatch.setattr(routes, "choose_layout", chosen)
    monkeypatch.setattr(routes, "WARM_UP", 1e-9)
    monkeypatch.setattr(routes, "TRIES", 1)
    route = Routes(model, policy, channels_last=True)
    for size in (8, 3, 8, 3, 1, 8, 1):
        found = route(batch[:size])
        assert found[1].tolist() == exits[:size].tolist()
        torch.testing.assert_close(found[0], logits[:size], rtol=1e-4, atol=1e-5)
        lies.append((size, weight.is_contiguous(memory_format=torch.channels_last)))
    assert lies[2:] == [(8, last), (3, not last), (1, not last), (8, last), (1, not last)]
    assert not weight.is_inference()
    assert layouts == [1, 1, 1]  # learned once for each size, from the batch before
    assert route.full_sizes == ((1, 3, 8) if mode == FULL else ())


@torch.inference_mode()
def test_the_plain_network_answers_without_a_policy(monkeypatch):
    monkeypatch.setattr(routes, "WARM_UP", 1e-9)
    monkeypatch.setattr(routes, "TRIES", 1)
    for name in ("resnet", "bert"):
        model, batch, *_ = network_with_policy(name)
        expected = model.backbone(batch)
        route = Routes(model, None, channels_last=name == "resnet")
        for _ in range(3):
            logits, exits = route(batch)
            assert exits is None
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_little_work_is_not_timed(monkeypatch):
    """By hand: 16 rows are kept to try the ways on; of one row each they are tried after 16 × 16, of eight after 2 × 16."""
    model, batch, policy, *_ = network_with_policy("gpf")
    learned = []

    def choosing(model, policy, batches, **_):
        learned.append([len(each) for each in batches])
        return EARLY, Router(model, policy)

    monkeypatch.setattr(routes, "choose_mode", choosing)
    monkeypatch.setattr(routes, "WARM_UP", 1e-9)
    route = Routes(model, policy, channels_last=False)
    for size, count in ((1, 256), (8, 32)):
        for _ in range(count):
            route(batch[:size])
        assert learned == []
        route(batch[:size])
        assert learned.pop() == [size] * (16 // size)
    monkeypatch.setattr(routes, "WARM_UP", 1e9)
    for _ in range(200):
        route(batch[:4])
    assert learned == []


def test_another_way_must_be_clearly_faster(monkeypatch):
    laps = {"first": 1.0, "second": 0.96}
    monkeypatch.setattr(fastest, "_time", lambda run, _: laps[run()])
    ways = {name: (lambda name=name: name) for name in laps}
    assert quickest(ways, seconds=0, device=torch.device("cpu")) == "first"
    laps["second"] = 0.94
    assert quickest(ways, seconds=0, device=torch.device("cpu")) == "second"


@pytest.mark.parametrize(("nchw", "expected"), [(0.5, False), (0.97, True), (2.0, True)])
def test_the_layout_that_is_faster(nchw, expected, monkeypatch):
    model, batches = build_network("resnet")
    weight = next(each for each in model.backbone.parameters() if each.dim() == 4 and each.shape[1] > 1)
    seen = []

    def time(run, _):
        run()
        seen.append(weight.is_contiguous(memory_format=torch.channels_last))
        return 1.0 if seen[-1] else nchw

    monkeypatch.setattr(fastest, "_time", time)
    assert choose_layout(model, batches[:1], seconds=0) is expected
    assert set(seen) == {True, False} and weight.is_contiguous(memory_format=torch.channels_last) is expected
