"""Augmentation against torchvision's per-image functions, and its promises on shapes, seeds and order."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, TrivialAugmentWide, v2
from torchvision.transforms import functional as tv
from torchvision.transforms.autoaugment import _apply_op

from eectl.data import Augmenter, DataInfo, join_draws
from eectl.data.operations import OPERATIONS, plan_operations
from eectl.data.policies import AutoAugment, ColorJitter, RandAugment, ThreeAugment
from eectl.data.trivial import TRIVIAL, TrivialAugment
from eectl.data.variations import Erasing, PaddedCrop, ResizedCrop
from eectl.recipe.augment_section import AugmentSection

CLASSES = tuple("abcde")
EVERYTHING = AugmentSection(
    resized_crop=(0.5, 1), trivial=True, crop=2, flip=True, rotation=20, contrast=0.3, erasing=0.5, mixup=0.8, cutmix=1.0
)


def info(channels: int = 3, size: int = 32) -> DataInfo:
    return DataInfo("toy", CLASSES, (channels, size, size), (0.25, 0.5, 0.75)[:channels], (0.5, 0.25, 0.2)[:channels])


def pictures(count: int, channels: int = 3, height: int = 32, width: int = 32) -> Tensor:
    """Smooth coloured pictures with a little noise: what pixels next to each other look like."""
    generator = torch.Generator().manual_seed(count + channels)
    coarse = torch.rand(count, channels, 5, 5, generator=generator) * 200 + 20
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")
    return (smooth + 10 * torch.rand(smooth.shape, generator=generator)).clamp(0, 255).to(torch.uint8)


def targets(count: int) -> Tensor:
    return torch.arange(count) % len(CLASSES)


def varied(images: Tensor, variation, drawn: tuple[Tensor, ...] | None = None) -> Tensor:
    """One variation alone, as drawn now or before."""
    work = variation.plan(variation.draw(len(images)) if drawn is None else drawn, images.shape[1:])
    return work.act(images, *work.parameters)


def trivial(images: Tensor, operations: Tensor, magnitudes: Tensor, mode: str = "nearest") -> Tensor:
    return varied(images, TrivialAugment(mode), (operations, magnitudes))


def reference(image: Tensor, name: str, magnitude: float) -> Tensor:
    """One operation by torchvision's public functions, as its TrivialAugmentWide applies it; v2's where they differ."""
    still = {"angle": 0.0, "translate": [0, 0], "scale": 1.0, "shear": [0.0, 0.0]}
    slope, shift = math.degrees(math.atan(magnitude)), int(magnitude)
    calls = {
        "Identity": lambda: image,
        "ShearX": lambda: tv.affine(image, **{**still, "shear": [slope, 0.0]}, center=[0, 0]),
        "ShearY": lambda: tv.affine(image, **{**still, "shear": [0.0, slope]}, center=[0, 0]),
        "TranslateX": lambda: tv.affine(image, **{**still, "translate": [shift, 0]}),
        "TranslateY": lambda: tv.affine(image, **{**still, "translate": [0, shift]}),
        "Rotate": lambda: tv.rotate(image, magnitude),
        "Brightness": lambda: tv.adjust_brightness(image, 1 + magnitude),
        "Color": lambda: tv.adjust_saturation(image, 1 + magnitude),
        "Contrast": lambda: tv.adjust_contrast(image, 1 + magnitude),
        "Sharpness": lambda: tv.adjust_sharpness(image, 1 + magnitude),
        "Posterize": lambda: tv.posterize(image, shift),
        "Solarize": lambda: tv.solarize(image, magnitude),
        "AutoContrast": lambda: v2.functional.autocontrast(image),
        "Equalize": lambda: tv.equalize(image),
        "Invert": lambda: tv.invert(image),
    }
    return calls[name]()


def test_the_operations_and_magnitudes_are_torchvisions():
    space = TrivialAugmentWide(interpolation=InterpolationMode.NEAREST)._augmentation_space(31)
    assert list(TRIVIAL) == list(space) == list(OPERATIONS[: len(space)])
    for name, (magnitudes, signed) in space.items():
        assert TRIVIAL[name][1] == signed
        assert torch.equal(TRIVIAL[name][0], magnitudes.float().expand(31)), name


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", list(TRIVIAL))
def test_each_operation_equals_torchvisions_image_by_image(name, channels):
    magnitudes, signed = TRIVIAL[name]
    magnitudes = torch.cat([magnitudes, -magnitudes]) if signed else magnitudes
    images = pictures(len(magnitudes), channels, height=34, width=32)  # with one side odd, every pixel of a 90° turn is a tie
    ours = trivial(images, torch.full((len(images),), OPERATIONS.index(name)), magnitudes)
    theirs = torch.stack([reference(image, name, value) for image, value in zip(images, magnitudes.tolist(), strict=True)])
    assert ours.dtype == torch.uint8
    close = ((ours.int() - theirs.int()).abs() <= 1).float().mean(dim=(1, 2, 3))
    assert close.min() >= 0.99
    assert torch.equal(ours, theirs) or name not in ("Posterize", "Solarize", "AutoContrast", "Equalize")


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize("name", list(TRIVIAL)[1:6])
def test_geometry_interpolates_as_pil_does(name, mode):
    """Inside the frame and away from the border, on a smooth picture; the nearest pixel is further off."""
    height = width = 48
    y, x = torch.meshgrid(torch.arange(float(height)), torch.arange(float(width)), indexing="ij")
    waves = [128 + 100 * torch.sin(x / 4 + channel) * torch.cos(y / 5) for channel in range(3)]
    image = torch.stack(waves).round().to(torch.uint8)
    value = float(TRIVIAL[name][0][7]) * 1.03
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    theirs = _apply_op(picture, name, value, InterpolationMode(mode), fill=None)
    expected = torch.from_numpy(np.array(theirs)).permute(2, 0, 1)[:, 10:26, 10:26].float()
    operation, magnitude = torch.tensor([OPERATIONS.index(name)]), torch.tensor([value])
    ours, nearest = (
        trivial(image[None], operation, magnitude, mode=kind)[0][:, 10:26, 10:26].float() for kind in (mode, "nearest")
    )
    assert (ours - expected).abs().max() <= 4
    if name == "Rotate":
        edges = torch.where((x + y) % 16 < 8, 255.0, 0.0).to(torch.uint8).expand(3, -1, -1)
        theirs = np.array(_apply_op(Image.fromarray(edges.permute(1, 2, 0).numpy()), name, value, InterpolationMode(mode), None))
        ours_edges = trivial(edges[None], operation, magnitude, mode=mode)[0]
        further = (ours_edges.int() - torch.from_numpy(theirs).permute(2, 0, 1).int())[:, 10:26, 10:26].abs()
        assert further.max() < 60  # an overshoot that wraps is 255 off
    assert name.startswith("Translate") or (nearest - expected).abs().max() > 8


def test_operations_in_one_batch_touch_only_their_rows():
    images = pictures(28)
    operations, magnitudes = torch.arange(28) % 14, torch.stack([values[20] for values, _ in TRIVIAL.values()]).repeat(2)
    together = trivial(images, operations, magnitudes)
    for row in range(28):
        alone = trivial(images[row : row + 1], operations[row : row + 1], magnitudes[row : row + 1])
        assert torch.equal(together[row], alone[0]), OPERATIONS[operations[row]]


def test_trivial_draws_every_operation_bin_and_sign_equally_often():
    torch.manual_seed(0)
    operations, magnitudes = TrivialAugment().draw(62_000)
    counts = torch.bincount(operations, minlength=14)
    expected = len(operations) / 14
    assert ((counts - expected) ** 2 / expected).sum() < 34.5  # chi-square, 13 degrees, p = 0.001
    turned = magnitudes[operations == OPERATIONS.index("Rotate")]
    bins = torch.bincount((turned.abs() / 4.5).round().long(), minlength=31)
    assert ((bins - len(turned) / 31) ** 2 / (len(turned) / 31)).sum() < 59.7  # 30 degrees, p = 0.001
    assert (turned[turned != 0] > 0).float().mean() == pytest.approx(0.5, abs=0.04)
    assert turned.abs().max() == 135
    assert magnitudes[operations == OPERATIONS.index("Posterize")].unique().tolist() == [2, 3, 4, 5, 6, 7, 8]


def recorded(published, count: int, *, size: tuple[int, int] = (32, 32)) -> Counter:
    """How often torchvision's transform applied which operation at which magnitude; solarizing is told in 0..255."""
    seen: Counter = Counter()

    def note(image, name, magnitude, **_):
        seen[name, round(magnitude * 255 if name == "Solarize" else magnitude, 3)] += 1
        return image

    published._apply_image_or_video_transform = note
    torch.manual_seed(0)
    image = torch.zeros(3, *size, dtype=torch.uint8)
    for _ in range(count):
        published(image)
    return seen


