"""From image files and Pillow's images to 8-bit pixels by one set of rules, for training, evaluation and prediction alike.

Says which types of file are read, and what becomes of transparency, orientation, depth and further frames. Resizes nothing.
"""

import io
import logging
import stat
import threading
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np

from eectl.core.errors import EectlError, one_line, visible
from eectl.data.encoded import EncodedPictures

if TYPE_CHECKING:
    from PIL import Image

# Types that are known by their first bytes, whatever the file is called. Pillow reads more: those that run another program
# (EPS), that open what lies inside whatever it is (IPTC), and measurements that are no pictures are left out on purpose.
ANYWHERE = {
    "PNG": (".png", ".apng"),
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "WEBP": (".webp",),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
    "BMP": (".bmp",),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm", ".pfm"),
    "AVIF": (".avif",),
    "JPEG2000": (".jp2", ".j2k", ".jpx"),
    "ICO": (".ico",),
    "ICNS": (".icns",),
    "PSD": (".psd",),
    "QOI": (".qoi",),
    "DDS": (".dds",),
    "SGI": (".sgi", ".rgb", ".rgba", ".bw"),
}
# Types whose first bytes prove little, which are tried only where the name says so.
BY_NAME = {
    "TGA": (".tga",),
    "PCX": (".pcx",),
    "DIB": (".dib",),
    "CUR": (".cur",),
    "SUN": (".ras",),
    "XBM": (".xbm",),
    "XPM": (".xpm",),
    "DCX": (".dcx",),
    "FLI": (".fli", ".flc"),
    "MSP": (".msp",),
}
EXTENSIONS = tuple(ending for endings in (ANYWHERE | BY_NAME).values() for ending in endings)
MOST_PIXELS = 2**26  # of one image, 8,192 × 8,192; Pillow warns of a third more
MOVING = (".gif", ".apng", ".fli", ".flc")
SHOWN = 3  # files that a note names
ORIENTATION, BITS, MEANING = 0x0112, 258, 262  # tags of EXIF and TIFF
WHITE_IS_ZERO = 0  # a value of the last
WITH_ALPHA = ("RGBA", "LA", "PA", "RGBa", "La")  # Pillow's modes
NAMING_A_COLOUR = ("1", "L", "P", "RGB")  # those that may name colours that are transparent
STORED_AS_16_BITS = ("PNG", "PPM")  # types of which Pillow's mode I means 16 bits

# What Pillow warns of while this thread reads a file; None while it reads none.
_heard: ContextVar[list[str] | None] = ContextVar("_heard", default=None)


class Oddities:
    """Counts of files that were odd and read all the same, with the first of them by name, for one note of each kind.

    Several threads may add to it. It stays small, however many files are read.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._first: dict[str, list[str]] = {}

    def add(self, kind: str, line: str) -> None:
        """Count a file, whose name or line is `line`; `kind` says what is odd, with {} for the number of files."""
        with self._lock:
            self._counts[kind] += 1
            self._first[kind] = sorted([*self._first.get(kind, ()), visible(line)])[:SHOWN]

    @property
    def notes(self) -> tuple[str, ...]:
        """A sentence for each kind, with the first files."""
        return tuple(
            f"{kind.format(f'{count:,}')}: {', '.join(self._first[kind])}{', …' if count > SHOWN else ''}"
            for kind, count in sorted(self._counts.items())
        )


FRAMES = "images with several frames, of which the first is taken ({})"
FAULTS = "images that are read in spite of a fault ({})"


@contextmanager
def warnings_heard() -> Iterator[None]:
    """Keep what Pillow warns of while `open_image` runs, in any thread, off stderr; all other warnings are shown as ever.

    Whoever starts threads that read files enters this before they start: Python has one way of showing warnings per process.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("always", module=r"PIL\b")
        shown = getattr(warnings.showwarning, "shown", warnings.showwarning)  # never through another of these

        def hear(
            message: Warning | str, category: type[Warning], filename: str, lineno: int, file: TextIO | None = None,
            line: str | None = None,
        ) -> None:  # fmt: skip
            said = _heard.get()
            if said is None:
                shown(message, category, filename, lineno, file, line)
            elif not issubclass(category, DeprecationWarning):  # which is no file's fault
                said.append(" ".join(str(message).split()))

        hear.shown = shown  # type: ignore[attr-defined]
        warnings.showwarning = hear
        logger, nowhere = logging.getLogger("PIL"), logging.NullHandler()  # without a handler it would write to stderr
        logger.addHandler(nowhere)
        try:
            yield
        finally:
            logger.removeHandler(nowhere)


