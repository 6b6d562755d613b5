"""From what a user has to what a network takes: images (files, PIL, arrays, tensors) and texts, prepared as in training.

An image of the training data gives the same bits here as there. Runs no network.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from eectl.core.errors import EectlError
from eectl.data.augment import Augmenter
from eectl.data.images import centre_square, prepare
from eectl.data.pictures import Oddities, from_pillow, open_image, warnings_heard
from eectl.data.sources import FACTS
from eectl.data.splits import DataInfo
from eectl.data.text import Texts, encode, load_tokenizer, padding_id
from eectl.recipe.data_paths import expand
from eectl.recipe.data_section import DataSection

if TYPE_CHECKING:
    from PIL import Image

STORED_CHANNELS = {name: FACTS[name][1][0] for name in ("digits", "mnist", "fashion-mnist", "cifar10", "cifar100")}
"""The data sets that are stored as pixels of one size, and how many channels those have; all others are image files."""
FILES_AT_ANY_SIZE = ("imagenet", "imagenette")  # brought to a square even where the recipe names no image_size
RESCUE = "give uint8 pixels (0 to 255), a file's path or a PIL image; inputs that are prepared already go to model(x)"


class RawInputs(Protocol):
    """A network's way from raw to prepared inputs, in two steps: `read` one at a time, `batches` of what was read."""

    noun: str
    """A word for the inputs, for messages."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes for the user on inputs that were read."""

    def split(self, inputs: Any) -> Iterator[Any]:
        """Take what a user passed apart: one input, or several."""

    def reading(self) -> AbstractContextManager[None]:
        """Stand around all calls of `read`, which may come from several threads."""

    def read(self, value: Any, *, where: str) -> Any:
        """Bring one input into memory in its final size; raises EectlError that names it, by `where`, if it will not do."""

    def batches(self, values: Sequence[Any], *, size: int, device: torch.device) -> Iterator[tuple[list[int], Tensor]]:
        """Make batches of at most `size` rows of what was read: the places of the rows in `values`, and the network's inputs."""


@dataclass(frozen=True)
class ImageInputs:
    """Images as a network takes them: uint8 [C, H, W] one by one, then float32 [n, C, H, W], normalised.

    Files of the training data go through Pillow, pixels of published data sets through torch, each as it did in training. An
    image of another shape than the network's is resized until it covers that shape, and its centre is cut out. What is odd about
    files is counted in `odd`.
    """

    info: DataInfo
    spec: DataSection
    channels_last: bool
    odd: Oddities = field(default_factory=Oddities, compare=False)

    noun = "images"

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes on files that were odd and read all the same."""
        return self.odd.notes

    def reading(self) -> AbstractContextManager[None]:
        """Keep Pillow's warnings off stderr."""
        return warnings_heard()

    def split(self, inputs: Any) -> Iterator[Any]:
        """Take a list, an iterator, or a batch [n, H, W, C] (array) or [n, C, H, W] (tensor) apart; else it is one image."""
        from PIL import Image

        if isinstance(inputs, (str, Path, Image.Image)) or (isinstance(inputs, (np.ndarray, Tensor)) and inputs.ndim < 4):
            yield inputs
        else:
            yield from inputs

    def read(self, value: Any, *, where: str) -> Tensor:
        """Return one image as uint8 [C, H, W] of the network's shape; raises EectlError for what is no image."""
        stored = STORED_CHANNELS.get(self.info.name)
        channels = stored or self.info.input_shape[0]
        image = self._open(value, "L" if channels == 1 else "RGB", where)
        if stored is None:
            return _pixels(self._fit(image))
        _, height, width = self.info.input_shape
        cut = _cut_to_ratio(image, width, height)
        return prepare(_pixels(cut)[None], self._shape, self.spec.interpolation)[0]

    def batches(self, values: Sequence[Tensor], *, size: int, device: torch.device) -> Iterator[tuple[list[int], Tensor]]:
        """Make normalised batches, in order."""
        augmenter = Augmenter(self.info, self.spec.augment, len(self.info.classes))
        for start in range(0, len(values), size):
            chunk = values[start : start + size]
            images = augmenter.eval(torch.stack(list(chunk)).to(device))
            if self.channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            yield list(range(start, start + len(chunk))), images

    @property
    def _shape(self) -> tuple[int, int, int]:
        channels, height, width = self.info.input_shape
        return channels, height, width

    def _open(self, value: Any, mode: str, where: str) -> "Image.Image":
        """Return a file, a PIL image, an array or a tensor as a PIL image of a mode."""
        from PIL import Image

        if isinstance(value, (str, Path)):
            return open_image(expand(value), mode, background=self.spec.background, odd=self.odd)
        if isinstance(value, Tensor):
            value = _as_array(value, where)
        if isinstance(value, np.ndarray):
            value = _from_array(value, where)
        if isinstance(value, Image.Image):
            return from_pillow(value, mode, background=self.spec.background, where=where)
        raise EectlError(f"{where}: a {type(value).__name__}, and the network takes images; {RESCUE}")

    def _fit(self, image: "Image.Image") -> "Image.Image":
        """Bring an image to the network's size with Pillow, as the files of the training data were."""
        from PIL import Image

        _, height, width = self.info.input_shape
        if self.spec.image_size is not None or self.info.name in FILES_AT_ANY_SIZE:
            return centre_square(image, self.spec.resize or height, height, self.spec.interpolation)
        if image.size == (width, height):
            return image
        resampling = Image.Resampling[self.spec.interpolation.upper()]
        return _cut_to_ratio(image, width, height).resize((width, height), resampling)


