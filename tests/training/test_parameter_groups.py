"""Learning rates by layer and what does not decay, against timm's own groups and torch's AdamW driven by hand."""

import os
import signal

import pytest
import torch
import torch.nn.functional as F
from small_networks import CASES
from timm.optim import param_groups_layer_decay, param_groups_weight_decay

from eectl.core.errors import EectlError, Interrupted
from eectl.core.progress import Display
from eectl.core.seeds import derive_seed
from eectl.data import Augmenter, load_data, train_batches
from eectl.models.build import attach_exits, build_backbone
from eectl.recipe.optimizer_section import OptimizerSection, WeightDecaySection
from eectl.recipe.reading import dump_recipe, make_recipe, parse_yaml
from eectl.recipe.recipe import BackboneSection
from eectl.training.network import first_network, with_exits
from eectl.training.optim import make_optimizer, set_rate
from eectl.training.parameter_groups import decay_kinds, layer_scale, parameter_groups
from eectl.training.train import train
from tests.training.test_train import rows, same, weights

CPU = torch.device("cpu")
VIT = "backbone={name: vit, args: {patch_size: 4, dim: 16, mlp_dim: 16, depth: 3, heads: 2}}"


def network(name):
    case = CASES[name]
    backbone = build_backbone(BackboneSection(name=case.name, args=case.args), input_shape=case.shape, num_outputs=5)
    return attach_exits(backbone, after=[0], heads="linear", num_outputs=5, input_shape=case.shape)


def by_name(groups, named):
    """(scale, weight decay) of each parameter."""
    names = {id(parameter): name for name, parameter in named}
    return {names[id(each)]: (scale, decay) for parameters, scale, decay in groups for each in parameters}


@pytest.mark.parametrize("name", ["timm-vit", "timm-distilled", "timm-no-class-token"])
def test_a_plain_vit_has_timms_groups(name):
    """But for the last norm, which timm counts with the last block and BEiT, where this is from, with the head."""
    model = network(name)
    net = model.backbone.net
    timms = param_groups_layer_decay(net, 0.05, net.no_weight_decay(), layer_decay=0.5)
    expected = by_name([(each["params"], each["lr_scale"], each["weight_decay"]) for each in timms], net.named_parameters())
    ours = parameter_groups(model, OptimizerSection(weight_decay=WeightDecaySection(value=0.05), layer_decay=0.5))
    found = by_name([(each.parameters, each.scale, each.weight_decay) for each in ours], model.named_parameters())
    for key, (scale, decay) in expected.items():
        last_norm = key.startswith(("norm.", "fc_norm."))
        assert found[f"backbone.net.{key}"] == (1.0 if last_norm else scale, decay), key
    assert found["exits.0.fc.weight"] == (1.0, 0.05) and found["exits.0.fc.bias"] == (1.0, 0.0)
    assert len(found) == sum(1 for _ in model.parameters())


@pytest.mark.parametrize("name", ["timm-swin", "timm-efficientnet", "timm-convnext", "timm-mobilenetv4", "msdnet", "cifar"])
def test_vectors_do_not_decay_where_timms_do_not(name):
    net = (model := network(name)).backbone.net
    listed = net.no_weight_decay() if hasattr(net, "no_weight_decay") else ()
    timms = param_groups_weight_decay(net, 0.05, no_weight_decay_list=listed)
    expected = by_name([(each["params"], 1.0, each["weight_decay"]) for each in timms], net.named_parameters())
    settings = OptimizerSection(weight_decay=WeightDecaySection(value=0.05))
    found = by_name(
        [(each.parameters, each.scale, each.weight_decay) for each in parameter_groups(model, settings)], model.named_parameters()
    )
    assert all(found[f"backbone.net.{key}"] == value for key, value in expected.items())


KINDS = {  # by hand
    "vit": {
        "backbone.net.class_token": {"positions"},
        "backbone.net.encoder.pos_embedding": {"positions"},
        "backbone.net.conv_proj.weight": set(),
        "backbone.net.encoder.layers.encoder_layer_0.ln_1.weight": {"norms"},
        "backbone.net.encoder.layers.encoder_layer_0.ln_1.bias": {"norms", "biases"},
        "backbone.net.encoder.layers.encoder_layer_0.self_attention.in_proj_bias": {"biases"},
        "backbone.net.encoder.layers.encoder_layer_0.mlp.0.bias": {"biases"},
        "exits.0.fc.weight": set(),
    },
    "bert": {
        "backbone.net.bert.embeddings.position_embeddings.weight": {"positions"},
        "backbone.net.bert.embeddings.word_embeddings.weight": set(),
        "backbone.net.bert.embeddings.LayerNorm.bias": {"norms", "biases"},
        "backbone.net.bert.encoder.layer.0.attention.self.query.bias": {"biases"},
    },
    "timm-swin": {"backbone.net.layers.0.blocks.0.attn.relative_position_bias_table": {"positions"}},
    "deberta": {"backbone.net.deberta.encoder.rel_embeddings.weight": {"positions"}},
    "cifar": {
        "backbone.net.bn1.weight": {"norms"},
        "backbone.net.bn1.bias": {"norms", "biases"},
        "backbone.net.fc.bias": {"biases"},
    },
}


