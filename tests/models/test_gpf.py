"""GPF's heads against the formulas written out in numpy, what gets gradients, what they cost, and where they fit."""

import copy
from itertools import pairwise

import numpy as np
import pytest
import torch
from toy_exits import WIDTH, CountingBackbone

from eectl.core.errors import EectlError
from eectl.exits.costs import measure_costs
from eectl.exits.criteria import CRITERIA
from eectl.exits.policy import Policy, choose
from eectl.exits.router import early_exit
from eectl.models.backbone import MapFeature
from eectl.models.build import attach_exits, build_model, model_spec
from eectl.models.heads import ExitOutput, head_class, make_head
from eectl.models.losses import imitation, with_auxiliary
from eectl.recipe.recipe import BackboneSection

C, D = 4, 5
KINDS = [f"gpf-{D}", f"gpf-lancopku-{D}"]


def network(kind=f"gpf-{D}", after=(0, 1, 2)):
    """Three blocks, an exit after each, K = 4; every weight and bias is far from 0."""
    torch.manual_seed(0)
    model = attach_exits(CountingBackbone(C), after=after, heads=kind, num_outputs=C, input_shape=(WIDTH,))
    for parameter in model.parameters():
        parameter.data.normal_(std=0.7)
    return model.eval()


def features(model, inputs):
    """What each attached exit sees, by hand."""
    hidden, seen = model.backbone.stem(inputs), []
    for index in range(model.backbone.depth):
        hidden = model.backbone.block(index, hidden)
        seen.append(hidden.x.detach().numpy())
    return [seen[block] for block in model.after]


def linear(layer, x):
    return x @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()


def relu(x):
    return np.maximum(x, 0)


def merged_by_hand(model, inputs, kind):
    """Logits, states and guesses of the attached exits, from the formulas."""
    heads, tanh = model.exits, "lancopku" in kind
    phi = np.tanh if tanh else relu
    states = [phi(linear(head.project, x)) for head, x in zip(heads, features(model, inputs), strict=True)]
    logits, guesses = [], []
    for k in range(len(heads)):
        later = [phi(linear(heads[j].imitate, states[k])) for j in range(k + 1, len(heads))]
        known = sum(linear(heads[j].reduce, states[j]) for j in range(k + 1))
        foreseen = sum((linear(heads[k + 1 + i].reduce, guess) for i, guess in enumerate(later)), np.zeros_like(known))
        gate = sum(linear(heads[j].gate, states[j]) for j in range(k + 1)) / (k + 1)
        share = 1 / (1 + np.exp(-linear(heads[0].balance, phi(gate))))
        logits.append(2 * share * known + (2 - 2 * share) * foreseen if tanh else share * known + (1 - share) * foreseen)
        guesses.append(later)
    return logits, states, guesses