def drawn(variation, count: int, *, size: tuple[int, int] = (32, 32)) -> Counter:
    """How often ours draws which operation at which magnitude, by torchvision's names."""
    torch.manual_seed(1)
    operations, magnitudes = (each.flatten().tolist() for each in variation.draw(count))
    seen: Counter = Counter()
    for number, magnitude in zip(operations, magnitudes, strict=True):
        name = OPERATIONS[number]
        magnitude *= {"TranslateX": size[1], "TranslateY": size[0]}.get(name, 1)
        seen[name, 0.0 if name == "Identity" else round(magnitude, 3)] += 1
    return seen


@pytest.mark.parametrize("size", [(32, 32), (28, 33)])
@pytest.mark.parametrize("magnitude", [9, 30])
def test_rand_augment_draws_as_torchvision_does(magnitude, size):
    theirs = recorded(v2.RandAugment(num_ops=3, magnitude=magnitude), 1000, size=size)
    ours = drawn(RandAugment(3, magnitude), 20_000, size=size)
    assert ours.keys() == theirs.keys()
    for (name, strength), count in ours.items():
        expected = 60_000 / 14 / (1 if not strength or name in ("Posterize", "Solarize") else 2)
        assert abs(count - expected) < 5 * math.sqrt(expected), (name, strength)
        assert abs(theirs[name, strength] - expected / 20) < 5 * math.sqrt(expected / 20)