@pytest.mark.parametrize("name", KINDS)
def test_kinds_of_parameters(name):
    found = decay_kinds(network(name))
    assert {key: found[key] for key in KINDS[name]} == KINDS[name]


def test_by_default_there_is_one_group_in_the_networks_order():
    model = network("cifar")
    model.set_trainable({2}, {1})
    (group,) = parameter_groups(model, OptimizerSection(weight_decay=0.1))
    assert group.scale == 1 and group.weight_decay == 0.1
    assert [*map(id, group.parameters)] == [id(each) for each in model.parameters() if each.requires_grad]


def test_rates_follow_the_schedule_in_the_tensors_that_hold_them():
    model = network("vit")
    settings = OptimizerSection(layer_decay=0.5)
    optimizer = make_optimizer(parameter_groups(model, settings), settings)
    held = [group["lr"] for group in optimizer.param_groups]
    set_rate(optimizer, 0.2)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.2 * 0.5**k for k in (4, 3, 2, 1, 0)])
    assert all(group["lr"] is each for group, each in zip(optimizer.param_groups, held, strict=True))


CHANGES = (VIT, "exits.after=[0]", "schedule.name=cosine", "epochs=1", "data.augment={}", "channels_last=false")
DECAYS = "optimizer={lr: 0.01, layer_decay: 0.6, weight_decay: {value: 0.5, exclude: [biases, positions]}}"


def test_a_run_is_torchs_adamw_by_hand(small, tmp_path):
    """With a parameter group of its own for each parameter, and torch's schedule."""
    recipe = small(*CHANGES, DECAYS)
    train(recipe, out=tmp_path / "run", device="cpu", quiet=True)
    data = load_data(recipe.data, device=CPU)
    model = with_exits(first_network(recipe, data.info), recipe.exits, seed=0).model.train()
    kinds = decay_kinds(model)
    optimizer = torch.optim.AdamW(
        [
            {
                "params": [parameter],
                "lr": 0.01 * layer_scale(model, name, 0.6),
                "weight_decay": 0.0 if kinds[name] & {"biases", "positions"} else 0.5,
            }
            for name, parameter in model.named_parameters()
        ]
    )
    steps = len(data.splits["train"]) // 32
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    augmenter = Augmenter(data.info, recipe.data.augment, 10)
    for batch in train_batches(data.splits["train"], batch_size=32, seed=derive_seed(recipe.seed, "order", 2), epoch=0):
        logits = [output.logits for output in model(augmenter.eval(batch.inputs))]
        (sum(F.cross_entropy(each, batch.targets) for each in logits) / len(logits)).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    found = weights(tmp_path / "run" / "model.safetensors")
    for name, tensor in model.state_dict().items():
        parts = 3 if name.endswith("in_proj_bias") else 1  # that of the keys has a gradient of 0, of which AdamW makes noise
        for one, other in [*zip(found[name].chunk(parts), tensor.chunk(parts), strict=True)][::2]:
            torch.testing.assert_close(one, other, rtol=1e-3, atol=2e-5, msg=name)


@pytest.mark.parametrize(
    "more",
    [["optimizer.clip_norm=1.0"], pytest.param(["optimizer.name=sgd"], marks=pytest.mark.thorough), ["optimizer.name=lion"]],
    ids=["adamw", "sgd", "lion"],
)
def test_a_stopped_run_goes_on_to_the_same_weights(small, tmp_path, monkeypatch, more):
    """Of a network whose parameters come in two layouts in memory and many groups."""
    recipe = small(DECAYS, "epochs=3", "patience=3", *more)
    train(recipe, out=tmp_path / "calm", device="cpu", quiet=True)
    steps = []
    with monkeypatch.context() as patched:
        patched.setattr(Display, "step", lambda _: steps.append(1) or len(steps) % 6 or os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(Interrupted):
            train(recipe, out=tmp_path / "run", device="cpu", quiet=True)
    train(recipe, out=tmp_path / "run", device="cpu", resume=True, quiet=True)
    assert same(weights(tmp_path / "run" / "model.safetensors"), weights(tmp_path / "calm" / "model.safetensors"))
    assert [row["lr"] for row in rows(tmp_path / "run")] == [row["lr"] for row in rows(tmp_path / "calm")]


def test_the_keys(small):
    recipe = small("optimizer.weight_decay={value: 0.05}", "phases={2: {weight_decay: 0.1, lr: 0.5}}")
    assert recipe.optimizer.decay == WeightDecaySection(value=0.05, exclude=("norms", "biases", "positions"))
    changed = recipe.optimizer.changed(lr=0.5, weight_decay=0.1)
    assert (changed.lr, changed.decay) == (0.5, WeightDecaySection(value=0.1))
    assert small("optimizer.weight_decay=0.05").optimizer.changed(lr=None, weight_decay=0.1).weight_decay == 0.1
    assert make_recipe(parse_yaml(dump_recipe(recipe), where="x"), where="x") == recipe
    with pytest.raises(EectlError, match="norms', 'biases' or 'positions'"):
        small("optimizer.weight_decay={value: 0.05, exclude: [bias]}")
    with pytest.raises(EectlError, match=r"optimizer\.weight_decay: "):
        small("optimizer.weight_decay=-1")
    with pytest.raises(EectlError, match=r"optimizer\.layer_decay"):
        small("optimizer.layer_decay=0")