@pytest.mark.parametrize("kind", KINDS)
def test_merge_by_hand(kind):
    model, inputs = network(kind), torch.randn(9, WIDTH)
    outputs = model(inputs)
    logits, states, guesses = merged_by_hand(model, inputs, kind)
    for k in range(3):
        np.testing.assert_allclose(outputs[k].logits.detach(), logits[k], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(outputs[k].state.detach(), states[k], rtol=1e-4, atol=1e-5)
        if k < 2:
            np.testing.assert_allclose(outputs[k].guesses.detach(), np.stack(guesses[k], axis=1), rtol=1e-4, atol=1e-5)
    assert outputs[2].guesses is None
    last = model.backbone(inputs)
    assert torch.equal(outputs[3].logits, last) and outputs[3].state is None  # the network's own head is untouched


@pytest.mark.parametrize("kind", KINDS)
def test_earlier_states_get_no_gradient(kind):
    model = network(kind)
    outputs = model(torch.randn(9, WIDTH))
    for source in range(3):
        projectors = [head.project.weight for head in model.exits]
        found = torch.autograd.grad(outputs[source].logits.sum(), projectors, retain_graph=True, allow_unused=True)
        assert [each is not None and bool(each.any()) for each in found] == [k == source for k in range(3)]
        reducers = [head.reduce.weight for head in model.exits]  # but all matrices learn at every exit
        assert all(each.any() for each in torch.autograd.grad(outputs[source].logits.sum(), reducers, retain_graph=True))
    gates = torch.autograd.grad(outputs[1].logits.sum(), [head.gate.weight for head in model.exits], allow_unused=True)
    assert [each is not None and bool(each.any()) for each in gates] == [True, True, False]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ran", [(1, 2, 3, 4), (1, 3), (2, 3), (1, 2)], ids=str)
def test_imitation_by_hand(kind, ran):
    model, inputs = network(kind), torch.randn(9, WIDTH)
    outputs = [output if number in ran else None for number, output in enumerate(model(inputs), 1)]
    _, states, guesses = merged_by_hand(model, inputs, kind)
    terms = []
    for k in (k for k in range(3) if k + 1 in ran):
        cosines = []
        for j in (j for j in range(k + 1, 3) if j + 1 in ran):
            guess, state = guesses[k][j - k - 1], states[j]
            norms = np.linalg.norm(guess, axis=1) * np.linalg.norm(state, axis=1)
            cosines.append((guess * state).sum(axis=1) / np.maximum(norms, 1e-9))
        if cosines:
            terms.append(1 - np.mean(cosines))
    expected = np.mean(terms)
    assert imitation(outputs).item() == pytest.approx(expected, rel=1e-4)
    loss = torch.tensor(3.0)
    total = with_auxiliary(model.auxiliary, loss, outputs).item()
    assert total == pytest.approx((3 + expected) / 2 if "lancopku" in kind else 3 + expected, rel=1e-5)


def test_imitation_moves_the_guess_and_not_what_is_guessed():
    model = network()
    value = imitation(model(torch.randn(9, WIDTH)))
    grads = torch.autograd.grad(value, [head.project.weight for head in model.exits], allow_unused=True, retain_graph=True)
    assert grads[0].any() and grads[1].any() and grads[2] is None
    assert all(torch.autograd.grad(value, model.exits[j].imitate.weight, retain_graph=True)[0].any() for j in (1, 2))


def test_no_imitation_without_two_exits():
    model = network()
    assert imitation(model(torch.randn(3, WIDTH), exits=[4])) is None
    assert imitation(model(torch.randn(3, WIDTH), exits=[1, 4])) is None
    assert imitation([None, ExitOutput(torch.zeros(1, 2)), None]) is None
    loss = torch.tensor(2.0)
    assert with_auxiliary("imitation-halved", loss, model(torch.randn(3, WIDTH), exits=[4])) is loss
    assert with_auxiliary(None, loss, []) is loss


def test_some_exits_alone_are_the_same_exits():
    model, inputs = network(), torch.randn(9, WIDTH)
    whole = model(inputs)
    for wanted in ([3], [2], [1, 3], [2, 4]):
        some = model(inputs, exits=wanted)
        for number in wanted:
            assert torch.equal(some[number - 1].logits, whole[number - 1].logits)
    assert [output is not None for output in model(inputs, exits=[2])] == [True, True, False, False]  # 2 hears 1


@pytest.mark.parametrize("kind", KINDS)
def test_macs_by_hand(kind):
    """Exit k of M: projector, M − k imitators, M matrices on states and guesses, k gates, the shared gate."""
    costs = measure_costs(network(kind), (WIDTH,))
    assert costs.heads == tuple(WIDTH * D + (3 - k) * D * D + 3 * D * C + k * D * C + C * C for k in (1, 2, 3))
    own = WIDTH * D + D + 2 * (D * C + C)
    assert costs.head_parameters == (own + C * C + C, own + D * D + D, own + D * D + D)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["max-softmax", "patience"])
def test_early_exit_equals_offline(kind, name):
    model, inputs = network(kind), torch.randn(97, WIDTH)
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