@pytest.mark.parametrize("policy", ["imagenet", "cifar10", "svhn"])
def test_auto_augment_draws_as_torchvision_does(policy):
    """Solarizing from 0 on is inverting; what torchvision leaves out is our identity."""
    theirs = recorded(v2.AutoAugment(v2.AutoAugmentPolicy(policy)), 4000)
    theirs["Identity", 0.0] = 8000 - theirs.total()
    inverted = theirs.pop(("Invert", 0.0), 0)
    theirs += Counter({("Solarize", 0.0): inverted})
    ours = drawn(AutoAugment(policy), 40_000)
    assert {key for key, count in ours.items() if count > 100} <= theirs.keys() <= ours.keys()
    for key, count in ours.items():
        spread = math.sqrt(count / 100 + count / 10) + 1
        assert abs(theirs[key] - count / 10) < 4.5 * spread, (key, theirs[key], count / 10)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("variation", [RandAugment(2, 9), AutoAugment("imagenet"), AutoAugment("svhn"), ColorJitter(0.3)])
def test_operations_in_turn_are_torchvisions_one_after_the_other(variation, channels):
    """But where rounding differs by a level and the next operation, such as equalizing, makes more of it."""
    images = pictures(60, channels, height=34, width=48)
    torch.manual_seed(3)
    operations, magnitudes = variation.draw(60)
    ours, expected = varied(images, variation, (operations, magnitudes)), []
    for image, names, strengths_ in zip(images, operations.tolist(), magnitudes.tolist(), strict=True):
        for number, strength in zip(names, strengths_, strict=True):
            name = OPERATIONS[number]
            image = reference(image, name, strength * {"TranslateX": 48, "TranslateY": 34}.get(name, 1))
        expected.append(image)
    close = ((ours.int() - torch.stack(expected).int()).abs() <= 1).float().mean(dim=(1, 2, 3))
    assert close.median() == 1 and close.mean() >= 0.98
    assert len(set(map(tuple, operations.tolist()))) > 4


