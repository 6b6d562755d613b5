"""ZTW's cascade and ensembles against the formulas written out in numpy, what gets gradients, and what they cost."""

import copy

import numpy as np
import pytest
import torch
from toy_exits import WIDTH, CountingBackbone

from eectl.core.errors import EectlError
from eectl.exits.costs import measure_costs
from eectl.exits.criteria import CRITERIA
from eectl.exits.policy import Policy, choose
from eectl.exits.router import early_exit
from eectl.models.backbone import MapFeature, TokenFeature
from eectl.models.build import attach_ensembles, attach_exits, build_backbone, build_model, model_spec
from eectl.models.ensembles import ENSEMBLES, Ensembles
from eectl.models.heads import make_head
from eectl.recipe.recipe import BackboneSection

C = 4


def network(combine=None):
    torch.manual_seed(0)
    model = attach_exits(CountingBackbone(C), after=(0, 1, 2), heads="ztw", num_outputs=C, input_shape=(WIDTH,))
    if combine:
        model = attach_ensembles(model, combine, num_outputs=C)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.7)
    for ensemble in model.combine.exits if combine else ():
        ensemble.bias.data.sub_(3)  # or exp(b) outweighs what the heads say
    return model.eval()


def array(tensor):
    return tensor.detach().double().numpy()


def cascade_by_hand(model, inputs):
    """The heads' own logits, from the formulas."""
    hidden, own = inputs, []
    for index, head in enumerate(model.exits):
        hidden = model.backbone.block(index, model.backbone.stem(hidden)).x
        x = array(hidden)
        if index:
            past = own[-1]
            spread = np.sqrt(past.var(axis=1, keepdims=True) + 1e-5)
            normed = (past - past.mean(axis=1, keepdims=True)) / spread * array(head.norm.weight) + array(head.norm.bias)
            x = np.concatenate([x, normed], axis=1)
        own.append(x @ array(head.fc.weight).T + array(head.fc.bias))
    return own


def softmax(logits):
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def ensemble_by_hand(kind, own, weight, bias):
    """Exit k's logits from the own logits of heads 1..k."""
    probabilities = [softmax(logits) for logits in own]
    if kind == "geometric":
        return sum(np.exp(w) * np.log(p) for w, p in zip(weight, probabilities, strict=True)) / len(own) + bias
    mixed = sum(np.exp(w) * p for w, p in zip(weight, probabilities, strict=True)) + np.exp(bias)
    return np.log(mixed / mixed.sum(axis=1, keepdims=True))


def test_cascade_by_hand():
    model, inputs = network(), torch.randn(9, WIDTH)
    outputs = model(inputs)
    for output, expected in zip(outputs, cascade_by_hand(model, inputs), strict=False):
        np.testing.assert_allclose(array(output.logits), expected, rtol=1e-4, atol=1e-5)
        assert output.state is output.logits
    assert torch.equal(outputs[3].logits, model.backbone(inputs))
    assert [head.norm is None for head in model.exits] == [True, False, False]


