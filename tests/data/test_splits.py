"""Splits are stratified, disjoint, a function of the seed; batches are a function of seed and epoch, cut over processes."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from timm.data.distributed_sampler import RepeatAugSampler
from torchvision.transforms.v2.functional import resize

from eectl.core.errors import EectlError
from eectl.data import Dataset, Split, eval_batches, load_data, num_batches, train_batches
from eectl.data.images import MemoryImages
from eectl.data.splits import pixel_ids
from eectl.recipe.data_section import DataSection
from eectl.recipe.reading import make_recipe

CPU = torch.device("cpu")


def digits(**changes: object) -> Dataset:
    return load_data(DataSection(**changes), device=CPU)


def toy(count: int, name: str = "toy", first: int = 0) -> Split:
    pixels = torch.arange(first, first + count, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 2, 2).contiguous()
    labels = torch.arange(count) % 3
    return Split(name, MemoryImages(pixels), labels, pixel_ids(pixels.numpy(), labels.tolist())[1], device=CPU)


def seen(batches) -> list[int]:
    return [row for batch in batches for row in batch.rows.tolist()]


@pytest.fixture(scope="module")
def data() -> Dataset:
    return digits()


def test_digits_is_split_by_class_and_nothing_is_lost(data):
    sizes = {name: len(split) for name, split in data.splits.items()}
    assert sizes == {"train": 1150, "validation": 144, "calibration": 144, "test": 359}
    everywhere = torch.bincount(torch.cat([split.labels for split in data.splits.values()])) / 1797
    for split in data.splits.values():
        assert split.labels.dtype == torch.int64
        assert (torch.bincount(split.labels) / len(split) - everywhere).abs().max() < 0.01


def test_splits_are_disjoint_and_no_two_have_one_fingerprint(data):
    ids = np.concatenate([split.ids for split in data.splits.values()])
    assert ids.dtype == np.uint64 and len(np.unique(ids)) == 1797
    assert len({split.fingerprint for split in data.splits.values()}) == 4


def test_splits_depend_on_the_split_seed_alone(data):
    def prints(dataset: Dataset) -> dict[str, str]:
        return {name: split.fingerprint for name, split in dataset.splits.items()}

    assert prints(digits()) == prints(data)
    assert prints(digits(image_size=12, channels=3, in_memory=False)) == prints(data)
    other = prints(digits(split_seed=7))
    assert all(other[name] != value for name, value in prints(data).items())


def test_limit_cuts_training_images_only_and_by_class(data):
    small = digits(limit=100)
    assert torch.bincount(small.splits["train"].labels).tolist() == [10] * 10
    for name in ("validation", "calibration", "test"):
        assert small.splits[name].fingerprint == data.splits[name].fingerprint
    assert np.isin(small.splits["train"].ids, data.splits["train"].ids).all()
    assert len(digits(limit=1145).splits["train"]) == 1140  # scikit-learn leaves one of each class out
    assert digits(limit=5000).splits["train"].fingerprint == data.splits["train"].fingerprint


def test_a_split_too_small_for_every_class_is_one_line():
    for changes, place in (
        ({"limit": 9}, "data.limit"),
        ({"calibration": 0.004}, "data.calibration"),
        ({"validation": 0.001}, "data.validation"),
    ):
        with pytest.raises(EectlError, match=f"^{place}.*every split needs every class") as caught:
            digits(**changes)
        assert "\n" not in str(caught.value)


def test_an_id_depends_on_pixels_and_label():
    image = np.zeros((1, 1, 2, 2), np.uint8)
    changed = image.copy()
    changed[0, 0, 1, 1] = 1
    contents, ids = zip(*(pixel_ids(*pair) for pair in ((image, [0]), (image, [1]), (changed, [0]))), strict=True)
    assert len({int(each[0]) for each in ids}) == 3
    assert contents[0] == contents[1] != contents[2]
    assert ids[1][0] == int.from_bytes(hashlib.blake2b(bytes(4) + b"\1\0\0\0", digest_size=8).digest(), "little")


def test_an_epoch_has_whole_batches_in_an_order_of_seed_and_epoch():
    split = toy(23)

    def order(seed: int, epoch: int) -> list[int]:
        return seen(train_batches(split, batch_size=5, seed=seed, epoch=epoch))

    assert num_batches(split, 5) == 4
    rows = order(0, 0)
    assert len(rows) == len(set(rows)) == 20
    assert rows == order(0, 0)
    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9
    missed = {row for epoch in range(60) for row in set(range(23)) - set(order(0, epoch))}
    assert missed == set(range(23))  # what is dropped differs by epoch


def test_batches_hold_the_rows_they_name():
    split = toy(23)
    for batch in (*train_batches(split, batch_size=5, seed=1, epoch=2), *eval_batches(split, batch_size=5)):
        assert batch.inputs.dtype == torch.uint8 and batch.targets.dtype == torch.int64
        assert batch.inputs[:, 0, 1, 1].tolist() == batch.rows.tolist()
        assert torch.equal(batch.targets, split.labels[batch.rows])
    assert split.rows(torch.tensor([22, 0, 22]))[:, 0, 0, 0].tolist() == [22, 0, 22]
    assert split.rows(torch.arange(0)).shape == (0, 1, 2, 2)


def test_the_order_does_not_touch_the_global_generator():
    state = torch.get_rng_state()
    assert list(train_batches(toy(9), batch_size=2, seed=0, epoch=0))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("start", [0, 1, 3, 4])
def test_start_resumes_the_same_epoch(start):
    split, options = toy(23), {"batch_size": 5, "seed": 3, "epoch": 1}
    assert seen(train_batches(split, start=start, **options)) == seen(train_batches(split, **options))[5 * start :]


@pytest.mark.parametrize(("start", "lengths"), [(0, [3, 1]), (1, [3]), (2, [2]), (4, [])])
def test_windows_are_the_batches_joined(start, lengths):
    split, options = toy(23), {"batch_size": 5, "seed": 3, "epoch": 1, "start": start, "rank": 1, "world": 2}
    windows = list(train_batches(split, window=3, **options))
    assert [tuple(window.rows.shape) for window in windows] == [(length, 2) for length in lengths]
    for window in windows:
        assert window.inputs[:, 0, 1, 1].tolist() == window.rows.flatten().tolist()
        assert torch.equal(window.targets, split.labels[window.rows.flatten()])
    assert [row for window in windows for row in window.rows.flatten().tolist()] == seen(train_batches(split, **options))


@pytest.mark.parametrize(("count", "batch_size", "world"), [(23, 5, 2), (24, 8, 3), (7, 16, 2), (5, 5, 5)])
def test_processes_share_each_global_batch(count, batch_size, world):
    split, options = toy(count), {"batch_size": batch_size, "seed": 0, "epoch": 0}
    alone = list(train_batches(split, **options))
    ranks = [list(train_batches(split, rank=rank, world=world, **options)) for rank in range(world)]
    assert len(alone) == num_batches(split, batch_size)
    for step, batch in enumerate(alone):
        for rank in range(world):
            assert torch.equal(ranks[rank][step].rows, batch.rows[rank::world])


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("repeats", [2, 3])
def test_repeats_come_in_the_order_of_timms_sampler(repeats, world):
    """By the places that timm's sampler gives each process, in the order of the epoch without repeats."""
    split, options = toy(24), {"batch_size": 6, "seed": 3, "epoch": 1}
    order = seen(train_batches(split, **options))
    for rank in range(world):
        sampler = RepeatAugSampler(range(24), world, rank, shuffle=False, num_repeats=repeats, selected_round=0)
        found = list(train_batches(split, rank=rank, world=world, repeats=repeats, **options))
        assert seen(found) == [order[place] for place in sampler]
        assert seen(train_batches(split, rank=rank, world=world, repeats=repeats, start=2, **options)) == seen(found[2:])
        (joined,) = train_batches(split, rank=rank, world=world, repeats=repeats, window=9, **options)
        assert joined.rows.flatten().tolist() == seen(found)
        for batch in found:
            assert batch.inputs[:, 0, 0, 0].tolist() == batch.rows.tolist()