def open_image(
    path: Path, mode: str, *, background: str, odd: Oddities | None = None, content: bytes | None = None
) -> "Image.Image":
    """Open an image file in PIL's mode L or RGB, by the rules of `as_mode`; of several frames the first.

    What is odd but does no harm is added to `odd`. An image that is no file of its own is given as its bytes, the `content`, and
    `path` then stands for it in messages.

    Raises:
        EectlError: for a file that is broken, too large, too deep, or of a type that is not read.
    """
    from PIL import Image

    said: list[str] = []
    token = _heard.set(said)
    try:
        if content is None and not stat.S_ISREG(path.stat().st_mode):  # a pipe could keep us waiting
            raise EectlError(f"{shown_path(path)}: a folder or a device in place of an image; name the images")
        with Image.open(path if content is None else io.BytesIO(content), formats=_formats(path)) as opened:
            if opened.width * opened.height > MOST_PIXELS:
                raise _too_large(path, f"{opened.width}×{opened.height} pixels")
            image = as_mode(opened, mode, background=background, where=path)
            frames = _has_frames(opened)
    except EectlError:
        raise
    except Image.DecompressionBombError as error:
        raise _too_large(path, "more pixels") from error
    except Exception as error:  # Pillow's readers meet bytes that nobody foresaw with whatever comes
        raise EectlError(f"{shown_path(path)}: {_reason(error, said)}; mend it or take it out") from error
    finally:
        _heard.reset(token)
    if odd is not None and frames:
        odd.add(FRAMES, shown_path(path))
    if odd is not None and said:
        odd.add(FAULTS, f"{shown_path(path)} ({visible(said[0])})")
    return image


def look_for_frames(encoded: EncodedPictures, odd: Oddities) -> None:
    """Count in `odd` the pictures with several frames, by their first bytes, of those whose names say that they may have some."""
    from PIL import Image

    for row in range(len(encoded)):
        path = encoded.path(row)
        if path.suffix.lower() not in MOVING:
            continue
        with suppress(Exception):  # who reads it says what is broken
            content = encoded.whole(row)
            with Image.open(path if content is None else io.BytesIO(content), formats=_formats(path)) as opened:
                if _has_frames(opened):
                    odd.add(FRAMES, shown_path(path))


def _formats(path: Path) -> list[str]:
    """Return the names that Pillow gives to the types that a file may have."""
    from PIL import Image

    Image.init()
    ending = path.suffix.lower()
    named = [name for name, endings in BY_NAME.items() if ending in endings]
    return [name for name in (*ANYWHERE, *named) if name in Image.OPEN]  # a Pillow may be built without some


def _too_large(path: Path, fault: str) -> EectlError:
    return EectlError(
        f"{shown_path(path)}: {fault}, and eectl reads images of up to {MOST_PIXELS:,}; make it smaller or take it out"
    )


def _reason(error: Exception, said: Sequence[str]) -> str:
    """Return in a few words why a file could not be read, of which Pillow `said` warnings."""
    from PIL import UnidentifiedImageError

    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read ({error.strerror})"
    words = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, UnidentifiedImageError):  # its words are the path
        words = said[0] if said else "no type that eectl reads"
    return f"not an image, or cut short ({visible(words)})"


def _has_frames(opened: "Image.Image") -> bool:
    try:
        return bool(getattr(opened, "is_animated", False))
    except Exception:  # the frames after the first are broken, and nobody reads them
        return True


def shown_path(path: str | Path) -> str:
    """Return a path as messages show it, in one line of printable characters, whatever bytes its name has."""
    return one_line(str(path)).replace("\t", "\\t").encode("utf-8", "backslashreplace").decode()


