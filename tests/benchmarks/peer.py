"""The authors' code (kamadforge/early-exit-benchmark) from a checkout, run as it is on our networks and images.

Nothing of it is copied: its modules are imported, and packages that it names and does not need here are empty stand-ins.
Theirs are the exits (their own heads), the training loop and the threshold sweep; the backbone is ours, block by block.
"""

import importlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from eectl.data import Dataset
from eectl.models.backbone import Hidden
from eectl.models.multi_exit import MultiExitModel
from eectl.recipe.recipe import Recipe

STAND_INS = ("wandb", "omegaconf", "accelerate", "accelerate.state", "accelerate.utils", "torch.utils.tensorboard")
NEVER_EVALUATE = 10**9  # batches per epoch: their loop scores the whole test set at the start of each


class _Empty(ModuleType):
    """A module in which every name is a class that does nothing."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {"__init__": lambda self, *args, **keywords: None})


def import_peer(checkout: str, name: str) -> ModuleType:
    """One of the checkout's modules."""
    if not (Path(checkout) / "methods" / "early_exit.py").exists():
        sys.exit(f"--peer {checkout}: no checkout of kamadforge/early-exit-benchmark")
    if checkout not in sys.path:
        sys.path.insert(0, checkout)
    missing = [each for each in STAND_INS if each not in sys.modules]
    sys.modules.update({each: _Empty(each) for each in missing})
    try:
        return importlib.import_module(name)
    finally:
        for each in missing:  # other libraries ask for them too, and must not find these
            del sys.modules[each]


class _Blocks(nn.Module):
    """Our backbone in the form that theirs have."""

    def __init__(self, model: MultiExitModel, num_classes: int, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.backbone, self.number_of_classes = model.backbone, num_classes
        self.input_channels, self.input_size = shape[0], shape[1]

    def forward_generator(self, inputs: Tensor) -> Iterator[tuple[Tensor | None, Tensor | None]]:
        hidden = self.backbone.stem(inputs)
        for index in range(self.backbone.depth):
            hidden = self.backbone.block(index, hidden)
            sent = yield hidden.x, None
            hidden = Hidden(sent)
        yield None, self.backbone.head(hidden)


def around(checkout: str, model: MultiExitModel, num_classes: int, shape: tuple[int, ...]) -> Any:
    """Their network with their heads around our backbone, with exits where ours has them."""
    sdn = import_peer(checkout, "architectures.early_exits.sdn").SDN
    kind = "pooled_head" if model.backbone.prefers_channels_last else "vit_standard_head"
    return sdn(_Blocks(model, num_classes, shape), kind, set(model.after))


class _Loader:
    """Batches without end, of which their loop believes that no epoch is over."""

    def __init__(self, batches: Any) -> None:
        self._batches = batches

    def __len__(self) -> int:
        return NEVER_EVALUATE

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield from self._batches


class _Images(torch.utils.data.Dataset):
    """uint8 images on the CPU, augmented one by one as a recipe says, with torchvision's transforms: what their loaders do."""

    def __init__(self, images: Tensor, labels: Tensor, transform: Any) -> None:
        self._images, self._labels, self._transform = images, labels, transform

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self._transform(self._images[index]), int(self._labels[index])


def transform_of(recipe: Recipe, size: int) -> v2.Compose:
    """A recipe's augmentation as torchvision's transforms of one image (Mixup and CutMix are their loop's own)."""
    augment = recipe.data.augment
    steps: list[nn.Module] = [v2.TrivialAugmentWide()] if augment.trivial else []
    steps += [v2.RandomCrop(size, padding=augment.crop)] if augment.crop else []
    steps += [v2.RandomHorizontalFlip()] if augment.flip else []
    steps += [v2.ToDtype(torch.float32, scale=True)]
    steps += [v2.RandomErasing(augment.erasing)] if augment.erasing else []
    return v2.Compose(steps)


class Authors:
    """Their multi-exit network around our backbone, and their training loop around it."""

    def __init__(self, checkout: str, model: MultiExitModel, data: Dataset, device: torch.device) -> None:
        self._loop = import_peer(checkout, "methods.early_exit").training_loop
        self._network = around(checkout, model, len(data.info.classes), data.info.input_shape).to(device)
        self._network.train("all")
        self._optimizer = torch.optim.AdamW(self._network.parameters(), lr=1e-3)
        self._data, self._device = data, device

    def train(self, steps: int, recipe: Recipe, batches: Any = None) -> None:
        """Steps of their loop, on one batch that lies on the device unless `batches` come."""
        split = self._data.splits["train"]
        if batches is None:
            rows = torch.arange(recipe.batch_size)
            batches = [(split.rows(rows).float() / 255, split.labels[rows].to(self._device))]
        accelerator = SimpleNamespace(
            is_main_process=True, unwrap_model=lambda model: model, backward=lambda loss: loss.backward()
        )
        silent = SimpleNamespace(add_scalar=lambda *args, **keywords: None)
        context = SimpleNamespace(
            accelerator=accelerator, model=self._network, optimizer=self._optimizer, scheduler=None, early_stopper=None,
            train_loader=_Loader(batches), writer=silent, last_batch=steps, state=SimpleNamespace(current_batch=1),
            criterion=nn.CrossEntropyLoss(),
        )  # fmt: skip
        augment = recipe.data.augment
        mixes = {f"{name}_alpha": getattr(augment, name) or None for name in ("mixup", "cutmix")}
        settings = dict.fromkeys(("mixup_mode", "mixup_smoothing", "auxiliary_loss_type", "clip_grad_norm"))
        arguments = SimpleNamespace(
            epochs_common=1, with_backbone=True, with_phase3=False, model_class="sdn", scheduler_class=None, save_every=10**9,
            **(mixes if recipe.batch_size % 2 == 0 else {}), **settings,
        )  # fmt: skip
        self._loop(arguments, context)

    def train_epoch(self, steps: int, recipe: Recipe, *, workers: int) -> float:
        """As many steps on images that worker processes augment one by one, and a pass over the validation split; seconds."""
        split = self._data.splits["train"]
        pixels = split.rows(torch.arange(len(split))).cpu()
        made = _Images(pixels, split.labels, transform_of(recipe, pixels.shape[-1]))
        loader = DataLoader(made, recipe.batch_size, shuffle=True, num_workers=workers, pin_memory=self._device.type == "cuda")
        onto = ((inputs.to(self._device), labels.to(self._device)) for inputs, labels in loader)
        started = time.perf_counter()
        self.train(steps, recipe, onto)
        validation = self._data.splits["validation"]
        self._network.eval()
        with torch.no_grad():
            for rows in torch.arange(len(validation)).split(recipe.batch_size):
                outputs = self._network(validation.rows(rows).float() / 255)
                [float((each.argmax(1) == validation.labels[rows].to(self._device)).float().mean()) for each in outputs]
        return time.perf_counter() - started