@pytest.mark.parametrize("sigma", [0.1, 0.7, 2.0])
@pytest.mark.parametrize(("height", "width"), [(32, 28), (8, 8), (7, 12)])
def test_blurring_is_torchvisions(sigma, height, width):
    images = pictures(4, 3, height, width)
    blur = torch.full((4,), OPERATIONS.index("GaussianBlur")), torch.full((4,), sigma)
    work = plan_operations(*blur, images.shape[1:])
    ours, theirs = work.act(images, *work.parameters), v2.functional.gaussian_blur(images, [13, 13], [sigma, sigma])
    assert (ours.int() - theirs.int()).abs().max() <= 1
    assert (ours == theirs).float().mean() > 0.99
    assert sigma < 0.2 or not torch.equal(ours, images)


def test_three_augment_is_one_of_three_for_each_image():
    """Grey, solarized from 128 on, or blurred; a third each, and blurred by 0.1 to 2 pixels."""
    images = pictures(300)
    torch.manual_seed(0)
    operations, magnitudes = ThreeAugment().draw(300)
    ours = varied(images, ThreeAugment(), (operations, magnitudes))
    kinds = Counter()
    for image, result, strength in zip(images, ours, magnitudes.tolist(), strict=True):
        blurred = v2.functional.gaussian_blur(image, [13, 13], [max(strength, 0.1)] * 2)
        candidates = {"grey": v2.functional.rgb_to_grayscale(image, 3), "solarized": v2.functional.solarize(image, 128)}
        near = [name for name, each in {**candidates, "blurred": blurred}.items() if (each.int() - result.int()).abs().max() <= 1]
        assert len(near) == 1
        kinds.update(near)
    assert min(kinds.values()) > 70 and kinds.total() == 300
    assert all(0.1 <= value <= 2 for value in magnitudes[operations == OPERATIONS.index("GaussianBlur")].tolist())


def test_colour_jitter_draws_factors_and_orders_as_torchvision_does():
    torch.manual_seed(0)
    operations, amounts = ColorJitter(0.3).draw(6000)
    orders = Counter(map(tuple, operations.tolist()))
    assert len(orders) == 6 and all(abs(count - 1000) < 150 for count in orders.values())
    assert -0.3 <= amounts.min() < -0.29 and 0.29 < amounts.max() <= 0.3 and abs(amounts.mean()) < 0.01


def test_three_augment_brings_its_jitter_unless_told_otherwise():
    assert AugmentSection(three_augment=True).jitter == 0.3 and AugmentSection().jitter == 0
    assert AugmentSection(three_augment=True, color_jitter=0.0).jitter == 0 and not AugmentSection(color_jitter=0.0).is_random
    with pytest.raises(ValueError, match="trivial and rand_augment exclude each other"):
        AugmentSection(trivial=True, rand_augment={})
    with pytest.raises(ValueError, match="repeats is 3, and nothing varies"):
        AugmentSection(repeats=3, color_jitter=0.0)


def test_nothing_configured_is_the_eval_path_exactly():
    augmenter, images = Augmenter(info(), AugmentSection(), len(CLASSES)), pictures(7)
    state = torch.get_rng_state()
    inputs, labels = augmenter.train(images, targets(7))
    assert torch.equal(inputs, augmenter.eval(images)) and torch.equal(labels, targets(7))
    assert torch.equal(torch.get_rng_state(), state)
    mean, std = torch.tensor(info().mean)[:, None, None], torch.tensor(info().std)[:, None, None]
    torch.testing.assert_close(inputs[3], (images[3] / 255 - mean) / std)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("count", [1, 2, 7])
def test_everything_at_once_keeps_shapes_and_follows_the_seed(channels, count):
    augmenter, images = Augmenter(info(channels), EVERYTHING, len(CLASSES)), pictures(count, channels)
    before = images.clone()

    def run(seed: int) -> tuple[Tensor, Tensor]:
        torch.manual_seed(seed)
        return augmenter.train(images, targets(count))

    inputs, soft = run(5)
    assert inputs.shape == images.shape and inputs.dtype == torch.float32 and inputs.isfinite().all()
    assert soft.shape == (count, len(CLASSES)) and soft.dtype == torch.float32
    torch.testing.assert_close(soft.sum(1), torch.ones(count))
    again = run(5)
    assert torch.equal(inputs, again[0]) and torch.equal(soft, again[1])
    assert not torch.equal(inputs, run(6)[0])
    assert torch.equal(images, before)