def from_pillow(image: "Image.Image", mode: str, *, background: str, where: str) -> "Image.Image":
    """Return an image of Pillow's by the rules of `as_mode`, also one whose file was opened and is not read yet.

    Raises:
        EectlError: as `as_mode`, and where the file is broken.
    """
    try:
        return as_mode(image, mode, background=background, where=where)
    except EectlError:
        raise
    except Exception as error:
        raise EectlError(f"{where}: {_reason(error, ())}; mend it or take it out") from error


def as_mode(image: "Image.Image", mode: str, *, background: str, where: str | Path) -> "Image.Image":
    """Return an image in PIL's mode L or RGB: upright, 8 bits deep, and laid on the colour `background` where it is transparent.

    Of 16 bits the upper 8 are kept, in grey as in colour. Colour profiles are not applied.

    Raises:
        EectlError: for pixels without a fixed white, `where` being the image's name.
    """
    from PIL import Image, ImageColor

    image.load()  # some types say how they lie, and what is transparent, only after their pixels
    turn = _turn(image)
    if image.mode.startswith(("I", "F")):
        image = _eight_bits(image, where)
    elif image.mode == "LAB":
        image = _from_lab(image)
    layered = _with_alpha(image)
    if layered is not None:
        image = Image.new("RGB", layered.size, ImageColor.getrgb(background))
        image.paste(layered, mask=layered)
    image = image.convert(mode)
    return image if turn is None else image.transpose(turn)


def _turn(image: "Image.Image") -> "Image.Transpose | None":
    """Return how an image is to be turned, as its EXIF data says that the camera was held."""
    from PIL.Image import Transpose

    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    try:
        return turns.get(image.getexif().get(ORIENTATION, 1))
    except Exception:  # damaged EXIF data says nothing, and the pixels are whole
        return None


def _eight_bits(image: "Image.Image", where: str | Path) -> "Image.Image":
    """Return an image of whole numbers of up to 16 bits as one of the upper 8: grey, with alpha where a value is transparent."""
    from PIL import Image

    if image.mode == "F" or (image.mode == "I" and image.format not in STORED_AS_16_BITS):
        kind = "fractions" if image.mode == "F" else "whole numbers of 32 bits"
        raise EectlError(
            f"{shown_path(where)}: its pixels are {kind} (Pillow's mode {image.mode}), and nothing says which is white; "
            "convert it to 8 or 16 bits"
        )
    deep = np.asarray(image)
    tags: Any = getattr(image, "tag_v2", {}) if image.format == "TIFF" else {}
    bits = int(tags.get(BITS, (16,))[0])  # 12 of some scanners
    values = (deep >> max(bits - 8, 0)).astype(np.uint8)
    eight = Image.fromarray(255 - values if tags.get(MEANING) == WHITE_IS_ZERO else values)
    key = image.info.get("transparency")
    if isinstance(key, int):
        eight.putalpha(Image.fromarray(np.where(deep == key, 0, 255).astype(np.uint8)))
    return eight


def _from_lab(image: "Image.Image") -> "Image.Image":
    from PIL import ImageCms

    ways = ImageCms.buildTransform(ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), "LAB", "RGB")
    converted = ImageCms.applyTransform(image, ways)
    assert converted is not None  # None is for what is changed in place
    return converted


def _with_alpha(image: "Image.Image") -> "Image.Image | None":
    """Return an image with its transparency as a channel, in Pillow's mode RGBA; None: it has none."""
    in_palette = image.mode == "P" and image.palette is not None and image.palette.mode == "RGBA"
    key = image.info.get("transparency") if image.mode in NAMING_A_COLOUR else None
    if image.mode not in WITH_ALPHA and not in_palette and key is None:
        return None
    if isinstance(key, tuple) and max(key) > 255:  # told with 16 bits, and of the pixels Pillow gave the upper 8
        image = image.copy()
        image.info["transparency"] = tuple(value >> 8 for value in key)
    if image.mode == "RGBA":
        return image
    return (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
