"""Augmentation in windows of steps: the batches of single steps bit for bit, in few launches, without waiting for the device."""

import contextlib
import itertools
import os
import signal

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from eectl.core.distributed import World
from eectl.core.errors import Interrupted
from eectl.core.progress import Display
from eectl.core.seeds import derive_seed
from eectl.data import DataInfo, Dataset, Split, data_info, splits, train_batches
from eectl.data.images import MemoryImages
from eectl.data.splits import send_all
from eectl.recipe.augment_section import AugmentSection, RandAugmentSection
from eectl.recipe.reading import read_recipe
from eectl.training.feed import Feed, training_data, window_length
from eectl.training.running import Execution
from eectl.training.train import train
from tests.training.test_train import same, weights

CPU, META = torch.device("cpu"), torch.device("meta")
ALONE = World(0, 1, CPU)
AUGMENT = AugmentSection(
    resized_crop=(0.5, 1.0), trivial=True, crop=1, flip=True, rotation=10, contrast=0.2, erasing=0.5, mixup=0.4, cutmix=0.4
)
REPEATED = AugmentSection(rand_augment=RandAugmentSection(), color_jitter=0.2, repeats=3)


def dataset(info, num_rows, augment, device=CPU):
    pixels = torch.randint(0, 256, (num_rows, *info.input_shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(num_rows) % len(info.classes)
    split = Split("train", MemoryImages(pixels.to(device)), labels, np.arange(num_rows, dtype=np.uint64), device=device)
    return Dataset(info, {"train": split, "validation": split}, augment=augment)


def toy_feed(window, *, num_rows=70, augment=AUGMENT, channels_last=False):
    info = DataInfo("toy", tuple("abcde"), (3, 10, 12), (0.2, 0.4, 0.6), (0.5, 0.3, 0.2))
    return Feed(training_data(dataset(info, num_rows, augment)), Execution(CPU, channels_last, "float32"), window=window)


def batches_of(feed, *, start=0, world=ALONE, batch_size=8):
    return list(feed.training(batch_size=batch_size, seed=3, epoch=2, start=start, world=world, step_seed=lambda i: 100 + i))


def by_hand(feed, *, batch_size=8, world=ALONE):
    """One step at a time: its rows, then its seed, then its augmentation."""
    found = []
    for number, batch in enumerate(
        train_batches(feed.data.train, batch_size=batch_size, seed=3, epoch=2, rank=world.rank, world=world.size)
    ):
        torch.manual_seed(100 + number)
        found.append(feed.data.augmenter.train(batch.inputs, batch.targets))
    return found


def assert_same(found, expected):
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


@pytest.mark.parametrize("augment", [AUGMENT, AugmentSection()], ids=["everything", "nothing"])
@pytest.mark.parametrize("window", [None, 1, 3, 8, 50])
def test_any_window_gives_the_steps_batches(window, augment):
    feed = toy_feed(window, augment=augment)
    assert_same(batches_of(feed), by_hand(feed))


def test_repeats_of_an_image_are_varied_apart():
    """Three in a row, the epoch as long as ever, and no two of them alike."""
    found = batches_of(toy_feed(3, augment=REPEATED))
    assert len(found) == len(batches_of(toy_feed(3)))
    rows = torch.cat([batch.rows for batch in train_batches(toy_feed(1).data.train, batch_size=8, seed=3, epoch=2, repeats=3)])
    images = torch.cat([batch.inputs for batch in found])
    assert rows.tolist() == rows[::3].repeat_interleave(3)[: len(rows)].tolist() and len(set(rows.tolist())) == -(-len(rows) // 3)
    assert len({image.numpy().tobytes() for image in images}) == len(images)


@pytest.mark.parametrize("start", [1, 4, 7])
def test_an_epoch_that_goes_on_in_a_window_has_the_same_batches(start):
    assert_same(batches_of(toy_feed(3), start=start), by_hand(toy_feed(1))[start:])
    assert batches_of(toy_feed(3), start=8) == []


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_each_process_gets_its_part_of_each_step(rank):
    """Eight rows do not go round three processes evenly: they have 3, 3 and 2."""
    world = World(rank, 3, CPU)
    found = batches_of(toy_feed(4), world=world)
    assert_same(found, by_hand(toy_feed(1), world=world))
    assert {len(batch.targets) for batch in found} == {3 - (rank == 2)}


def test_a_split_of_less_than_a_batch():
    assert_same(batches_of(toy_feed(4, num_rows=5)), by_hand(toy_feed(1, num_rows=5)))


def test_each_steps_images_lie_as_the_network_does():
    for batch, plain in zip(batches_of(toy_feed(4, channels_last=True)), batches_of(toy_feed(1)), strict=True):
        assert batch.inputs.is_contiguous(memory_format=torch.channels_last) and torch.equal(batch.inputs, plain.inputs)


@pytest.mark.parametrize("augment", [AUGMENT, REPEATED], ids=["everything", "repeats"])
def test_a_run_is_the_same_in_windows_and_after_a_stop_within_one(small, tmp_path, monkeypatch, augment):
    """Dropout draws from the generator that augmentation draws from. An epoch is a window of three steps, and one more."""
    vit = "backbone={name: vit, args: {patch_size: 4, dim: 16, mlp_dim: 16, depth: 3, heads: 2, dropout: 0.3}}"
    data = {"limit": 150, "augment": augment.model_dump(mode="json", exclude_defaults=True)}
    recipe = small("epochs=2", "patience=2", "exits.after=[0, 1]", vit, data=data)
    train(recipe, out=tmp_path / "single", device="cpu", quiet=True)
    monkeypatch.setattr("eectl.training.feed.window_length", lambda *_: 3)
    train(recipe, out=tmp_path / "windows", device="cpu", quiet=True)
    steps = []
    with monkeypatch.context() as patched, pytest.raises(Interrupted):
        patched.setattr(Display, "step", lambda _: steps.append(1) or (len(steps) == 5 and os.kill(os.getpid(), signal.SIGINT)))
        train(recipe, out=tmp_path / "stopped", device="cpu", quiet=True)
    train(recipe, out=tmp_path / "stopped", device="cpu", resume=True, quiet=True)
    for name in ("windows", "stopped"):
        assert same(weights(tmp_path / name / "model.safetensors"), weights(tmp_path / "single" / "model.safetensors"))


def test_window_lengths_by_hand():
    assert window_length((3, 32, 32), 256, CPU) == 1
    assert window_length((3, 32, 32), 256, META) == 64  # 85 would fit
    assert window_length((3, 64, 64), 256, META) == 21  # 256 MiB by 12 MiB
    assert window_length((3, 224, 224), 256, META) == 1
    assert window_length((3, 512, 512), 256, META) == 1  # a batch alone is more


class Launches(TorchDispatchMode):
    """Counts the operations on the meta device that would launch a kernel or a copy: all but views and empty tensors."""

    def __init__(self):
        super().__init__()
        self.names, self.copies = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        flat = [value for value in (*args, *(kwargs or {}).values(), result) if isinstance(value, torch.Tensor)]
        listed = [each for value in args if isinstance(value, (list, tuple)) for each in value if isinstance(each, torch.Tensor)]
        is_view = any(each.alias_info is not None and not each.alias_info.is_write for each in func._schema.returns)
        if any(value.device == META for value in flat + listed) and not is_view and "empty" not in func.__name__:
            self.names.append(func.__name__)
            self.copies += any(value.device == CPU and value.dim() for value in flat + listed)
        return result


@pytest.mark.parametrize(("name", "window", "most"), [("cifar100-vit-t", 64, 2), ("tinyimagenet-resnet50", 21, 7)])
def test_a_window_launches_little_and_never_waits(monkeypatch, name, window, most):
    """An epoch of two windows on the meta device, which has no values to give back, at the recipe's batch size."""
    known = torch.autocast
    monkeypatch.setattr(
        torch, "autocast", lambda kind, **more: contextlib.nullcontext() if kind == "meta" else known(kind, **more)
    )
    recipe = read_recipe(name)
    info, size = data_info(recipe.data), recipe.batch_size
    assert size == 256 and window_length(info.input_shape, size, META) == window
    data = dataset(info, size, recipe.data.augment, META)
    split = data.splits["train"]
    steps = [torch.arange(size)[None].expand(window, size)] * 2
    monkeypatch.setattr("eectl.training.feed.train_batches", lambda *_, **__: split.batches(steps))
    feed = Feed(training_data(data), Execution(META, False, None))
    world = World(0, 1, META)
    epoch = feed.training(batch_size=size, seed=0, epoch=0, start=0, world=world, step_seed=lambda i: derive_seed(1, i))
    assert len(list(itertools.islice(epoch, window))) == window  # what is sent once an epoch is sent
    with Launches() as launches:
        assert len(list(epoch)) == window
    assert launches.copies == 1
    assert 0 < len(launches.names) / window <= most
    assert not [each for each in launches.names if "nonzero" in each or "local_scalar" in each or "masked_select" in each]


def test_tensors_sent_together_arrive_whole():
    tensors = [
        torch.arange(3),
        torch.rand(2, 3),
        torch.tensor([True, False, True]),
        torch.zeros(0, 2),
        torch.tensor(7, dtype=torch.uint8),
    ]
    assert send_all(tensors, CPU) is tensors
    copied = []

    class Device:
        """Another device than the CPU, which is the CPU."""

        type = "cpu, but further away"

    def send(values, device):
        copied.append(len(values))
        return values.clone()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(splits, "send", send)
        there = send_all(tensors, Device())
    assert copied == [32 + 32 + 16 + 0 + 16]  # in sixteens
    for one, other in zip(tensors, there, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)