@pytest.mark.parametrize("option", ["resized_crop", "trivial", "crop", "flip", "rotation", "contrast", "erasing"])
def test_each_option_draws_per_image(option):
    """The same picture eight times comes out in at least three ways: a draw per batch would give one."""
    value = {"resized_crop": (0.3, 0.9), "crop": 4, "rotation": 30.0, "contrast": 0.5, "erasing": 0.9}.get(option, True)
    augmenter, images = Augmenter(info(), AugmentSection(**{option: value}), len(CLASSES)), pictures(1).expand(8, -1, -1, -1)
    torch.manual_seed(1)
    results = {inputs.numpy().tobytes() for inputs in augmenter.train(images, targets(8))[0]}
    assert len(results) == 2 if option == "flip" else len(results) >= 3


def test_flip_mirrors_half_of_the_images():
    images, augmenter = pictures(400, 1, 6, 6), Augmenter(info(1, 6), AugmentSection(flip=True), len(CLASSES))
    torch.manual_seed(0)
    inputs, _ = augmenter.train(images, targets(400))
    mirrored = (inputs == augmenter.eval(images.flip(-1))).flatten(1).all(1)
    same = (inputs == augmenter.eval(images)).flatten(1).all(1)
    assert (mirrored ^ same).all() and 160 < mirrored.sum() < 240


def test_padded_crop_is_an_exact_shift_with_zeros():
    images, padding = pictures(200, 3, 9, 12), 2
    torch.manual_seed(0)
    cropped = varied(images, PaddedCrop(padding))
    padded = torch.nn.functional.pad(images, [padding] * 4)
    offsets = [(y, x) for y in range(5) for x in range(5)]
    windows = torch.stack([padded[:, :, y : y + 9, x : x + 12] for y, x in offsets])
    matches = (windows == cropped).flatten(2).all(2)
    assert (matches.sum(0) == 1).all()
    assert matches.any(1).all()  # all 25 offsets turn up


def test_resized_crop_of_the_whole_area_is_the_image_and_smaller_ones_keep_the_range():
    images = pictures(50, 3, 20, 20)
    torch.manual_seed(0)
    whole = varied(images, ResizedCrop((1.0, 1.0)))  # only the square box fits, or none of ten tries: both are the whole image
    assert (whole == images).flatten(1).all(1).float().mean() > 0.9
    ramp = torch.arange(40, dtype=torch.uint8).view(1, 1, 1, 40).expand(300, 1, 40, 40)
    across = varied(ramp, ResizedCrop((0.25, 0.25))).float()
    span = across[:, 0, 0, -1] - across[:, 0, 0, 0]
    assert span.min() > 17 * 0.9 and span.max() < 24  # a quarter of the area at ratios 3/4..4/3: 17.3 to 23.1 pixels wide
    assert across[:, 0, 0, 0].min() <= 1 and across[:, 0, 0, -1].max() >= 38


def test_erasing_comes_after_normalisation_and_clears_one_box_per_chosen_image():
    images = pictures(500, 3, 16, 16)
    augmenter = Augmenter(info(size=16), AugmentSection(erasing=0.4), len(CLASSES))
    torch.manual_seed(0)
    inputs, _ = augmenter.train(images, targets(500))
    changed = (inputs != augmenter.eval(images)).any(1)
    assert (inputs.movedim(1, -1)[changed] == 0).all()
    share = changed.float().mean((1, 2))
    erased = share > 0
    assert 0.32 < erased.float().mean() < 0.48
    assert share[erased].max() <= 0.36 and share[erased].min() >= 0.01
    rows, columns = changed.any(2), changed.any(1)
    assert rows.sum(1).max() < 16 and columns.sum(1).max() < 16
    assert torch.equal(changed, rows[:, :, None] & columns[:, None, :])  # a full rectangle
    assert torch.equal(varied(inputs, Erasing(0.0)), inputs)