def test_a_copy_reads_its_own_peers():
    model, inputs = network(), torch.randn(9, WIDTH)
    twin = copy.deepcopy(model)
    assert {key: tensor.shape for key, tensor in twin.state_dict().items()} == {
        key: tensor.shape for key, tensor in model.state_dict().items()
    }
    assert all(mine is yours for mine, yours in zip(twin.exits, twin.exits[1]._peers, strict=True))
    before = [output.logits for output in model(inputs)]
    torch.nn.init.zeros_(twin.exits[2].reduce.weight)
    assert all(torch.equal(one, other.logits) for one, other in zip(before, model(inputs), strict=True))
    assert not torch.equal(before[0], twin(inputs)[0].logits)  # exit 1 reads head 3's matrix
    twin.load_state_dict(model.state_dict())
    assert all(torch.equal(one, other.logits) for one, other in zip(before, twin(inputs), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_peers_are_no_submodules_and_the_first_head_owns_the_gate(kind):
    names = [name.removeprefix("exits.") for name in network(kind).state_dict() if name.startswith("exits.")]
    layers = [["project", "reduce", "gate", "balance"], *[["project", "reduce", "gate", "imitate"]] * 2]
    assert names == [f"{k}.{layer}.{part}" for k, own in enumerate(layers) for layer in own for part in ("weight", "bias")]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_and_in_ddp(kind):
    """Dynamo follows the peers without a break; in DDP every weight gets its gradient, or a second step would fail."""
    model = network(kind).train()
    inputs = torch.randn(9, WIDTH)
    expected = with_auxiliary(model.auxiliary, sum(output.logits.sin().sum() for output in model(inputs)), model(inputs))
    expected.backward()
    plain = [parameter.grad.clone() for parameter in model.parameters()]
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        compiled = torch.compile(copy.deepcopy(model), backend="eager", fullgraph=True)
        for runner in (compiled, torch.nn.parallel.DistributedDataParallel(copy.deepcopy(model))):
            for _ in range(2):
                runner.zero_grad()
                outputs = runner(inputs)
                with_auxiliary(model.auxiliary, sum(output.logits.sin().sum() for output in outputs), outputs).backward()
            for parameter, grad in zip(runner.parameters(), plain, strict=True):
                torch.testing.assert_close(parameter.grad, grad)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("kind", KINDS)
def test_its_spec_rebuilds_it(kind):
    spec = BackboneSection(name="vit", args={"patch_size": 4, "dim": 16, "mlp_dim": 16, "depth": 3, "heads": 2})
    from eectl.models.build import build_backbone

    backbone = build_backbone(spec, input_shape=(3, 8, 8), num_outputs=C)
    model = attach_exits(backbone, after=(0, 1), heads=kind, num_outputs=C, input_shape=(3, 8, 8)).eval()
    rebuilt = build_model(model_spec(model, spec, input_shape=(3, 8, 8), num_outputs=C)).eval()
    rebuilt.load_state_dict(model.state_dict())
    images = torch.randn(3, 3, 8, 8)
    for one, other in zip(model(images), rebuilt(images), strict=True):
        assert torch.equal(one.logits, other.logits)


def test_how_weights_start():
    """EEB: matrices in N(0, 1/√D), biases 0, the rest as PyTorch; lancopku: all in N(0, 0.02), biases 0."""
    feature = MapFeature(torch.zeros(1, 100, 4, 4))
    heads = {kind: [make_head(kind, feature, 50) for _ in range(2)] for kind in ("gpf-400", "gpf-lancopku-400")}
    for kind, pair in heads.items():
        for number, head in enumerate(pair, 1):
            head.join(pair, number)
            expected = 0.02 if "lancopku" in kind else 400**-0.5
            for layer in (head.reduce, head.gate):
                assert layer.weight.std().item() == pytest.approx(expected, rel=0.05) and not layer.bias.any()
    imitators = [pair[1].imitate.weight.std().item() for pair in heads.values()]
    assert imitators == pytest.approx([400**-0.5 / 3**0.5, 0.02], rel=0.05)  # U(−1/√400, 1/√400) has this deviation
    weight = heads["gpf-400"][1].imitate.weight.clone()
    heads["gpf-400"][1].join(heads["gpf-400"], 2)  # again: nothing is drawn anew
    assert torch.equal(weight, heads["gpf-400"][1].imitate.weight)


def test_widths_by_kind():
    feature = MapFeature(torch.zeros(1, 6, 4, 4))
    widths = {
        kind: make_head(kind, feature, 3).project.out_features for kind in ("gpf", "gpf-7", "gpf-lancopku", "gpf-lancopku-8")
    }
    assert widths == {"gpf": 512, "gpf-7": 7, "gpf-lancopku": 6, "gpf-lancopku-8": 8}
    assert {head_class(kind)[0].default_weights for kind in widths} == {"linear"}
    assert head_class("linear")[0].default_weights == head_class("ztw")[0].default_weights == "uniform"


@pytest.mark.parametrize(
    ("heads", "says"),
    [
        (["gpf"], "head gpf .*two attached exits"),
        (["gpf-lancopku-3"], "head gpf-lancopku-3 .*two attached exits"),
        (["gpf-3", "gpf-4"], r"3, 4 wide"),
        (["gpf-3", "linear"], "gpf-3: all .*gpf-64"),
        (["gpf-3", "gpf-lancopku-3"], "gpf-3: all .*gpf-64"),
        (["gpf-0", "gpf-0"], "'gpf-0'.*gpf-.*from 1"),
        (["gpf-lancopku-x"] * 2, "'gpf-lancopku-x'.*gpf-lancopku-.*from 1"),
        (["gpf-lancopku-WIDTH"] * 2, "'gpf-lancopku-WIDTH'.*from 1"),
    ],
)
def test_exits_that_do_not_go_together(heads, says):
    with pytest.raises(EectlError, match=says):
        attach_exits(CountingBackbone(C), after=range(len(heads)), heads=heads, num_outputs=C, input_shape=(WIDTH,))


def test_every_kind_that_is_listed_is_made():
    from eectl.models.heads import HEADS

    kinds = [kind.replace("WIDTH", "3") for kind in HEADS]
    feature = MapFeature(torch.zeros(1, 6, 4, 4))
    assert [make_head(kind, feature, 2).kind for kind in kinds] == kinds
    assert all(one != other for one, other in pairwise(kinds))
