"""Published image data sets in their archives' own layouts, and image files of any size cut and resized as torchvision does."""

import hashlib
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets, transforms
from torchvision.transforms import InterpolationMode

from eectl.core.errors import EectlError
from eectl.core.seeds import derive_seed
from eectl.data import load_data, train_batches
from eectl.data.archives import IMAGENETTE
from eectl.data.load import data_info
from eectl.recipe.data_section import DataSection

CPU = torch.device("cpu")
TINY = {"n02002724": (0, "black stork, Ciconia nigra"), "n01443537": (1, "goldfish, Carassius auratus"), "n09193705": (2, "alp")}


def colour(path: Path, channel: int, *, size: tuple[int, int] = (64, 64), seed: int = 0) -> None:
    """A noisy image that is bright in one channel."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng([seed, channel]).integers(0, 60, (size[1], size[0], 3), dtype=np.uint8)
    pixels[:, :, channel] += 150
    Image.fromarray(pixels).save(path, quality=95)


@pytest.fixture
def tiny(tmp_path):
    """TinyImageNet as its archive unpacks, with three classes; its wnids.txt is not sorted."""
    root = tmp_path / "tiny-imagenet-200"
    for wnid, (channel, _) in TINY.items():
        for number in range(12):
            colour(root / "train" / wnid / "images" / f"{wnid}_{number}.JPEG", channel, seed=number)
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text(f"{wnid}_0.JPEG\t0\t0\t62\t62\n")
    lines = []
    for number, (wnid, (channel, _)) in enumerate([*TINY.items(), *reversed(TINY.items())]):
        colour(root / "val" / "images" / f"val_{number}.JPEG", channel, seed=100 + number)
        lines.append(f"val_{number}.JPEG\t{wnid}\t0\t32\t44\t62\n")
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    (root / "wnids.txt").write_text("".join(f"{wnid}\n" for wnid in TINY))
    (root / "words.txt").write_text("n00001740\tentity\n" + "".join(f"{wnid}\t{words}\n" for wnid, (_, words) in TINY.items()))
    return root


def load(name: str, root: Path, **changes: object):
    return load_data(
        DataSection(name=name, root=root, **{"workers": 0, "validation": 0.2, "calibration": 0.2, **changes}), device=CPU
    )


def brightest(split) -> list[int]:
    return split.rows(torch.arange(len(split))).float().mean((2, 3)).argmax(1).tolist()


@pytest.mark.parametrize("inside", [True, False])
def test_tinyimagenet_as_shipped(tiny, inside):
    data = load("tinyimagenet", tiny if inside else tiny.parent)
    assert data.info.classes == ("goldfish, Carassius auratus", "black stork, Ciconia nigra", "alp")  # by sorted wnid
    assert data.info.input_shape == (3, 64, 64)
    assert (data.info.mean, data.info.std) == ((0.4802, 0.4481, 0.3975), (0.2302, 0.2265, 0.2262))
    assert {name: len(split) for name, split in data.splits.items()} == {
        "train": 22, "validation": 7, "calibration": 7, "test": 6,
    }  # fmt: skip
    for split in data.splits.values():
        assert brightest(split) == [(1, 0, 2)[label] for label in split.labels]
    assert data.splits["test"].labels.tolist() == [1, 0, 2, 2, 0, 1]  # the annotations' order, not the folders'


def test_a_grey_image_of_tinyimagenet_becomes_colour(tiny):
    path = tiny / "val" / "images" / "val_3.JPEG"
    Image.open(path).convert("L").save(path)
    grey = load("tinyimagenet", tiny).splits["test"].rows(torch.tensor([3]))[0]
    assert torch.equal(grey[0], grey[1]) and torch.equal(grey[0], grey[2])


def _unpacked_elsewhere(root: Path) -> None:
    root.rename(root.with_name("elsewhere"))


def _no_annotations(root: Path) -> None:
    (root / "val" / "val_annotations.txt").unlink()


def _reshuffled(root: Path) -> None:
    shutil.rmtree(root / "val" / "images")


def _strange_wnid(root: Path) -> None:
    path = root / "val" / "val_annotations.txt"
    path.write_text(path.read_text().replace("n09193705", "n99999999", 1))


def _lost_image(root: Path) -> None:
    (root / "val" / "images" / "val_4.JPEG").unlink()


def _lost_class(root: Path) -> None:
    shutil.rmtree(root / "train" / "n09193705")


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (_unpacked_elsewhere, r"wnids\.txt is not there; expected.*tiny-imagenet-200\.zip"),
        (_no_annotations, r"val_annotations\.txt is not there; expected"),
        (_reshuffled, r"val/images is not there; expected"),
        (_strange_wnid, r"val_annotations\.txt:3: 'n99999999' is not among the 3 of wnids\.txt; expected"),
        (_lost_image, r"val_annotations\.txt:5: .*val_4\.JPEG is not there; expected"),
        (_lost_class, r"train: class 'n09193705' of .*wnids\.txt is missing; expected"),
    ],
)
def test_another_layout_of_tinyimagenet_is_one_line_that_shows_its_own(tiny, mistake, message):
    mistake(tiny)
    with pytest.raises(EectlError, match=message) as caught:
        load("tinyimagenet", tiny.parent)
    assert "\n" not in str(caught.value) and "val/val_annotations.txt, val/images/*.JPEG" in str(caught.value)


@pytest.mark.parametrize(("name", "who"), [("tinyimagenet", "torchvision does not have it"), ("imagenet", "an account")])
def test_what_cannot_be_downloaded_says_so(tmp_path, name, who):
    with pytest.raises(EectlError, match=f"--download cannot fetch it.*{who}.*expected"):
        load_data(DataSection(name=name, root=tmp_path), device=CPU, download=True)
    assert not list(tmp_path.iterdir())


def write_imagenette(root: Path, folder: str) -> Path:
    for label, wnid in enumerate(IMAGENETTE):
        for number in range(6):
            size = (50 + number, 40) if number % 2 else (40, 60)
            colour(root / folder / "train" / wnid / f"{wnid}_{number}.JPEG", label % 3, size=size, seed=number)
        colour(root / folder / "val" / wnid / f"{wnid}_9.JPEG", label % 3, seed=9)
    return root / folder


def test_imagenette_is_torchvisions(tmp_path):
    folder = write_imagenette(tmp_path, "imagenette2-160")
    data = load("imagenette", tmp_path, image_size=32, in_memory=False)
    theirs = datasets.Imagenette(tmp_path, split="val", size="160px")
    assert data.info.classes == tuple(names[0] for names in theirs.classes)
    assert data.splits["test"].labels.tolist() == [label for _, label in theirs]
    assert brightest(data.splits["test"]) == [label % 3 for _, label in theirs]
    assert sum(len(data.splits[name]) for name in ("train", "validation", "calibration")) == 60
    assert data.info.input_shape == (3, 32, 32) == tuple(data.splits["test"].rows(torch.tensor([0]))[0].shape)
    assert load("imagenette", folder).info.input_shape == (3, 224, 224)
    assert load("imagenette", folder, variant="160px").info.classes == data.info.classes


def test_which_imagenette_is_asked_where_there_are_several(tmp_path):
    for name in ("imagenette2", "imagenette2-320"):
        write_imagenette(tmp_path, name)
    with pytest.raises(EectlError, match=r"holds imagenette2 and imagenette2-320; set data\.variant"):
        load("imagenette", tmp_path)
    shutil.rmtree(tmp_path / "imagenette2" / "val" / "n01440764")
    with pytest.raises(EectlError, match=r"class 'n01440764' .*is missing; expected: imagenette2/\{train,val\}/<wnid>"):
        load("imagenette", tmp_path, variant="full")
    with pytest.raises(EectlError, match=r"no Imagenette there; expected in it: imagenette2-160, .*--download"):
        load("imagenette", tmp_path, variant="160px")
    with pytest.raises(
        EectlError, match=r"data\.variant is '64px', which imagenette does not have; it comes as full, 320px, 160px"
    ):
        load("imagenette", tmp_path, variant="64px")
    with pytest.raises(EectlError, match=r"data\.variant is 'full', which digits does not have; it has none"):
        load_data(DataSection(variant="full"), device=CPU)


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """A thousand class folders, all of whose images are one file under many names."""
    root = tmp_path_factory.mktemp("imagenet")
    colour(root / "one.JPEG", 1, size=(8, 6))
    for number in range(1000):
        wnid = f"n{1440764 + 7 * number:08}"
        for part, count in (("train", 6), ("val", 1)):
            (root / part / wnid).mkdir(parents=True)
            for image in range(count):
                os.link(root / "one.JPEG", root / part / wnid / f"{part}_{number}_{image}.JPEG")
    (root / "meta.bin").write_bytes(b"a pickle: never read")
    return root


def test_imagenet_is_torchvisions_layout(imagenet):
    data = load("imagenet", imagenet, validation=1 / 3, calibration=1 / 3, image_size=8)
    theirs = datasets.ImageFolder(imagenet / "val")
    assert list(data.info.classes) == theirs.classes
    assert data.splits["test"].labels.tolist() == theirs.targets
    sizes = {name: len(split) for name, split in data.splits.items()}
    assert sizes == {"train": 2000, "validation": 2000, "calibration": 2000, "test": 1000}


def test_another_layout_of_imagenet_is_one_line_that_shows_its_own(imagenet, tmp_path):
    (tmp_path / "train").symlink_to(imagenet / "train")
    (tmp_path / "val").mkdir()
    colour(tmp_path / "val" / "ILSVRC2012_val_00000001.JPEG", 0)  # the archive's own, before torchvision sorts it
    with pytest.raises(EectlError, match=r"class 'n01440764' of .* is missing; expected, as torchvision's ImageNet"):
        load("imagenet", tmp_path)
    (tmp_path / "train").unlink()
    with pytest.raises(EectlError, match=r"train is not there; expected"):
        load("imagenet", tmp_path)
    colour(tmp_path / "train" / "n01440764" / "a.JPEG", 0)
    with pytest.raises(EectlError, match=r"1 class folders named by a wnid, not 1000 .*data\.name=folder.*expected"):
        load("imagenet", tmp_path)


@pytest.mark.parametrize(
    ("name", "classes", "shape"),
    [("tinyimagenet", 200, (3, 64, 64)), ("imagenette", 10, (3, 224, 224)), ("imagenet", 1000, (3, 224, 224))],
)
def test_facts_need_no_files(tmp_path, name, classes, shape):
    info = data_info(DataSection(name=name, root=tmp_path / "nowhere"))
    assert (len(info.classes), info.input_shape) == (classes, shape)


# --- files of any size -------------------------------------------------------------------------------------------------

RESIZED = {"image_size": 24, "interpolation": "bicubic", "augment": {"resized_crop": (0.08, 1.0), "flip": True}}


@pytest.fixture
def photos(tmp_path):
    """Two classes of photographs in many sizes; one is a thin strip, for which no random box fits."""
    for label in ("a", "b"):
        for number in range(9):
            colour(
                tmp_path / "train" / label / f"{number}.png", number % 3, size=(30 + 11 * number, 90 - 7 * number), seed=number
            )
        colour(tmp_path / "train" / label / "9.png", 1, size=(300, 30), seed=9)
    return tmp_path


def paths_of(split):
    return split._inputs.encoded.paths


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.process)])
def test_streamed_training_images_are_torchvisions_random_resized_crops(photos, workers):
    data = load("folder", photos, workers=workers, **RESIZED)
    split, state = data.splits["train"], torch.get_rng_state()
    batches = list(train_batches(split, batch_size=4, seed=3, epoch=2))
    assert torch.equal(torch.get_rng_state(), state)
    key = int.from_bytes(hashlib.sha256(b"3 2").digest()[:8], "little")
    theirs = transforms.RandomResizedCrop(24, interpolation=InterpolationMode.BICUBIC)
    for batch in batches:
        for image, row in zip(batch.inputs, batch.rows.tolist(), strict=True):
            torch.manual_seed(derive_seed(key, row))
            expected = np.asarray(theirs(Image.open(paths_of(split)[row]).convert("RGB")))
            assert np.array_equal(image.permute(1, 2, 0).numpy(), expected)


def test_crops_are_drawn_anew_each_epoch_and_the_same_after_a_resume(photos):
    split = load("folder", photos, **RESIZED).splits["train"]
    first, again = (list(train_batches(split, batch_size=4, seed=0, epoch=0)) for _ in range(2))
    (resumed,) = list(train_batches(split, batch_size=4, seed=0, epoch=0, start=2))
    assert len(first) == 3 and all(torch.equal(a.inputs, b.inputs) for a, b in zip(first, again, strict=True))
    assert torch.equal(resumed.inputs, first[2].inputs)
    shards = [next(train_batches(split, batch_size=4, seed=0, epoch=0, rank=rank, world=2)) for rank in (0, 1)]
    assert torch.equal(torch.stack([shard.inputs for shard in shards], 1).flatten(0, 1), first[0].inputs)

    pair, last = train_batches(split, batch_size=4, seed=0, epoch=0, window=2)
    assert torch.equal(pair.inputs, torch.cat([first[0].inputs, first[1].inputs])) and torch.equal(last.inputs, first[2].inputs)

    def seen(epoch):
        return {row: image for batch in train_batches(split, batch_size=12, seed=0, epoch=epoch)
                for row, image in zip(batch.rows.tolist(), batch.inputs, strict=True)}  # fmt: skip

    one, other = seen(0), seen(1)
    assert sum(torch.equal(one[row], other[row]) for row in one) <= 2  # the strips have no other box


def test_repeats_of_a_streamed_image_are_other_boxes_wherever_they_land(photos):
    """Cut at any step and over processes; the first visit has the box that an image has without repeats."""
    split, options = load("folder", photos, **RESIZED).splits["train"], {"batch_size": 4, "seed": 0, "epoch": 0, "repeats": 3}
    whole = list(train_batches(split, **options))
    rows, images = torch.cat([batch.rows for batch in whole]), torch.cat([batch.inputs for batch in whole])
    assert [len(set(rows[first : first + 3].tolist())) for first in range(0, 12, 3)] == [1] * 4
    alone = {row: image for batch in train_batches(split, **options | {"repeats": 1})
             for row, image in zip(batch.rows.tolist(), batch.inputs, strict=True)}  # fmt: skip
    assert all(torch.equal(images[place], alone[int(rows[place])]) for place in (0, 3, 6, 9))
    assert sum(torch.equal(images[place], images[place + 1]) for place in range(11) if place % 3 != 2) <= 4  # two strips
    (resumed,) = train_batches(split, start=2, **options)
    assert torch.equal(resumed.inputs, whole[2].inputs)
    shards = [next(train_batches(split, rank=rank, world=2, **options)) for rank in (0, 1)]
    assert torch.equal(torch.stack([shard.inputs for shard in shards], 1).flatten(0, 1), whole[0].inputs)
    pair, last = train_batches(split, window=2, **options)
    assert torch.equal(torch.cat([pair.inputs, last.inputs]), images)


@pytest.mark.parametrize(("short", "mode"), [(None, "bilinear"), (28, "bicubic"), (31, "bilinear")])
def test_images_are_measured_by_torchvisions_resize_and_centre_crop(photos, short, mode):
    data = load("folder", photos, **RESIZED | {"resize": short, "interpolation": mode})
    theirs = transforms.Compose([transforms.Resize(short or 24, InterpolationMode(mode)), transforms.CenterCrop(24)])
    for name in ("train", "validation", "calibration"):
        split = data.splits[name]
        for row, image in enumerate(split.rows(torch.arange(len(split)))):
            expected = np.asarray(theirs(Image.open(paths_of(split)[row]).convert("RGB")))
            assert np.array_equal(image.permute(1, 2, 0).numpy(), expected)


def test_a_crop_is_taken_once_by_the_reader_or_on_the_device(photos):
    streamed, held = load("folder", photos, **RESIZED), load("folder", photos, in_memory=True, **RESIZED)
    assert streamed.augment.resized_crop is None and streamed.augment.flip
    assert held.augment.resized_crop == (0.08, 1.0)
    rows = torch.arange(len(held.splits["train"]))
    whole = next(train_batches(held.splits["train"], batch_size=12, seed=0, epoch=0))
    assert torch.equal(whole.inputs, held.splits["train"].rows(rows)[whole.rows])
    plain = load("folder", photos, image_size=24)
    assert plain.augment.resized_crop is None and not hasattr(plain.splits["train"]._inputs, "paths")  # in memory


def test_resize_is_for_files_and_needs_room_for_the_square():
    with pytest.raises(EectlError, match=r"data\.resize is for image files; digits has images of one size"):
        load_data(DataSection(resize=10, image_size=8), device=CPU)
    with pytest.raises(ValueError, match=r"resize is 200; it must be image_size, 224, or more"):
        DataSection(resize=200, image_size=224)
    with pytest.raises(ValueError, match="resize is 200; it needs image_size"):
        DataSection(resize=200)


def test_images_in_memory_are_resized_as_asked():
    bilinear, bicubic = (
        load_data(DataSection(image_size=16, interpolation=mode), device=CPU).splits["test"].rows(torch.arange(20))
        for mode in ("bilinear", "bicubic")
    )
    stored = load_data(DataSection(), device=CPU).splits["test"].rows(torch.arange(20))
    theirs = transforms.Resize(16, InterpolationMode.BICUBIC, antialias=True)(stored)
    assert (bicubic.int() - theirs.int()).abs().max() <= 1 < (bicubic.int() - bilinear.int()).abs().max()
