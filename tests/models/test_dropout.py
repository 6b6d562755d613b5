"""`backbone.drop_path` and `backbone.dropout` against the libraries' own networks with their own arguments, and what has none."""

import pytest
import timm
import torch
from torch import nn
from torchvision import models
from transformers import AutoConfig, AutoModelForSequenceClassification

from eectl.core.errors import EectlError
from eectl.data import load_data
from eectl.models.adapters.torchvision_traced import option_names
from eectl.models.build import build_backbone, build_model, with_dropout
from eectl.recipe.recipe import BackboneSection, ModelSpec
from eectl.training.network import first_network
from eectl.training.train import train

VIT = {"depth": 3, "embed_dim": 24, "num_heads": 2, "patch_size": 8}
IMAGE, TEXT = (3, 32, 32), (3, 16)


def build(name, shape=IMAGE, **keys):
    torch.manual_seed(0)
    return build_backbone(BackboneSection(name=name, **keys), input_shape=shape, num_outputs=4).net


def trained(net, *inputs, **named):
    """What a network gives in train mode, from one seed."""
    torch.manual_seed(1)
    result = net.train()(*inputs, **named)
    return getattr(result, "logits", result)


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("vit_tiny_patch16_224", VIT | {"img_size": (32, 32)}),
        ("resnet18", {}),
        ("convnext_atto", {"depths": (1, 1, 2, 1), "dims": (8, 16, 16, 24)}),
    ],
)
def test_timms_own_network_with_its_own_arguments_drops_the_same(name, args):
    own = {key: list(value) if isinstance(value, tuple) else value for key, value in args.items() if key != "img_size"}
    ours = build(f"timm/{name}", args=own, drop_path=0.3, dropout=0.4)
    torch.manual_seed(0)
    theirs = timm.create_model(name, num_classes=4, drop_path_rate=0.3, drop_rate=0.4, **args)
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(8, *IMAGE)
    assert torch.equal(trained(ours, images), trained(theirs, images))
    plain = build(f"timm/{name}", args=own)
    plain.load_state_dict(ours.state_dict())
    assert not torch.equal(trained(ours, images), trained(plain, images))


SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 50}
DISTIL = {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 16, "vocab_size": 50}


@pytest.mark.parametrize(
    ("kind", "args", "rates"),
    [
        ("bert", SMALL, ("hidden_dropout_prob", "attention_probs_dropout_prob")),
        ("distilbert", DISTIL, ("dropout", "attention_dropout")),
    ],
)
def test_transformers_own_network_with_its_own_arguments_drops_the_same(kind, args, rates):
    ours = build(f"hf/{kind}", TEXT, args=args, dropout=0.4)
    config = AutoConfig.for_model(kind, **args, num_labels=4, **dict.fromkeys(rates, 0.4))
    theirs = AutoModelForSequenceClassification.from_config(config)
    theirs.load_state_dict(ours.state_dict())
    tokens = {"input_ids": torch.randint(5, 50, (4, 16)), "attention_mask": torch.ones(4, 16, dtype=torch.int64)}
    assert torch.equal(trained(ours, **tokens), trained(theirs, **tokens))
    assert {module.p for module in ours.modules() if isinstance(module, nn.Dropout)} >= {0.4}


def test_torchvisions_own_network_with_its_own_arguments_drops_the_same():
    ours = build("torchvision/efficientnet_b0", drop_path=0.3, dropout=0.4)
    theirs = models.efficientnet_b0(num_classes=4, stochastic_depth_prob=0.3, dropout=0.4)
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(2, *IMAGE)
    assert torch.equal(trained(ours, images), trained(theirs, images))
    assert option_names("vit_b_16") == ("dropout", "attention_dropout")


def test_torchvisions_vit_has_dropout_and_no_drop_path():
    args = {"patch_size": 8, "dim": 16, "mlp_dim": 16, "depth": 2, "heads": 2}
    net = build("vit", args=args, dropout=0.3)
    assert net.encoder.dropout.p == 0.3 and all(layer.dropout.p == 0.3 for layer in net.encoder.layers)


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ({"name": "vit", "drop_path": 0.1}, r"backbone\.drop_path is 0\.1, and vit has no drop path \(stochastic depth\); leave"),
        ({"name": "resnet20", "dropout": 0.1}, r"backbone\.dropout is 0\.1, and resnet20 has no dropout; leave it out"),
        ({"name": "resnet18", "dropout": 0.0}, "resnet18 has no dropout"),
        ({"name": "hf/bert", "drop_path": 0.1}, "hf/bert has no drop path"),
        ({"name": "torchvision/convnext_tiny", "dropout": 0.1}, "torchvision/convnext_tiny has no dropout"),
        ({"name": "torchvision/mobilenet_v2", "drop_path": 0.1}, "torchvision/mobilenet_v2 has no drop path"),
        ({"name": "torchvision/nosuch", "drop_path": 0.1}, "torchvision has no classifier 'nosuch'"),
        ({"name": "timm/nosuch", "drop_path": 0.1}, "timm has no 'nosuch'"),
        (
            {"name": "timm/resnet18", "drop_path": 0.1, "args": {"drop_path_rate": 0.2}},
            r"backbone\.args\.drop_path_rate is 0\.2, and backbone\.drop_path or backbone\.dropout says 0\.1; keep one",
        ),
    ],
)
def test_what_has_none_or_says_two_is_one_line(keys, line):
    section = BackboneSection(**keys)
    with pytest.raises(EectlError, match=line):
        build_backbone(section, input_shape=TEXT if section.name.startswith("hf/") else IMAGE, num_outputs=4)


def test_a_checkpoint_has_them_as_arguments_and_training_from_it_may_change_them(small, tmp_path):
    network = "backbone={name: timm/vit_tiny_patch16_224, args: {depth: 2, embed_dim: 16, num_heads: 2, patch_size: 4}}"
    recipe = small(network, "backbone.drop_path=0.2", "exits.after=[0]", "epochs=1", "patience=1", "data.limit=40")
    train(recipe, out=tmp_path / "run", device="cpu", track_to="none")
    data = load_data(recipe.data, device=torch.device("cpu"))
    start = {"init": tmp_path / "run" / "model.safetensors"}
    same, other = (
        first_network(recipe.model_copy(update=start | {"backbone": recipe.backbone.model_copy(update=change)}), data.info)
        for change in ({}, {"drop_path": 0.5, "dropout": 0.1})
    )
    assert same.spec.backbone.args["drop_path_rate"] == 0.2 and same.spec.backbone.drop_path is None
    assert other.spec.backbone.args == dict(same.spec.backbone.args) | {"drop_path_rate": 0.5, "drop_rate": 0.1}
    assert all(
        torch.equal(a, b) for a, b in zip(same.model.state_dict().values(), other.model.state_dict().values(), strict=True)
    )
    rebuilt = build_model(ModelSpec.model_validate_json(other.spec.model_dump_json()))
    assert [m.drop_prob for m in rebuilt.modules() if type(m).__name__ == "DropPath"] == pytest.approx([0.5, 0.5])
    assert with_dropout(recipe.backbone).args["drop_path_rate"] == 0.2
