"""Images of every odd kind through train, evaluate and predict: all three see the pixels that Pillow gives by hand."""

import json
import os

import numpy as np
import pytest
import torch
from conftest import small_recipe
from PIL import Image, ImageOps
from running import eectl as run

import eectl
from eectl.core.distributed import World
from eectl.data import load_data
from eectl.evaluation.opened import open_session
from eectl.training.train import train

SIDE = 16
CPU = torch.device("cpu")


def shape(name, draw):
    """The transparency [12, 12] of a disc, or of a ring of about its area, near the middle of a picture."""
    y, x = np.mgrid[:12, :12]
    distance = np.hypot(x - draw.uniform(5, 6), y - draw.uniform(5, 6))
    inside = distance < 3 if name == "disc" else (distance > 3) & (distance < 4.3)
    return (inside * draw.integers(180, 256, inside.shape)).astype(np.uint8)


def icon(kind, alpha):
    """A black picture whose shape lies in its transparency alone."""
    black = np.zeros_like(alpha)
    if kind == "RGBA":
        return Image.fromarray(np.dstack([black, black, black, alpha])), {}
    if kind == "LA":
        return Image.fromarray(np.dstack([black, alpha]), "LA"), {}
    image = Image.fromarray(alpha, "P")
    image.putpalette(bytes(768))
    return image, {"transparency": bytes(range(256))}


@pytest.mark.slow
def test_shapes_that_lie_in_transparency_are_learned(tmp_path):
    draw = np.random.default_rng(0)
    for part, count in (("train", 90), ("test", 60)):
        for name in ("disc", "ring"):
            (tmp_path / "icons" / part / name).mkdir(parents=True)
            for number in range(count):
                image, options = icon(("RGBA", "LA", "P")[number % 3], shape(name, draw))
                image.save(tmp_path / "icons" / part / name / f"{number:03}.png", **options)
    data = {"name": "folder", "root": str(tmp_path / "icons"), "workers": 0, "copies": "drop"}  # some are drawn twice
    recipe = small_recipe(data=data, backbone={"name": "resnet20"}, batch_size=16, epochs=3, patience=3)
    train(recipe, out=tmp_path / "run", device="cpu", quiet=True)
    paths = sorted((tmp_path / "icons" / "test").rglob("*.png"))
    found = eectl.load(tmp_path / "run" / "model.safetensors", device="cpu").predict(paths)
    right = [label == path.parent.name for label, path in zip(found.labels, paths, strict=True)]
    assert np.mean(right) > 0.95


def kinds(seed):
    """Odd images by file name, each with how it is saved and the pixels it has on blue, by hand. No two have the same pixels."""
    draw = np.random.default_rng(seed)
    blue = np.array([0, 0, 255], np.uint8)

    def noise(*channels, below=256, dtype=np.uint8):
        return draw.integers(0, below, (SIDE, SIDE, *channels), dtype=dtype)

    def clear_in_places(channels):
        colours, clear = noise(channels), noise(below=2).astype(bool)
        layered = np.dstack([colours, np.where(clear, 0, 255).astype(np.uint8)])
        return Image.fromarray(layered), np.where(clear[..., None], blue, np.broadcast_to(colours, (SIDE, SIDE, 3)))

    found = {}
    for name, channels, options in (
        ("alpha.png", 3, {}),
        ("alpha.tif", 3, {}),
        ("alpha.webp", 3, {"lossless": True, "exact": True}),
        ("grey-alpha.png", 1, {}),
    ):
        image, pixels = clear_in_places(channels)
        found[name] = image, options, pixels
    for name in ("deep.png", "deep.tif"):
        deep = noise(below=65536, dtype=np.uint16)
        found[name] = Image.fromarray(deep), {}, np.repeat((deep >> 8).astype(np.uint8)[..., None], 3, axis=2)
    held, exif = noise(3), Image.Exif()
    exif[0x0112] = 6
    found["held.png"] = Image.fromarray(held), {"exif": exif}, np.rot90(held, -1)
    palette, bits = Image.fromarray(noise(3)).quantize(30), Image.fromarray(noise(3)).convert("1")
    cmyk, grey = Image.fromarray(noise(4), "CMYK"), Image.fromarray(noise())
    frames = [Image.fromarray(noise(3)).quantize(40) for _ in range(2)]
    for name, image, options in (
        ("palette.png", palette, {}),
        ("cmyk.tif", cmyk, {}),
        ("bits.bmp", bits, {}),
        ("grey.tga", grey, {}),
        ("moving.gif", frames[0], {"save_all": True, "append_images": frames[1:]}),
    ):
        found[name] = image, options, np.asarray(image.convert("RGB"))
    return found


