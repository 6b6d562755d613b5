"""Images are prepared as a published network's own file says: compared with transformers' image processors."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor

from eectl.core.errors import EectlError
from eectl.data import load_data
from eectl.recipe.own_data import own_data
from eectl.recipe.preprocessing import with_preprocessing
from eectl.recipe.reading import make_recipe
from eectl.recipe.recipe import Recipe

HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
OWN = {"image_mean": [0.48, 0.45, 0.4], "image_std": [0.27, 0.26, 0.28]}
PROCESSORS: dict[str, dict[str, Any]] = {
    "vit": {"image_processor_type": "ViTImageProcessor", "size": {"height": 24, "width": 24}, "resample": 2, **HALF},
    "siglip": {"image_processor_type": "SiglipImageProcessor", "size": {"height": 24, "width": 24}, "resample": 3, **HALF},
    "dinov2": {
        **{"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 32}, "crop_size": {"height": 24, "width": 24}},
        **{"do_center_crop": True, "resample": 3, **OWN},
    },
    "convnext": {
        **{"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 28}, "crop_pct": 0.875, "resample": 3},
        **OWN,
    },
    "unscaled": {
        **{"image_processor_type": "ViTImageProcessor", "size": {"height": 24, "width": 24}, "rescale_factor": 1 / 127.5},
        **{"image_mean": [1.0, 1.0, 1.0], "image_std": [1.0, 1.0, 1.0], "resample": 2},
    },
    "raw": {
        "image_processor_type": "ViTImageProcessor",
        "size": {"height": 24, "width": 24},
        "do_normalize": False,
        "resample": 2,
    },
}


def network(folder: Path, processor: dict[str, Any] | str, file: str = "preprocessor_config.json") -> Path:
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "vit"}')
    (folder / file).write_text(processor if isinstance(processor, str) else json.dumps(processor))
    return folder


def recipe(folder: Path, **data: Any) -> Recipe:
    return make_recipe({"data": data, "backbone": {"name": f"hf/{folder}", "pretrained": True}}, where="test")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0)
    for number in range(20):
        path = tmp_path / "photos" / "train" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        smooth = Image.fromarray(pixels.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((48, 48), Image.Resampling.BICUBIC)
        smooth.save(path)
    return tmp_path / "photos"


@pytest.mark.parametrize("name", PROCESSORS)
def test_pixels_are_those_of_the_librarys_processor(name: str, tmp_path: Path, photos: Path) -> None:
    """Within the rounding to bytes in between, and what two ways to resize differ by."""
    folder = network(tmp_path / "net", PROCESSORS[name])
    made, notes = with_preprocessing(recipe(folder, name="folder", root=str(photos), validation=0.2, calibration=0.2))
    data = load_data(made.data, device=torch.device("cpu"))
    images = data.splits["train"].rows(torch.arange(len(data.splits["train"])))
    mean, std = (torch.tensor(each)[None, :, None, None] for each in (data.info.mean, data.info.std))
    found = (images / 255 - mean) / std
    processor = AutoImageProcessor.from_pretrained(folder)
    files = sorted(photos.glob("train/*/*.png"))
    expected = processor([Image.open(path) for path in files], return_tensors="pt")["pixel_values"]
    assert notes and found.shape[1:] == expected.shape[1:]
    near = torch.stack([(expected - own).abs().amax(dim=(1, 2, 3)).min() for own in found])  # rows were drawn
    assert near.max() < 2.5 / 255 / std.min()


def test_what_the_recipe_says_goes_before_the_file(tmp_path: Path) -> None:
    folder = network(tmp_path / "net", PROCESSORS["dinov2"])
    made, _ = with_preprocessing(recipe(folder, name="folder", image_size=40, normalize="imagenet"))
    assert (made.data.image_size, made.data.resize, made.data.normalize) == (40, None, "imagenet")
    assert (made.data.interpolation, made.data.channels) == ("bicubic", 3)
    assert with_preprocessing(made) == (made, ())


def test_a_data_set_of_one_size_is_not_cut(tmp_path: Path) -> None:
    made, _ = with_preprocessing(recipe(network(tmp_path / "net", PROCESSORS["dinov2"]), name="cifar10"))
    assert (made.data.image_size, made.data.resize) == (24, None)


def test_fresh_weights_and_checkpoints_take_no_file(tmp_path: Path) -> None:
    folder = network(tmp_path / "net", PROCESSORS["vit"])
    for change in ("backbone.pretrained=false", "init=model.safetensors", "backbone.name=hf/vit", "backbone.name=timm/resnet18"):
        asked = make_recipe(recipe(folder, name="digits").plain(), where="test", changes=[change])
        assert with_preprocessing(asked) == (asked, ())


def test_a_folder_of_images_gets_the_networks_size(tmp_path: Path, photos: Path) -> None:
    folder = network(tmp_path / "net", {"image_processor": PROCESSORS["vit"]}, "processor_config.json")
    (folder / "model.safetensors").touch()
    assert "data.image_size=24" in own_data(data=photos, backbone=f"hf/{folder}").changes


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        ("[1, 2]", "it holds no image processor"),
        ("{", "not JSON"),
        ('{"image_mean": [0.5], "image_std": [0.5, 0.5]}', "not numbers for each channel"),
        ('{"image_mean": ["a"], "image_std": [0.5]}', "not numbers for each channel"),
        ('{"image_mean": 0.5, "image_std": [0.5]}', "not numbers for each channel"),
        ('{"image_mean": [0.5], "image_std": [0]}', r"data\.normalize"),
        ('{"image_mean": [1e300], "image_std": [1], "rescale_factor": 1e-300}', "not numbers for each channel"),
        ('{"size": {"height": 24, "width": 32}}', "no squares"),
    ],
)
def test_a_file_that_does_not_fit_is_one_line(processor: str, message: str, tmp_path: Path) -> None:
    folder = network(tmp_path / "net", processor)
    with pytest.raises(EectlError, match=rf"^{folder}/preprocessor_config\.json.*{message}[^\n]*$"):
        with_preprocessing(recipe(folder, name="folder"))
