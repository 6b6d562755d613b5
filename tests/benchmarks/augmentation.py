"""What does augmentation cost? The paper's pipeline, batched on the device, as a share of training, and per image beside it.

The pipeline is TrivialAugmentWide, crop, erasing, and Mixup or CutMix, as the recipe says. `share_alone` is its own time, in the
windows of steps that training takes and with the reading of the batches, over
that of the epoch it is part of; `share_felt` is what an epoch with it takes more than one without: less, where it hides behind
the GPU's work.
"""

from collections.abc import Callable

import torch
from measuring import begin, interleave, options, ratio, report, summary
from peer import transform_of
from synthetic import Training, dataset, images, network, recipe_for

from eectl.core.distributed import World
from eectl.training.feed import Feed, training_data
from eectl.training.running import make_execution

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
    rows_of, world = training_data(data), World(0, 1, device)
    feed = Feed(rows_of, make_execution(recipe, network(recipe, data.info)[0].backbone, device))
    one_by_one, transform = images(data.info, PER_IMAGE), transform_of(recipe, data.info.input_shape[-1])

    def batched() -> None:
        batches = feed.training(
            batch_size=recipe.batch_size, seed=0, epoch=0, start=0, world=world, step_seed=lambda number: number
        )
        for _ in batches:
            pass

    def per_image() -> None:
        for image in one_by_one:
            transform(image)

    samples = interleave(
        {
            "augmentation": batched,
            "epoch": Training(*network(recipe, data.info), data, device).epoch,
            "epoch without": Training(*network(off, without.info), without, device).epoch,
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
