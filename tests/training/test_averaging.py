"""The moving average of the weights against timm's and torch's, and what is validated and saved where there is one."""

import copy
import os
import signal

import pytest
import torch
import torch.nn.functional as F
from timm.utils import ModelEmaV3
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from eectl.core.errors import EectlError, Interrupted
from eectl.core.progress import Display
from eectl.core.seeds import derive_seed
from eectl.data import Augmenter, load_data, train_batches
from eectl.models.checkpoint import load_checkpoint, read_about
from eectl.recipe.optimizer_section import EmaSection
from eectl.recipe.reading import dump_recipe, make_recipe, parse_yaml
from eectl.training.averaging import WeightAverage
from eectl.training.network import first_network, with_exits
from eectl.training.train import train
from tests.training.test_train import same, weights

CPU = torch.device("cpu")
VIT = "backbone={name: vit, args: {patch_size: 4, dim: 16, mlp_dim: 16, depth: 2, heads: 2}}"  # no BatchNorm


def network(recipe):
    return with_exits(first_network(recipe, load_data(recipe.data, device=CPU).info), recipe.exits, seed=0).model


def moved(model, generator):
    """As a step would: parameters that train and BatchNorm's statistics."""
    for tensor in model.state_dict(keep_vars=True).values():
        if tensor.requires_grad or (tensor.dim() and not isinstance(tensor, torch.nn.Parameter)):
            tensor.data += 0.1 * torch.randn(tensor.shape, generator=generator)


@pytest.mark.parametrize("warmup", [True, False])
def test_it_is_timms(small, warmup):
    model, generator = network(small()).to(memory_format=torch.channels_last), torch.Generator().manual_seed(0)
    model.set_trainable({2, 3}, {1, 2})
    average = WeightAverage(model, EmaSection(decay=0.8, warmup=warmup))
    timms = ModelEmaV3(model, decay=0.8, use_warmup=warmup)
    first = copy.deepcopy(model.state_dict())
    for step in range(25):
        moved(model, generator)
        average.begin_step(step)
        average.update()
        timms.update(model, step=step + 1 if warmup else None)
    raw = copy.deepcopy(model.state_dict())
    with average.in_place():
        for name, tensor in timms.module.state_dict().items():
            torch.testing.assert_close(model.state_dict()[name], tensor, rtol=1e-5, atol=1e-6, msg=name)
        frozen = [name for name, each in model.named_parameters() if not each.requires_grad]
        assert frozen and all(torch.equal(model.state_dict()[name], first[name]) for name in frozen)
        assert any(not torch.equal(model.state_dict()[name], raw[name]) for name in raw if "running_mean" in name)
    assert same(raw, model.state_dict())


def test_a_run_ends_in_the_average_of_torchs_loop(small, tmp_path):
    recipe = small(VIT, "exits.after=[0]", "optimizer={name: sgd, lr: 0.1, momentum: 0}", "schedule.name=constant", "epochs=1",
                   "data.augment={}", "channels_last=false", "ema={decay: 0.7, warmup: false}")  # fmt: skip
    train(recipe, out=tmp_path / "run", device="cpu", quiet=True)
    data = load_data(recipe.data, device=CPU)
    model = network(recipe).train()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.7))
    average.update_parameters(model)  # the first call copies
    optimizer, augmenter = torch.optim.SGD(model.parameters(), lr=0.1), Augmenter(data.info, recipe.data.augment, 10)
    for batch in train_batches(data.splits["train"], batch_size=32, seed=derive_seed(recipe.seed, "order", 2), epoch=0):
        logits = [output.logits for output in model(augmenter.eval(batch.inputs))]
        optimizer.zero_grad()
        (sum(F.cross_entropy(each, batch.targets) for each in logits) / len(logits)).backward()
        optimizer.step()
        average.update_parameters(model)
    found = weights(tmp_path / "run" / "model.safetensors")
    for name, tensor in average.module.state_dict().items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5, msg=name)
    assert max((found[name] - tensor).abs().max() for name, tensor in model.state_dict().items()) > 1e-2
    entry, split = read_about(tmp_path / "run" / "model.safetensors").history[-1], data.splits["validation"]
    outputs = average.module.eval()(augmenter.eval(split.rows(torch.arange(len(split)))))
    losses = [F.cross_entropy(output.logits, split.labels).item() for output in outputs]
    assert entry["validation"]["loss"] == pytest.approx(losses, rel=1e-4)


def test_each_phase_averages_what_it_trains(small, tmp_path):
    """The last phase of `disjoint` leaves the backbone, that is the first phase's average, as it is."""
    train(small("regime=disjoint", "ema=0.9", "epochs=1"), out=tmp_path / "run", device="cpu", quiet=True)
    first, last = (weights(tmp_path / "run" / f"phase-{number}.safetensors") for number in (1, 3))
    assert all(torch.equal(tensor, last[name]) for name, tensor in first.items())
    train(small("regime=disjoint", "epochs=1"), out=tmp_path / "plain", device="cpu", quiet=True)
    assert not same(first, weights(tmp_path / "plain" / "phase-1.safetensors"))
    assert load_checkpoint(tmp_path / "run" / "model.safetensors").about.recipe["ema"] == {"decay": 0.9, "warmup": True}


@pytest.mark.parametrize("more", [[], pytest.param(["loss_weights=l2w"], marks=pytest.mark.thorough)])
def test_a_stopped_run_goes_on_to_the_same_average(small, tmp_path, monkeypatch, more):
    recipe = small("ema=0.95", "epochs=3", "patience=3", *more)
    train(recipe, out=tmp_path / "calm", device="cpu", quiet=True)
    steps = []
    with monkeypatch.context() as patched:
        patched.setattr(Display, "step", lambda _: steps.append(1) or len(steps) % 6 or os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(Interrupted):
            train(recipe, out=tmp_path / "run", device="cpu", quiet=True)
    kept = weights(tmp_path / "run" / "resume" / "state.safetensors")
    assert any(
        not torch.equal(tensor, kept[name.replace("ema.", "model.")]) for name, tensor in kept.items() if name[:4] == "ema."
    )
    train(recipe, out=tmp_path / "run", device="cpu", resume=True, quiet=True)
    assert same(weights(tmp_path / "run" / "model.safetensors"), weights(tmp_path / "calm" / "model.safetensors"))


def test_the_key_takes_a_decay_alone():
    for value in (0.99, {"decay": 0.99}, {"decay": 0.99, "warmup": True}):
        recipe = make_recipe({"ema": value}, where="test")
        assert recipe.ema == EmaSection(decay=0.99)
        assert make_recipe(parse_yaml(dump_recipe(recipe), where="x"), where="x") == recipe
    for value, fault in ((True, "give the decay alone, such as 0.9999"), (1.0, "less than 1"), ({"decy": 0.9}, "no such key")):
        with pytest.raises(EectlError, match=fault):
            make_recipe({"ema": value}, where="test")
