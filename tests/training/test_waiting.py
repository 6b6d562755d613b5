"""No step waits for its device: an epoch on the meta device, which has no values to give back, its copies being watched."""

import contextlib
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from toy_text import make_rows, write_csv, write_tokenizer

from eectl.core.distributed import World
from eectl.core.progress import Display
from eectl.data import load_data
from eectl.training.feed import training_data
from eectl.training.loop import Journal, begin_phase, make_feed, train_epoch
from eectl.training.network import first_network, planned_phases, resolve, with_exits
from eectl.training.phase import phase_settings
from eectl.training.run_folder import RunFolder
from eectl.training.running import make_execution

META = torch.device("meta")
AUGMENT = {"resized_crop": [0.5, 1.0], "trivial": True, "crop": 1, "flip": True, "rotation": 10, "contrast": 0.2, "erasing": 0.5}
VIT = "backbone={name: vit, args: {patch_size: 4, dim: 16, mlp_dim: 16, depth: 2, heads: 2}}"
BERT = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}


class Copies(TorchDispatchMode):
    """Notes, for each copy from the CPU to the device, whether the CPU goes on meanwhile."""

    def __init__(self):
        super().__init__()
        self.goes_on = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func is torch.ops.aten._to_copy.default and args[0].device.type == "cpu" and result.device == META:
            self.goes_on.append(kwargs.get("non_blocking", False))
        elif func is torch.ops.aten.copy_.default and args[1].device.type == "cpu" and args[0].device == META:
            self.goes_on.append(len(args) > 2 and args[2])
        return result


def epoch(recipe, folder, monkeypatch, *, phase=0):
    """An epoch's steps on the meta device; for each copy there, whether the CPU goes on meanwhile."""
    known = torch.autocast

    def autocast(kind, *options, **more):
        """Augmentation turns it off, and it does not know the device."""
        return contextlib.nullcontext() if kind == "meta" else known(kind, *options, **more)

    monkeypatch.setattr(torch, "autocast", autocast)
    data = load_data(recipe.data, device=META)
    network = first_network(recipe, data.info)
    recipe = resolve(recipe, network)
    model = with_exits(network, recipe.exits, seed=0).model
    known_data, world, display = training_data(data), World(0, 1, META), Display(quiet=True)
    execution = make_execution(recipe, model.backbone, META)
    settings = phase_settings(recipe, planned_phases(recipe)[phase], model, known_data, num_processes=1)
    running = begin_phase(model, settings, execution=execution, world=world, tracking=None, display=display)
    feed = make_feed(model, settings, known_data, execution=execution, world=world, display=display)
    known_data.augmenter.eval(torch.empty(1, *data.info.input_shape, device=META))  # its constants go there once
    run_folder = RunFolder(folder)
    run_folder.saved_at = math.inf  # saving waits for the device, and is not asked for here however slow the machine
    with Copies() as copies:
        train_epoch(running, feed, journal=Journal(run_folder, display, {}))
    assert running.progress.step >= 4
    return copies.goes_on


@pytest.mark.parametrize(
    "changes",
    [
        ["data.augment={}"],
        ["data.channels=3"],
        ["data.augment={mixup: 0.2}", "distillation.teacher=later", "optimizer.clip_norm=1.0"],
        ["data.augment={cutmix: 0.2}", "exits.head=gpf-8", "loss_weights=equilibrium"],
        ["regime=disjoint", "exits.head=ztw", "data.augment={}"],
        [VIT, "exits.after=[0]", "data.augment={}"],
        ["checkpoint_activations=true", "label_smoothing=0.1"],
        ["class_weights=balanced", "metric=balanced"],
    ],
)
def test_images(small, tmp_path, monkeypatch, changes):
    recipe = small(*changes, data={"limit": 150, "augment": AUGMENT})
    goes_on = epoch(recipe, tmp_path, monkeypatch, phase=int("regime=disjoint" in changes))
    assert len(goes_on) >= 2 and all(goes_on)  # the rows, for inputs and for targets, and what augmentation draws


def test_texts(small, tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    write_csv(tmp_path / "data" / "train.csv", make_rows(200, seed=1))
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    data = {"name": "text", "root": str(tmp_path / "data"), "target": "mood", "tokenizer": tokenizer, "max_length": 20}
    recipe = small(data=data, backbone={"name": "hf/bert", "args": BERT}, exits={"after": [0, 1]})
    goes_on = epoch(recipe, tmp_path, monkeypatch)
    assert len(goes_on) == 2 and all(goes_on)


@pytest.mark.parametrize("mistake", [lambda x: x.mean().item(), lambda x: x[x > 0], lambda x: x.nonzero(), lambda x: x.cpu()])
def test_the_meta_device_notices(mistake):
    with pytest.raises((RuntimeError, NotImplementedError)):
        mistake(torch.ones(3, device=META)).sum()