@pytest.mark.parametrize("kind", ENSEMBLES)
def test_ensembles_by_hand(kind):
    model, inputs = network(kind), torch.randn(9, WIDTH)
    outputs, own = model(inputs), cascade_by_hand(model, inputs)
    for k in range(3):
        ensemble = model.combine.exits[k]
        assert tuple(ensemble.weight.shape) == (k + 1,) and tuple(ensemble.bias.shape) == (C,)
        expected = ensemble_by_hand(kind, own[: k + 1], array(ensemble.weight), array(ensemble.bias))
        np.testing.assert_allclose(array(outputs[k].logits), expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(array(outputs[k].state), own[k], rtol=1e-4, atol=1e-5)  # the cascade hears the heads
    assert torch.equal(outputs[3].logits, model.backbone(inputs))  # none on the network's own head
    for wanted in ([2], [1, 3], [3, 4]):
        some = model(inputs, exits=wanted)
        assert all(torch.equal(some[k - 1].logits, outputs[k - 1].logits) for k in wanted)


def test_certain_heads_leave_finite_ensembles():
    sure = torch.tensor([[200.0, -200.0, 0.0]])
    for kind in ENSEMBLES:
        combine = Ensembles(kind, num_heads=2, num_outputs=3)
        logits = combine([sure, -sure])
        logits.sum().backward()
        assert logits.isfinite().all() and all(parameter.grad.isfinite().all() for parameter in combine.exits[1].parameters())


def test_what_is_heard_gets_no_gradient():
    model = network()
    outputs = model(torch.randn(9, WIDTH))
    found = torch.autograd.grad(outputs[2].logits.sin().sum(), [head.fc.weight for head in model.exits], allow_unused=True)
    assert [each is not None for each in found] == [False, False, True]


def test_how_ensembles_start():
    torch.manual_seed(0)
    for kind in ENSEMBLES:
        combine = Ensembles(kind, num_heads=200, num_outputs=3)
        drawn = torch.cat([each.weight for each in combine.exits])
        assert drawn.std().item() == pytest.approx(0.01, rel=0.02) and abs(drawn.mean().item()) < 3e-4
        assert not any(each.bias.any() for each in combine.exits)
    with pytest.raises(EectlError, match=r"unknown ensemble 'geometrical' \(did you mean 'geometric'\?\)"):
        Ensembles("geometrical", num_heads=1, num_outputs=2)


def test_features_of_maps_are_sdns_and_of_tokens_the_class_token():
    maps, tokens = MapFeature(torch.randn(2, 3, 9, 9)), TokenFeature(torch.randn(2, 5, 3), (2, 2))
    ztw, sdn = make_head("ztw", maps, C), make_head("sdn", maps, C)
    sdn.load_state_dict(ztw.state_dict())
    assert torch.equal(ztw(maps, []).logits, sdn(maps, []).logits)
    ztw, linear = make_head("ztw", tokens, C), make_head("linear", tokens, C)
    linear.load_state_dict(ztw.state_dict())
    assert torch.equal(ztw(tokens, []).logits, linear(tokens, []).logits)


@pytest.mark.parametrize("combine", [None, *ENSEMBLES])
def test_macs_by_hand(combine):
    costs = measure_costs(network(combine), (WIDTH,))
    assert costs.heads == (WIDTH * C, (WIDTH + C) * C, (WIDTH + C) * C)
    assert costs.head_parameters == (WIDTH * C + C, (WIDTH + C) * C + 3 * C, (WIDTH + C) * C + 3 * C)


@pytest.mark.parametrize("combine", [None, *ENSEMBLES])
@pytest.mark.parametrize("name", ["max-softmax", "patience"])
def test_early_exit_equals_offline(combine, name):
    model, inputs = network(combine), torch.randn(97, WIDTH)
    with torch.inference_mode():
        offline = torch.stack([output.logits for output in model(inputs)])
        scores = CRITERIA[name].scores(offline)
        thresholds = [1.0] * 3 if name == "patience" else scores[:3].quantile(0.6, dim=1).tolist()
        logits, exits = early_exit(model, inputs, Policy(CRITERIA[name], tuple(thresholds)))
    chosen = choose(scores, thresholds)
    clear = (scores[:3] - torch.tensor(thresholds)[:, None]).abs().amin(dim=0) > (-1 if name == "patience" else 1e-5)
    assert clear.sum() > 90 and len(exits.unique()) >= 3
    assert torch.equal(exits[clear], chosen[clear])
    torch.testing.assert_close(logits[clear], offline[chosen, torch.arange(97)][clear])


@pytest.mark.parametrize("combine", [None, *ENSEMBLES])
@pytest.mark.parametrize("name", ["vit", "resnet20"])
def test_a_copy_and_its_spec_rebuild_it(name, combine):
    args = {"patch_size": 4, "dim": 16, "mlp_dim": 16, "depth": 3, "heads": 2} if name == "vit" else {}
    spec, shape = BackboneSection(name=name, args=args), (3, 8, 8)
    model = attach_exits(
        build_backbone(spec, input_shape=shape, num_outputs=C), after=(0, 1), heads="ztw", num_outputs=C, input_shape=shape
    )
    model = (attach_ensembles(model, combine, num_outputs=C) if combine else model).eval()
    written = model_spec(model, spec, input_shape=shape, num_outputs=C)
    assert (written.combine, written.heads) == (combine, ("ztw", "ztw"))
    rebuilt = build_model(type(written).model_validate_json(written.model_dump_json())).eval()
    rebuilt.load_state_dict(model.state_dict())
    images = torch.randn(3, *shape)
    for one, *others in zip(model(images), rebuilt(images), copy.deepcopy(model)(images), strict=True):
        assert all(torch.equal(one.logits, other.logits) for other in others)


def test_parts_of_ensembles():
    model = network("geometric")
    assert model.part("combine") == model.part("combine.exits.2.weight") == ("combine", 1)
    model.set_trainable((), (), combine=True)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        f"combine.exits.{k}.{part}" for k in range(3) for part in ("weight", "bias")
    }
    model.train_parts((), (), combine=True)
    assert {name.split(".")[0] for name, module in model.named_modules() if module.training} == {"combine"}
    model.set_trainable({1}, {1})
    assert not any(p.requires_grad for name, p in model.named_parameters() if name.startswith("combine"))


def test_regression_has_no_class_probabilities():
    with pytest.raises(EectlError, match=r"head ztw .*one output"):
        make_head("ztw", MapFeature(torch.zeros(1, 2, 4, 4)), 1)