SEEDS = {0: ("train", "one"), 10: ("train", "two"), 20: ("test", "one"), 30: ("test", "two")}  # of the first image of each folder


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """A folder of two classes with five of each odd image in each, and a file beside them that is none."""
    root = tmp_path_factory.mktemp("odd")
    for first, (part, name) in SEEDS.items():
        folder = root / "images" / part / name
        folder.mkdir(parents=True)
        for number in range(4 if part == "train" else 1):
            for file, (image, options, _) in kinds(first + number).items():
                image.save(folder / f"{number}-{file}", **options)
    (root / "images" / "train" / "one" / "notes.pdf").write_bytes(b"%PDF-1.4")
    return root


CHANGES = "--set", "data.background=blue", "--set", "data.workers=0", "--set", "exits.after=[1,4]", "--set", "regime=joint"


@pytest.fixture(scope="module")
def trained(odd):
    asked = (
        "--data-root",
        odd / "images",
        "--backbone",
        "resnet20",
        *CHANGES,
        "--epochs",
        "1",
        "-o",
        odd / "run",
        "--device",
        "cpu",
    )
    _, err = run("train", "folder", *asked)
    return odd / "run" / "model.safetensors", err


def test_train_says_what_it_made_of_odd_files_in_one_line_each(odd, trained):
    _, err = trained
    lines = [line for line in err.splitlines() if "frames" in line or "left out" in line]
    assert len(lines) == 2 and "Warning" not in err
    assert any("(10)" in line and "0-moving.gif" in line for line in lines)
    assert any("1 file of types" in line and "notes.pdf" in line for line in lines)


@pytest.mark.parametrize("in_memory", [True, False])
def test_training_evaluation_and_predict_see_the_pixels_that_are_there(odd, trained, in_memory):
    checkpoint, _ = trained
    inputs = eectl.load(checkpoint, device="cpu").inputs
    assert inputs.spec.background == "blue"
    data = load_data(inputs.spec.model_copy(update={"in_memory": in_memory}), device=CPU)
    session = open_session(checkpoint, world=World(0, 1, CPU), needs=("test",))
    expected = {
        (label, name): torch.from_numpy(np.array(pixels)).permute(2, 0, 1)
        for label, seed in ((0, 20), (1, 30))
        for name, (*_, pixels) in kinds(seed).items()
    }
    rows = torch.arange(len(expected))
    seen, evaluated = data.splits["test"].rows(rows), session.data.splits["test"].rows(rows)
    for row, (label, name) in enumerate(sorted(expected)):
        pixels = expected[label, name]
        path = odd / "images" / "test" / ("one", "two")[label] / f"0-{name}"
        assert torch.equal(seen[row], pixels) and torch.equal(evaluated[row], pixels), name
        assert torch.equal(inputs.read(path, where=""), pixels), name
        with Image.open(path) as opened:
            assert torch.equal(inputs.read(opened, where=""), pixels), name


def test_dry_run_evaluate_and_predict_of_odd_files(odd, trained):
    checkpoint, _ = trained
    asked = "--data-root", odd / "images", "--backbone", "resnet20", *CHANGES, "--dry-run"
    _, err = run("train", "folder", *asked)
    assert "Warning" not in err
    _, err = run("evaluate", checkpoint, "--device", "cpu", "--budgets", "100")
    assert "Warning" not in err
    out, err = run("predict", checkpoint, odd / "images" / "test", "--device", "cpu")
    assert len(out.splitlines()) == 2 * len(kinds(0)) and "Warning" not in err
    notes = [line for line in err.splitlines() if "frames" in line]
    assert len(notes) == 1 and "(2)" in notes[0]


def test_predict_answers_files_with_names_of_any_bytes(odd, trained, tmp_path):
    checkpoint, _ = trained
    image = Image.open(odd / "images" / "test" / "one" / "0-palette.png")
    for name in (b"a\xff.png", b"b\n\x1b[31m.png"):
        image.save(tmp_path / os.fsdecode(name))
    _, err = run("predict", checkpoint, tmp_path, "--device", "cpu", "-o", tmp_path / "rows.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 2 and rows[0]["label"] == rows[1]["label"] and "\x1b" not in err


def test_by_hand_is_what_pillow_does_with_the_file(odd):
    """The table above, against Pillow's own compositing and turning."""
    for name, (*_, expected) in kinds(20).items():
        with Image.open(odd / "images" / "test" / "one" / f"0-{name}") as opened:
            if opened.mode.startswith("I"):
                continue
            upright = ImageOps.exif_transpose(opened)
            sheet = Image.new("RGB", upright.size, "blue")
            if upright.mode in ("RGBA", "LA"):
                sheet.paste(upright.convert("RGB"), mask=upright.getchannel("A"))
            else:
                sheet.paste(upright.convert("RGB"))
            assert (np.asarray(sheet) == expected).all(), name
