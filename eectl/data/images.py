"""Sources of images while training: uint8 tensors on the device, or encoded pictures through worker processes."""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from eectl.core.errors import EectlError
from eectl.core.seeds import derive_seed
from eectl.data.encoded import EncodedPictures
from eectl.data.pictures import Oddities, open_image, shown_path, warnings_heard
from eectl.data.splits import Ids, send_all

if TYPE_CHECKING:
    from PIL import Image

CHUNK = 1024  # images that are resized at a time
LUMA = (0.2989, 0.587, 0.114)


class MemoryImages:
    """Images in memory, uint8 [N, C, H, W] on the device; `prepare` brings each batch to the network's shape as it is read."""

    def __init__(self, pixels: Tensor, prepare: Callable[[Tensor], Tensor] | None = None) -> None:
        self._pixels, self._prepare = pixels, prepare

    def read(
        self,
        batches: Sequence[Tensor],
        *,
        draw: int | None = None,  # noqa: ARG002 (nothing is drawn)
        visits: Sequence[Tensor] | None = None,  # noqa: ARG002
    ) -> Iterator[Tensor]:
        """Yield the images of each tensor of rows."""
        for rows in send_all(batches, self._pixels.device):
            images = self._pixels.index_select(0, rows.flatten())
            yield self._prepare(images) if self._prepare else images


