"""Image folders: what is read, streamed and held alike, and every mistake in a folder as one line that names it."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from eectl.core.errors import EectlError
from eectl.data import Augmenter, load_data, train_batches
from eectl.recipe.augment_section import AugmentSection
from eectl.recipe.data_section import DataSection

CPU = torch.device("cpu")
COLOURS = {"blue": 2, "green": 1, "red": 0}  # class → its bright channel


def write_images(folder: Path, count: int, channel: int, *, size: tuple[int, int] = (20, 16), first: int = 0) -> None:
    folder.mkdir(parents=True)
    for number in range(first, first + count):
        pixels = np.random.default_rng(number * 3 + channel).integers(0, 60, (size[1], size[0], 3), dtype=np.uint8)
        pixels[:, :, channel] += 150
        Image.fromarray(pixels).save(folder / f"{number:03}.{'png' if number % 2 else 'bmp'}")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name, channel in COLOURS.items():
        write_images(tmp_path / "train" / name, 20, channel)
        write_images(tmp_path / "test" / name, 5, channel, first=100)
    return tmp_path


def load(root: Path, **changes: object):
    return load_data(DataSection(name="folder", root=root, **{"workers": 0, **changes}), device=CPU)


def test_a_folder_is_split_and_its_images_are_where_their_labels_say(root):
    data = load(root)
    assert data.info.classes == ("blue", "green", "red") and data.info.input_shape == (3, 16, 20)
    assert {name: len(split) for name, split in data.splits.items()} == {
        "train": 48,
        "validation": 6,
        "calibration": 6,
        "test": 15,
    }
    for split in data.splits.values():
        brightest = split.rows(torch.arange(len(split))).float().mean((2, 3)).argmax(1)
        assert brightest.tolist() == [list(COLOURS.values())[label] for label in split.labels]
    assert data.info.mean == (0.485, 0.456, 0.406)


def test_a_validation_folder_is_used_and_test_may_be_absent(root):
    for name, channel in COLOURS.items():
        write_images(root / "val" / name, 4, channel, first=50)
    shutil.rmtree(root / "test")
    data = load(root)
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 54, "validation": 12, "calibration": 6}
    shutil.copytree(root / "val", root / "validation")
    with pytest.raises(EectlError, match="both val and validation are there"):
        load(root)


def test_images_below_the_class_folder_are_found_and_other_files_are_not(root):
    (root / "train" / "red" / "images").mkdir()
    for path in (root / "train" / "red").glob("*.png"):
        path.rename(path.parent / "images" / path.name)
    (root / "train" / "red" / "boxes.txt").write_text("x")
    (root / "train" / ".cache").mkdir()
    (root / "train" / "red" / "._001.png").write_bytes(b"\x00")
    assert len(load(root).splits["train"]) == 48


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.process)])
def test_streamed_batches_are_the_batches_in_memory(root, workers):
    held, streamed = (load(root, image_size=10, in_memory=choice, workers=workers) for choice in (True, False))
    assert held.info == streamed.info
    options = {"batch_size": 7, "seed": 0, "epoch": 3, "start": 1}
    state = torch.get_rng_state()
    pairs = list(
        zip(train_batches(held.splits["train"], **options), train_batches(streamed.splits["train"], **options), strict=True)
    )
    assert len(pairs) == 5
    for a, b in pairs:
        assert torch.equal(a.inputs, b.inputs) and torch.equal(a.targets, b.targets) and torch.equal(a.rows, b.rows)
    assert torch.equal(torch.get_rng_state(), state)
    rows = torch.tensor([3, 47, 0])
    assert torch.equal(held.splits["train"].rows(rows), streamed.splits["train"].rows(rows))
    assert streamed.splits["train"].fingerprint == load(root, in_memory=False).splits["train"].fingerprint


def test_resizing_keeps_the_centre_square(tmp_path):
    for label in ("a", "b"):
        (tmp_path / "train" / label).mkdir(parents=True)
        for number in range(10):
            pixels = np.zeros((40, 80, 3), np.uint8)
            pixels[:, 20:60] = 200  # the centre square
            Image.fromarray(pixels).save(tmp_path / "train" / label / f"{number}.png")
    images = load(tmp_path, image_size=20, validation=0.2, calibration=0.2).splits["train"].rows(torch.arange(12))
    assert images.shape == (12, 3, 20, 20) and (images[..., 1:-1] == 200).all()
    assert load(tmp_path, image_size=20, channels=1, validation=0.2, calibration=0.2).info.input_shape == (1, 20, 20)


def test_other_pixel_formats_become_colour(root):
    palette = Image.open(root / "train" / "red" / "001.png")
    palette.convert("P").save(root / "train" / "red" / "001.png")
    palette.convert("RGBA").save(root / "train" / "red" / "003.png")
    palette.convert("L").save(root / "train" / "red" / "005.png")
    assert len(load(root).splits["train"]) == 48
    Image.fromarray(np.zeros((16, 20), np.float32)).save(root / "train" / "red" / "008.tif")
    with pytest.raises(EectlError, match=r"008\.tif: its pixels are fractions"):
        load(root)


def _break(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:200])


def _text(path: Path) -> None:
    path.write_text("no image")


def _dangling(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.with_name("nowhere.png"))


@pytest.mark.parametrize(("in_memory", "workers"), [(True, 0), (False, 0), pytest.param(False, 2, marks=pytest.mark.process)])
@pytest.mark.parametrize(("file", "breakage"), [("005.png", _break), ("006.bmp", _text), ("007.png", _dangling)])
def test_a_broken_image_is_named_in_one_line(root, file, breakage, in_memory, workers):
    breakage(root / "train" / "green" / file)
    with pytest.raises(EectlError) as caught:
        data = load(root, in_memory=in_memory, workers=workers)
        for split in data.splits.values():
            split.rows(torch.arange(len(split)))
    assert str(root / "train" / "green" / file) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("in_memory", [True, False])
def test_images_of_two_sizes_need_image_size(root, in_memory):
    Image.new("RGB", (9, 9)).save(root / "train" / "red" / "004.bmp")
    with pytest.raises(EectlError, match=r"004\.bmp: 9×9, others are 20×16; set data\.image_size"):
        split = load(root, in_memory=in_memory, calibration=0.05, validation=0.05).splits["train"]
        split.rows(torch.arange(len(split)))
    assert load(root, in_memory=in_memory, image_size=12).info.input_shape == (3, 12, 12)


def _empty(root: Path) -> None:
    (root / "train" / "yellow").mkdir()


def _one_class(root: Path) -> None:
    for name in ("red", "green"):
        shutil.rmtree(root / "train" / name)


def _no_class(root: Path) -> None:
    shutil.rmtree(root / "train")
    (root / "train").mkdir()


def _extra_class(root: Path) -> None:
    write_images(root / "test" / "yellow", 2, 0)


def _class_gone(root: Path) -> None:
    shutil.rmtree(root / "test" / "green")


def _no_train(root: Path) -> None:
    (root / "train").rename(root / "training")


def _no_root(root: Path) -> None:
    shutil.rmtree(root)


def _scarce(root: Path) -> None:
    for path in sorted((root / "train" / "green").iterdir())[1:]:
        path.unlink()


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (_empty, "yellow: no images in this class folder"),
        (_one_class, "the one class 'blue'; two or more are needed"),
        (_no_class, "no class folders; .*expected: train/<class>"),
        (_extra_class, "class 'yellow' is not among the 3 in .*train"),
        (_class_gone, "class 'green' of .*train is missing"),
        (_no_train, "no train/ in it; expected: train/<class>"),
        (_no_root, "no such folder; expected: train/<class>"),
        (_scarce, r"^data\.validation: .*the smallest class has 1\)"),
    ],
)
def test_a_mistaken_folder_is_one_line(root, mistake, message):
    mistake(root)
    with pytest.raises(EectlError, match=message) as caught:
        load(root)
    assert "\n" not in str(caught.value)


def test_a_rare_class_that_a_split_would_miss_is_named(root):
    for path in sorted((root / "train" / "green").iterdir())[2:]:
        path.unlink()
    with pytest.raises(EectlError, match="no image of class 'green'"):
        load(root)


def test_validation_images_are_never_augmented(root):
    data = load(root, image_size=16)
    augmenter = Augmenter(data.info, AugmentSection(trivial=True, flip=True, erasing=0.9, mixup=1.0), 3)
    images = data.splits["validation"].rows(torch.arange(6))
    assert torch.equal(augmenter.eval(images), Augmenter(data.info, AugmentSection(), 3).eval(images))
