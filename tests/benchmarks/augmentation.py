"""What does augmentation cost? The paper's pipeline, batched on the device, as a share of training, and per image beside it.

The pipeline is TrivialAugmentWide, crop, erasing, and Mixup or CutMix, as the recipe says. `share_alone` is its own time over
that of the epoch it is part of; `share_felt` is what an epoch with it takes more than one without: less, where it hides behind
the GPU's work.
"""

from collections.abc import Callable
from functools import partial

import torch
from measuring import begin, interleave, options, ratio, report, summary
from peer import transform_of
from synthetic import Clock, dataset, images, network, recipe_for, train_epoch

from eectl.data import Augmenter

RECIPES = {"cpu": ("cifar100-vit-t",), "cuda": ("cifar100-vit-t", "tinyimagenet-resnet50")}
OFF = ("data.augment={}",)
PER_IMAGE = 64


def measure(name: str, chosen, device: torch.device, wait: Callable[[], object]) -> dict:
    recipe = recipe_for(name, quick=chosen.quick)
    steps = 2 if chosen.quick else chosen.steps
    rows = steps * recipe.batch_size
    data = dataset(recipe, {"train": rows, "validation": 1}, device)
    off = recipe_for(name, *OFF, quick=chosen.quick)
    without = dataset(off, {"train": rows, "validation": 1}, device)
    augmenter = Augmenter(data.info, data.augment, len(data.info.classes))
    split = data.splits["train"]
    batch = split.rows(torch.arange(recipe.batch_size))
    targets = split.labels[: recipe.batch_size].to(device)
    one_by_one, transform = images(data.info, PER_IMAGE), transform_of(recipe, data.info.input_shape[-1])

    def batched() -> None:
        for _ in range(steps):
            augmenter.train(batch, targets)

    def per_image() -> None:
        for image in one_by_one:
            transform(image)

    samples = interleave(
        {
            "augmentation": batched,
            "epoch": partial(train_epoch, *network(recipe, data.info), data, device, Clock()),
            "epoch without": partial(train_epoch, *network(off, without.info), without, device, Clock()),
            "torchvision per image": per_image,
        },
        repeats=chosen.repeats,
        wait=wait,
    )
    return {
        "batch_size": recipe.batch_size,
        "augment": data.augment.model_dump(mode="json", exclude_defaults=True),
        "seconds": {key: summary(each) for key, each in samples.items()},
        "images_per_second": {
            "batched": rows / summary(samples["augmentation"])["median"],
            "torchvision per image, one thread": PER_IMAGE / summary(samples["torchvision per image"])["median"],
        },
        "share_alone": ratio(samples["augmentation"], samples["epoch"]),
        "share_felt": 1 - ratio(samples["epoch without"], samples["epoch"]),
    }


def main(arguments: list[str] | None = None) -> dict:
    chosen = options(
        __doc__.splitlines()[0], arguments, repeats=5,
        steps={"type": int, "default": 5, "help": "steps of an epoch (default 5)"},
        recipes={"nargs": "*", "help": "shipped recipes of images; none: those of the device"},
    )  # fmt: skip
    device, wait = begin(chosen)
    names = chosen.recipes or RECIPES[device.type]
    return report("augmentation", chosen, {name: measure(name, chosen, device, wait) for name in names})


if __name__ == "__main__":
    main()