@dataclass(frozen=True)
class FileImages(Dataset[Tensor | str]):
    """EncodedPictures pictures, in files, a table or shards, that become uint8 [C, H, W] of one `shape`.

    The short side is brought to `resize` pixels and the centre cut out; when `read` draws, a random box of the stored image with
    a share of its area in `crop` is taken instead. Without `resize` all have the shape.

    Transparent pixels are laid on the colour `background`. `read` sends images to `device` through `workers` processes (0: none).
    """

    encoded: EncodedPictures
    shape: tuple[int, int, int]
    resize: int | None
    workers: int
    device: torch.device
    interpolation: str = "bilinear"
    background: str = "white"
    crop: tuple[float, float] | None = None
    draw: int | None = None

    def select(self, rows: Iterable[int], device: torch.device) -> "FileImages":
        """Return these rows alone, in this order, read to `device`."""
        return replace(self, encoded=self.encoded.select(list(rows)), device=device)

    def __getitem__(self, rows: Tensor) -> Tensor | str:
        """Return images [n, C, H, W], or the text of an EectlError: a DataLoader would wrap a raised one in a traceback.

        `rows` is [n], or [n, 2] with how often each row has come before in the epoch beside it.
        """
        images = torch.empty(len(rows), *self.shape, dtype=torch.uint8)
        try:
            with warnings_heard():
                for image, (row, *visit) in zip(images, rows.view(len(rows), -1).tolist(), strict=True):
                    again = filter(None, visit)  # the first visit draws as the only one does
                    seed = None if self.crop is None or self.draw is None else derive_seed(self.draw, row, *again)
                    image.copy_(torch.from_numpy(self.decode(row, seed)))
        except EectlError as error:
            return str(error)
        return images

    def read(
        self, batches: Sequence[Tensor], *, draw: int | None = None, visits: Sequence[Tensor] | None = None
    ) -> Iterator[Tensor]:
        """Yield the images of each tensor of rows, in order, read ahead; raises EectlError that names a bad file.

        A row's random box is a function of `draw`, the row and its visit alone, so neither workers nor a resumed epoch change it.
        Of several batches at once, [batch, row], each is still read on its own.
        """
        counts = [len(rows) if rows.dim() > 1 else 1 for rows in batches]
        alone = [batch for rows in batches for batch in rows.view(-1, rows.shape[-1])]
        if visits is not None:
            again = [batch for each in visits for batch in each.view(-1, each.shape[-1])]
            alone = [torch.stack(pair, dim=1) for pair in zip(alone, again, strict=True)]
        loader = DataLoader(
            replace(self, draw=draw),
            sampler=alone,  # a "sample" is a batch of rows
            batch_size=None,
            num_workers=min(self.workers, len(alone), os.cpu_count() or 1),
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # else it draws from the global one
        )
        read = self._sent(loader)
        for count in counts:
            images = [next(read) for _ in range(count)]
            yield images[0] if count == 1 else torch.cat(images)

    def _sent(self, loader: Iterable[Tensor | str]) -> Iterator[Tensor]:
        for images in loader:
            if isinstance(images, str):
                raise EectlError(images)
            yield images.to(self.device, non_blocking=True)

    def load(self, odd: Oddities | None = None) -> Tensor:
        """Return all images at once, decoded by threads: uint8 [N, C, H, W] on the CPU; what is odd about some goes to `odd`."""
        images = torch.empty(len(self.encoded), *self.shape, dtype=torch.uint8)
        arrays = images.numpy()

        def fill(row: int) -> None:
            arrays[row] = self.decode(row, odd=odd)

        with warnings_heard(), ThreadPoolExecutor(min(32, os.cpu_count() or 1)) as threads:
            try:
                for _ in threads.map(fill, range(len(self.encoded))):
                    pass
            except BaseException:  # Ctrl-C too: what has not begun is not begun
                threads.shutdown(cancel_futures=True)
                raise
        return images

    def ids(self, labels: Sequence[Any]) -> Ids:
        """Return the 64-bit ids of rows that are not read ahead of time: BLAKE2b over their keys and labels."""
        keys = (self.encoded.key(row) + f"\0{label}".encode() for row, label in enumerate(labels))
        hashes = b"".join(hashlib.blake2b(key, digest_size=8).digest() for key in keys)
        return np.frombuffer(hashes, dtype="<u8").astype(np.uint64)

    def decode(self, row: int, seed: int | None = None, *, odd: Oddities | None = None) -> NDArray[np.uint8]:
        """Return a row as uint8 [C, H, W]: its random box if there is a `seed`, else its centre or the whole.

        Raises EectlError for a picture that is broken, too deep or of another size.
        """
        channels, height, width = self.shape
        path, mode = self.encoded.path(row), "L" if channels == 1 else "RGB"
        image = open_image(path, mode, background=self.background, odd=odd, content=self.encoded.whole(row))
        if seed is not None:
            assert self.crop is not None
            image = _cut(image, _random_box(image, self.crop, seed), (width, height), self.interpolation)
        elif self.resize is not None:
            image = centre_square(image, self.resize, height, self.interpolation)
        elif image.size != (width, height):
            raise EectlError(
                f"{shown_path(path)}: {image.width}×{image.height}, others are {width}×{height}; "
                "set data.image_size to bring all to one size"
            )
        pixels = np.asarray(image).reshape(height, width, channels)
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def centre_square(image: "Image.Image", short: int, side: int, interpolation: str) -> "Image.Image":
    """Bring an image's short side to `short` and cut out the centre square of `side` pixels; rounds as torchvision does."""
    width, height = (length * short // min(image.size) for length in image.size)
    if (width, height) != image.size:
        image = image.resize((width, height), _resampling(interpolation))
    left, top = round((width - side) / 2), round((height - side) / 2)
    return image.crop((left, top, left + side, top + side))


def _random_box(image: "Image.Image", area: tuple[float, float], seed: int) -> tuple[int, int, int, int]:
    """Draw left, top, right and bottom as torchvision's RandomResizedCrop does; the global generator stays as it is."""
    from torchvision.transforms import RandomResizedCrop

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        top, left, height, width = RandomResizedCrop.get_params(image, list(area), [3 / 4, 4 / 3])
    return left, top, left + width, top + height


def _cut(image: "Image.Image", box: tuple[int, int, int, int], size: tuple[int, int], interpolation: str) -> "Image.Image":
    """Cut a box out of an image, then resize it, so that nothing outside it is mixed in."""
    return image.crop(box).resize(size, _resampling(interpolation))


def _resampling(interpolation: str) -> "Image.Resampling":
    from PIL import Image

    return Image.Resampling[interpolation.upper()]


def prepare(images: Tensor, shape: tuple[int, int, int], interpolation: str = "bilinear") -> Tensor:
    """Bring uint8 images [n, C, H, W] to the channels and size of `shape`: grey repeated, colour to luma, antialiased."""
    channels = shape[0]
    if images.shape[1] > channels:
        luma = torch.tensor(LUMA, device=images.device).view(1, 3, 1, 1)
        images = (images.float() * luma).sum(1, keepdim=True).round_().to(torch.uint8)
    if images.shape[-2:] != shape[1:]:
        images = torch.cat([_resized(chunk, shape[1:], interpolation) for chunk in torch.split(images, CHUNK)])
    return images.expand(-1, channels, -1, -1).contiguous()


def _resized(images: Tensor, size: tuple[int, int], interpolation: str) -> Tensor:
    resized = torch.nn.functional.interpolate(images.float(), size, mode=interpolation, antialias=True, align_corners=False)
    return resized.round_().clamp_(0, 255).to(torch.uint8)


def reduced(constants: tuple[float, ...], channels: int) -> tuple[float, ...]:
    """Return per-channel constants for another number of channels: grey repeated, colour weighted as luma."""
    if len(constants) == channels:
        return constants
    if len(constants) == 1:
        return constants * channels
    return (round(sum(weight * value for weight, value in zip(LUMA, constants, strict=True)), 6),)


@dataclass(frozen=True)
class Part:
    """One part of a data set as it is stored: images, uint8 [N, C, H, W] on the CPU or files, and their labels [N, …].

    Labels are int64 classes, or what `targets.read_targets` gives.
    """

    images: Tensor | FileImages
    labels: NDArray[Any]


@dataclass(frozen=True)
class StoredImages:
    """A data set of images as it is stored.

    `parts` are train and, where it has them, validation and test; `mean` and `std` are per channel, for pixels in 0..1; `notes`
    say what the user should know about the files.
    """

    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    parts: dict[str, Part]
    notes: tuple[str, ...] = ()