def test_mixup_and_cutmix_targets_say_how_much_of_each_image_is_there():
    images = torch.stack([torch.full((1, 16, 16), 51 * label, dtype=torch.uint8) for label in range(5)])
    plain = DataInfo("toy", CLASSES, (1, 16, 16), (0.0,), (1.0,))
    torch.manual_seed(0)
    for options in (AugmentSection(mixup=0.8), AugmentSection(cutmix=1.0), AugmentSection(mixup=0.8, cutmix=1.0)):
        kinds = set()
        for _ in range(30):
            inputs, soft = Augmenter(plain, options, 5).train(images, torch.arange(5))
            torch.testing.assert_close(inputs.mean((1, 2, 3)), soft @ (torch.arange(5) / 5))
            kinds.add("mixup" if (inputs.amax((2, 3)) == inputs.amin((2, 3))).all() else "cutmix")
        assert "mixup" in kinds if options.mixup else True
        assert "cutmix" in kinds if options.cutmix else True
        assert len(kinds) == 2 or not (options.mixup and options.cutmix)


@pytest.mark.parametrize("options", [AugmentSection(mixup=0.8), AugmentSection(cutmix=1.0)], ids=["mixup", "cutmix"])
@pytest.mark.parametrize("count", [1, 6])
def test_mixing_is_torchvisions(options, count):
    augmenter, images = Augmenter(info(), options, len(CLASSES)), pictures(count, height=20, width=32)
    theirs = v2.MixUp(alpha=0.8, num_classes=5) if options.mixup else v2.CutMix(alpha=1.0, num_classes=5)
    for seed in range(20):
        torch.manual_seed(seed)
        expected = theirs(augmenter.eval(images), targets(count))
        torch.manual_seed(seed)
        inputs, soft = augmenter.train(images, targets(count))
        assert torch.equal(inputs, expected[0]) and torch.equal(soft, expected[1])


EACH = {key: getattr(EVERYTHING, key) for key in sorted(EVERYTHING.model_fields_set)}
LESS = ({"resized_crop": None}, {"trivial": False}, {"mixup": 0.0}, {"cutmix": 0.0}, {"trivial_interpolation": "bilinear"})
POLICIES = ({"rand_augment": {"ops": 3}}, {"auto_augment": "cifar10"}, {"three_augment": True})
SETS = [{}, *({key: value} for key, value in EACH.items()), *(EACH | change for change in LESS), *POLICIES]


@pytest.mark.parametrize("options", SETS, ids=lambda options: "+".join(options) or "nothing")
@pytest.mark.parametrize(("shape", "count"), [((3, 32, 32), 20), ((1, 28, 28), 7), ((3, 9, 12), 1), ((1, 2, 3), 5)])
def test_batches_are_the_same_together_as_alone(options, shape, count):
    """Bit for bit: four batches in one go, and in two, against one at a time from the same seeds; the generator goes as far."""
    channels, height, width = shape
    augmenter = Augmenter(info(channels), AugmentSection(**options), len(CLASSES))
    images, labels = pictures(4 * count, channels, height, width), targets(4 * count)
    alone, draws = [], []
    for number, rows in enumerate(torch.arange(4 * count).split(count)):
        torch.manual_seed(number)
        alone.append(augmenter.train(images[rows], labels[rows]))
        after = torch.get_rng_state()
        torch.manual_seed(number)
        draws.append(augmenter.draw(count, (height, width)))
        assert torch.equal(torch.get_rng_state(), after)
    inputs, soft = (torch.cat(parts) for parts in zip(*alone, strict=True))
    for first, end in ((0, 4), (0, 3), (3, 4)):
        rows = slice(first * count, end * count)
        together = augmenter.apply(images[rows], labels[rows], join_draws(draws[first:end]))
        assert torch.equal(together[0], inputs[rows]) and torch.equal(together[1], soft[rows])


def test_augmentation_is_full_precision_under_autocast():
    augmenter, images = Augmenter(info(), AugmentSection(trivial=True), len(CLASSES)), pictures(60)
    torch.manual_seed(0)
    expected, _ = augmenter.train(images, targets(60))
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        inputs, _ = augmenter.train(images, targets(60))
    assert torch.equal(inputs, expected)