def test_fewer_rows_than_processes_is_an_error():
    with pytest.raises(EectlError, match="batch_size: 2 rows a batch do not go round 3 processes"):
        list(train_batches(toy(9), batch_size=2, seed=0, epoch=0, world=3))


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_evaluation_sees_every_row_once_in_order(world):
    split = toy(7)
    for batch_size in (1, 3, 100):
        ranks = [list(eval_batches(split, batch_size=batch_size, rank=rank, world=world)) for rank in range(world)]
        assert [seen(batches) for batches in ranks] == [list(range(rank, 7, world)) for rank in range(world)]
        assert all(len(batch.rows) == batch_size for batches in ranks for batch in batches[:-1])


def test_sizes_channels_and_constants(data):
    big = digits(image_size=16, channels=3)
    assert big.info.input_shape == (3, 16, 16) and big.info.mean == data.info.mean * 3
    rows = torch.tensor([0, 700, 3])
    images = big.splits["train"].rows(rows)
    assert images.shape == (3, 3, 16, 16) and images.dtype == torch.uint8
    assert torch.equal(images[:, 0], images[:, 2])
    theirs = resize(data.splits["train"].rows(rows), [16, 16], antialias=True)
    assert (images[:, :1].int() - theirs.int()).abs().max() <= 1
    tiny = digits(image_size=3).splits["train"].rows(rows)
    assert (tiny.int() - resize(data.splits["train"].rows(rows), [3, 3], antialias=True).int()).abs().max() <= 1
    lazily = digits(image_size=16, channels=3, in_memory=False)
    assert torch.equal(lazily.splits["train"].rows(rows), images)
    with_own = digits(normalize=((0.1,), (0.2,)))
    assert (with_own.info.mean, with_own.info.std) == ((0.1,), (0.2,))
    assert digits(normalize="imagenet", channels=3).info.mean == (0.485, 0.456, 0.406)
    assert digits(normalize="imagenet").info.mean == pytest.approx((0.4589,), abs=1e-3)
    with pytest.raises(EectlError, match=r"data\.normalize has 3 means"):
        digits(normalize=((0.1,) * 3, (0.2,) * 3))


def test_digits_constants_are_its_own(data):
    pixels = torch.cat([split.rows(torch.arange(len(split))) for split in data.splits.values()]).double() / 255
    assert (round(pixels.mean().item(), 4), round(pixels.std().item(), 3)) == (data.info.mean[0], data.info.std[0])


def test_an_unknown_data_set_offers_the_nearest():
    with pytest.raises(EectlError, match=r"data\.name: is 'cifar-10'; unknown data set 'cifar-10' \(did you mean 'cifar10'\?\)"):
        make_recipe({"data": {"name": "cifar-10"}}, where="x")


def test_info_is_frozen(data):
    assert replace(data.info, name="x").name == "x"
    with pytest.raises(AttributeError):
        data.info.name = "y"
