"""Blocks that no phase trains: bit-equal afterwards, and what is left trains as in a loop written out."""

import pytest
import torch
import torch.nn.functional as F
from running import eectl

from eectl.core.errors import EectlError
from eectl.core.seeds import derive_seed
from eectl.data import Augmenter, load_data, train_batches
from eectl.models.build import attach_exits, build_backbone
from eectl.models.checkpoint import load_checkpoint
from eectl.recipe.choices import REGIME_CHOICES
from eectl.recipe.recipe import BackboneSection
from eectl.training.network import first_network, with_exits
from eectl.training.train import train
from tests.training.test_train import same, weights

CPU = torch.device("cpu")
FROZEN = ("backbone.net.conv1", "backbone.net.bn1", "backbone.net.layer1.0", "backbone.net.layer1.1", "backbone.net.layer1.2")


def is_frozen(name):
    """Whether a tensor of ResNet-20 is of its stem or its blocks 0 to 2."""
    return name.startswith(tuple(f"{part}." for part in FROZEN))


TWO = ("disjoint", "branch-wise")


@pytest.mark.parametrize(
    "regime", [pytest.param(each, marks=() if each in TWO else pytest.mark.thorough) for each in REGIME_CHOICES]
)
def test_they_stay_bit_equal_in_every_phase(small, tmp_path, regime):
    """Statistics and all; one exit is within them, one after them."""
    recipe = small(f"regime={regime}", "freeze_until=2", "epochs=1", "ema=0.5", "optimizer.weight_decay=0.1")
    said: list[str] = []
    train(recipe, out=tmp_path / "run", device="cpu", say=said.append)
    assert any("the stem and blocks 0–2 are frozen at random weights" in line for line in said)
    first = first_network(recipe, load_data(recipe.data, device=CPU).info).model.state_dict()
    for path in (tmp_path / "run").glob("phase-*.safetensors"):
        found = weights(path)
        assert all(torch.equal(found[name], tensor) for name, tensor in first.items() if is_frozen(name))
    moved = {name for name, tensor in first.items() if not torch.equal(found[name], tensor)}
    trains = {name for name in first if not is_frozen(name) and not name.endswith("num_batches_tracked")}
    assert trains <= moved or regime == "branch-wise"


def test_the_rest_trains_as_by_hand(small, tmp_path):
    recipe = small("freeze_until=2", "optimizer={name: sgd, lr: 0.05, momentum: 0}", "schedule.name=constant", "epochs=1",
                   "data.augment={}", "channels_last=false")  # fmt: skip
    train(recipe, out=tmp_path / "run", device="cpu", quiet=True)
    data = load_data(recipe.data, device=CPU)
    model = with_exits(first_network(recipe, data.info), recipe.exits, seed=0).model.train()
    for part in FROZEN:
        model.get_submodule(part).eval().requires_grad_(False)
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.05)
    augmenter = Augmenter(data.info, recipe.data.augment, 10)
    for batch in train_batches(data.splits["train"], batch_size=32, seed=derive_seed(recipe.seed, "order", 2), epoch=0):
        logits = [output.logits for output in model(augmenter.eval(batch.inputs))]
        optimizer.zero_grad()
        (sum(F.cross_entropy(each, batch.targets) for each in logits) / len(logits)).backward()
        optimizer.step()
    found = weights(tmp_path / "run" / "model.safetensors")
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(found[name], tensor, rtol=2e-3, atol=2e-4, msg=name)


def test_no_graph_is_kept_before_the_first_block_that_trains(small):
    recipe = small()
    model = with_exits(first_network(recipe, load_data(recipe.data, device=CPU).info), recipe.exits, seed=0).model
    model.set_trainable({1, 2, 3}, {1, 2}, freeze_until=2)
    model.train_parts({1, 2, 3}, {1, 2}, freeze_until=2)
    hidden, needs = model.backbone.stem(torch.randn(2, 1, 8, 8)), []
    for index in range(model.backbone.depth):
        hidden = model.backbone.block(index, hidden)
        needs.append(hidden.x.requires_grad)
    assert needs == [False] * 3 + [True] * (model.backbone.depth - 3)
    assert {name for name, each in model.named_parameters() if not each.requires_grad} == {
        name for name, _ in model.named_parameters() if is_frozen(name)
    }


def test_it_holds_from_a_checkpoint_and_is_said(small, tmp_path):
    """It is the recipe's, whatever the checkpoint trained with."""
    train(small("epochs=1"), out=tmp_path / "first", device="cpu", quiet=True)
    start = tmp_path / "first" / "model.safetensors"
    train(small("epochs=1", "freeze_until=0"), start=start, out=tmp_path / "second", device="cpu", quiet=True)
    before, after = weights(start), weights(tmp_path / "second" / "model.safetensors")
    kept = {name for name in before if torch.equal(before[name], after[name])}
    frozen = {name for name in before if name.startswith(tuple(f"{part}." for part in FROZEN[:3]))}
    assert frozen <= kept and not any(name.endswith("conv1.weight") for name in kept - frozen)
    assert load_checkpoint(tmp_path / "second" / "model.safetensors").about.recipe["freeze_until"] == 0
    out, said = eectl("train", "digits", "--dry-run", "--set", "freeze_until=1", "--device", "cpu")
    assert "the stem and blocks 0–1 never" in out and "frozen at random weights" in said
    assert not same(before, after)


def test_a_block_that_is_not_there_is_refused_before_anything_is_written(small, tmp_path):
    with pytest.raises(EectlError, match="freeze_until is 9; resnet20 has blocks 0–8, and its head trains"):
        train(small("freeze_until=9"), out=tmp_path / "run", device="cpu", quiet=True)
    assert not (tmp_path / "run").exists()
    with pytest.raises(EectlError, match="freeze_until"):
        small("freeze_until=-1")


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["timm/mobilevitv2_050", "timm/pvt_v2_b0"])
def test_it_holds_in_networks_that_are_cut_by_tracing(name):
    """Whose pieces are others in train mode; statistics of the rest move."""
    backbone = build_backbone(BackboneSection(name=name), input_shape=(3, 64, 64), num_outputs=5)
    model = attach_exits(backbone, after=[1], heads="linear", num_outputs=5, input_shape=(3, 64, 64))
    model.set_trainable({1, 2}, {1}, freeze_until=2)
    model.train_parts({1, 2}, {1}, freeze_until=2)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.1)
    sum(output.logits.square().mean() for output in model(torch.randn(4, 3, 64, 64))).backward()
    optimizer.step()
    moved = {key for key, tensor in model.state_dict().items() if not torch.equal(tensor, before[key])}
    parts = {backbone.locate(key.removeprefix("backbone.net.")) for key in moved if key.startswith("backbone.")}
    assert parts == set(range(3, backbone.depth + 1))