def _pixels(image: "Image.Image") -> Tensor:
    """Return an image's pixels as uint8 [C, H, W]."""
    pixels = np.asarray(image)
    pixels = pixels[:, :, None] if pixels.ndim == 2 else pixels
    return torch.from_numpy(np.array(pixels.transpose(2, 0, 1), order="C"))  # a copy: an image's own memory is read-only


def _cut_to_ratio(image: "Image.Image", width: int, height: int) -> "Image.Image":
    """Cut the centre of an image to the ratio of `width` to `height`."""
    scale = min(image.width / width, image.height / height)
    cut = max(round(width * scale), 1), max(round(height * scale), 1)
    if cut == image.size:
        return image
    left, top = (image.width - cut[0]) // 2, (image.height - cut[1]) // 2
    return image.crop((left, top, left + cut[0], top + cut[1]))


def _as_array(tensor: Tensor, where: str) -> Any:
    """Return a uint8 tensor [C, H, W] or [H, W] as an array [H, W, C] or [H, W]."""
    if tensor.dtype != torch.uint8:
        raise EectlError(f"{where}: pixels of type {str(tensor.dtype).removeprefix('torch.')}; {RESCUE}")
    if tensor.ndim == 3 and tensor.shape[0] not in (1, 3, 4):
        raise EectlError(f"{where}: a tensor of shape {tuple(tensor.shape)}; give [1, 3 or 4 channels, height, width]")
    array = tensor.detach().cpu().numpy()
    return array.transpose(1, 2, 0) if array.ndim == 3 else array


def _from_array(array: Any, where: str) -> "Image.Image":
    """Return a uint8 array [H, W, C] or [H, W] as a PIL image."""
    from PIL import Image

    if array.dtype != np.uint8:
        raise EectlError(f"{where}: pixels of type {array.dtype}; {RESCUE}")
    if not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3, 4))) or 0 in array.shape:
        raise EectlError(f"{where}: an array of shape {array.shape}; give [height, width] or [height, width, 1, 3 or 4 channels]")
    array = array[:, :, 0] if array.ndim == 3 and array.shape[2] == 1 else array
    return Image.fromarray(np.ascontiguousarray(array))


@dataclass(frozen=True)
class TextInputs:
    """Texts, or pairs, as a network takes them: int64 [n, 3, token] of token ids, attention mask and token types.

    `vocabulary` is how many token ids the network takes.
    """

    tokenizer: Any
    num_texts: int
    max_length: int
    vocabulary: int | None

    noun = "texts"
    notes: tuple[str, ...] = ()

    def reading(self) -> AbstractContextManager[None]:
        """Do nothing: texts are in memory."""
        return nullcontext()

    def split(self, inputs: Any) -> Iterator[Any]:
        """Take a list or an iterator apart; a string, and for a network of pairs a tuple of two strings, is one input."""
        pair = isinstance(inputs, tuple) and len(inputs) == self.num_texts and all(isinstance(text, str) for text in inputs)
        if isinstance(inputs, str) or (self.num_texts == 2 and pair):
            yield inputs
        else:
            yield from inputs

    def read(self, value: Any, *, where: str) -> tuple[str, ...]:
        """Return a text as a tuple of one, a pair as a tuple of two; raises EectlError for anything else."""
        texts = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, (tuple, list)) else ()
        if not texts or not all(isinstance(text, str) for text in texts):
            raise EectlError(f"{where}: a {type(value).__name__}, and the network takes texts; give strings")
        if len(texts) != self.num_texts:
            wanted = "pairs of texts; give tuples of two strings" if self.num_texts == 2 else "single texts; give strings"
            raise EectlError(f"{where}: {len(texts)} text(s), and the network takes {wanted}")
        if not any(text.strip() for text in texts):
            raise EectlError(f"{where}: the text is empty; fill it in or leave it out")
        return texts

    def batches(
        self, values: Sequence[tuple[str, ...]], *, size: int, device: torch.device
    ) -> Iterator[tuple[list[int], Tensor]]:
        """Make batches of texts of about one length, longest first, padded to the longest of each."""
        encoded = encode(self.tokenizer, values, max_length=self.max_length)
        padding = padding_id(self.tokenizer)
        largest = max(padding, int(encoded.ids.max()))
        if self.vocabulary is not None and largest >= self.vocabulary:
            raise EectlError(
                f"the tokenizer gives token ids up to {largest}, and the network takes those below {self.vocabulary}; "
                "name the tokenizer that it was trained with"
            )
        lengths = torch.from_numpy(encoded.lengths)
        ids, types = torch.from_numpy(encoded.ids), torch.from_numpy(encoded.types)
        texts = Texts(ids, types, lengths, padding=padding, max_length=self.max_length, device=device)
        rows = torch.split(lengths.argsort(descending=True, stable=True), size)
        for places, inputs in zip(rows, texts.read(rows), strict=True):
            yield places.tolist(), inputs


def text_inputs(spec: DataSection, *, vocabulary: int | None, tokenizer: str | None, where: Path) -> TextInputs:
    """Return how the texts of a checkpoint at `where` are read: with its recipe's tokenizer, or the one that is named instead.

    Raises EectlError where there is no such tokenizer.
    """
    name = tokenizer or spec.tokenizer or ""
    try:
        loaded = load_tokenizer(name)
    except EectlError as error:
        advice = "" if tokenizer else "; it was there in training: put it back, or name it with tokenizer= (--tokenizer)"
        raise EectlError(f"{where}: {error}{advice}") from error
    return TextInputs(loaded, len(spec.text), spec.max_length, vocabulary)
