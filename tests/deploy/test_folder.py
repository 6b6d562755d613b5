"""A folder of pictures of odd sizes: predict reads them as training and evaluate do."""

import numpy as np
import pytest
import torch
from conftest import small_recipe
from deploy.made_models import check_same, expected, made
from PIL import Image

import eectl
from eectl.data import DATASETS, Augmenter, load_data
from eectl.data.sources import FACTS
from eectl.deploy.inputs import STORED_CHANNELS, ImageInputs

SIZES = [(24, 24), (40, 24), (25, 61), (17, 18), (64, 30)]
MODES = ["RGB", "L", "RGBA", "P", "RGB"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Two classes, dark and bright noise, in odd sizes, modes and formats."""
    root = tmp_path_factory.mktemp("photos")
    draw = np.random.default_rng(0)
    for part, count in (("train", 40), ("test", 15)):
        for name, low in (("bright", 90), ("dark", 0)):
            (root / part / name).mkdir(parents=True)
            for number in range(count):
                width, height = SIZES[number % 5]
                noise = draw.integers(low, low + 160, (height, width, 3), dtype=np.uint8)
                image = Image.fromarray(noise).convert(MODES[number % 5])
                suffix = "jpg" if image.mode in ("RGB", "L") and number % 2 else "png"
                image.save(root / part / name / f"{number:02}.{suffix}")
    return root


@pytest.fixture(scope="module", params=["squares", "cropped", "grey"])
def run(request, photos, tmp_path_factory):
    options = {"squares": {}, "cropped": {"resize": 20, "interpolation": "bicubic"}, "grey": {"channels": 1}}[request.param]
    data = {"name": "folder", "root": str(photos), "image_size": 16, "workers": 0, **options}
    recipe = small_recipe(data=data, backbone={"name": "resnet20"}, batch_size=16)
    return made(recipe, tmp_path_factory.mktemp(request.param) / "run")


def test_predict_agrees_with_evaluate_row_by_row(run, photos):
    rows = expected(run, 60.0)
    model = eectl.load(run.checkpoint, policy=run.policy, budget=60, device="cpu")
    paths = sorted((photos / "test" / "bright").iterdir()) + sorted((photos / "test" / "dark").iterdir())
    check_same(model.predict(paths, batch_size=7), rows, model.classes)
    assert model.preprocess(paths).is_contiguous(memory_format=torch.channels_last)
    for path, part in zip(paths, rows.parts, strict=True):
        assert (model.preprocess(path) == part).all()
        with Image.open(path) as image:
            assert (model.preprocess(image) == part).all()
            if image.mode in ("RGB", "L", "RGBA"):
                assert (model.preprocess(np.asarray(image)) == part).all()


def test_what_is_stored_as_pixels():
    """Data sets with facts come as pixels, but those that are read from files."""
    files = {name for name, read in DATASETS.items() if getattr(read, "__module__", "").endswith("archives")} | {"folder", "wds"}
    assert set(STORED_CHANNELS) == set(DATASETS) - files
    assert {name: FACTS[name][1][0] for name in STORED_CHANNELS} == STORED_CHANNELS


@pytest.mark.parametrize(
    "changes", [{}, {"image_size": 13}, {"image_size": 12, "channels": 3, "interpolation": "bicubic", "normalize": "imagenet"}]
)
def test_pixels_of_a_published_set_are_what_training_made_of_them(changes):
    spec = small_recipe(data={"name": "digits", **changes}).data
    data = load_data(spec, device=torch.device("cpu"))
    stored = load_data(small_recipe(data={"name": "digits"}).data, device=torch.device("cpu"))
    rows = torch.arange(0, 300, 7)
    pixels = stored.splits["test"].rows(rows)
    inputs = ImageInputs(data.info, spec, channels_last=False)
    read = [inputs.read(Image.fromarray(image[0].numpy()), where="") for image in pixels]
    assert torch.equal(torch.stack(read), data.splits["test"].rows(rows))
    ((places, batch),) = inputs.batches(read, size=99, device=torch.device("cpu"))
    expected = Augmenter(data.info, spec.augment, 10).eval(data.splits["test"].rows(rows))
    assert places == list(range(len(rows))) and torch.equal(batch, expected)
