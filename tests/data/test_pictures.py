"""What becomes of every kind of image: compared with numbers by hand, and with Pillow asked for the same thing in another way."""

import logging
import os
import struct
import sys
import threading
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from eectl.core.errors import EectlError
from eectl.data import load_data
from eectl.data.pictures import ANYWHERE, BY_NAME, EXTENSIONS, Oddities, from_pillow, open_image, warnings_heard
from eectl.recipe.data_section import DataSection

SIZE = (12, 8)
CPU = torch.device("cpu")


def noise(*channels, dtype=np.uint8, seed=0):
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max + 1, (SIZE[1], SIZE[0], *channels), dtype=dtype)


def pixels(path, mode="RGB", background="white", odd=None):
    with warnings_heard():
        return np.asarray(open_image(path, mode, background=background, odd=odd))


def on(colour, rgb, alpha):
    """Blend by the textbook, in fractions."""
    share = alpha[..., None] / 255
    return rgb * share + np.array(colour) * (1 - share)


@pytest.mark.parametrize(("name", "colour"), [("white", (255, 255, 255)), ("black", (0, 0, 0)), ("#1e90ff", (30, 144, 255))])
def test_a_channel_of_transparency_is_laid_on_the_background(tmp_path, name, colour):
    rgb, alpha = noise(3), noise(seed=1)
    Image.fromarray(np.dstack([rgb, alpha])).save(tmp_path / "a.png")
    assert np.abs(pixels(tmp_path / "a.png", background=name) - on(colour, rgb, alpha)).max() <= 1
    Image.fromarray(np.dstack([rgb[..., 0], alpha]), "LA").save(tmp_path / "b.png")
    grey = np.repeat(rgb[..., :1], 3, axis=2)
    assert np.abs(pixels(tmp_path / "b.png", background=name) - on(colour, grey, alpha)).max() <= 1
    luma = on(colour, grey, alpha) @ [0.299, 0.587, 0.114]
    assert np.abs(pixels(tmp_path / "b.png", "L", background=name) - luma).max() <= 1.5


def test_a_transparent_colour_of_a_palette_or_of_plain_pixels_is_laid_on_the_background(tmp_path):
    indices = noise() % 4
    palette = [10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 110, 120]
    image = Image.fromarray(indices, "P")
    image.putpalette(palette)
    expected = np.array(palette).reshape(4, 3)[indices]
    expected[indices == 2] = (0, 0, 255)
    for name, key in (("one.png", 2), ("each.png", bytes([255, 255, 0, 255])), ("one.gif", 2)):
        image.save(tmp_path / name, transparency=key)
        assert (pixels(tmp_path / name, background="#0000ff") == expected).all()
    half = bytes([255, 128, 0, 255])
    image.save(tmp_path / "half.png", transparency=half)
    alpha = np.frombuffer(half, np.uint8)[indices]
    colours = np.array(palette).reshape(4, 3)[indices]
    assert np.abs(pixels(tmp_path / "half.png") - on((255, 255, 255), colours, alpha)).max() <= 1
    alpha_palette = image.copy()
    alpha_palette.putalpha(Image.fromarray(alpha))
    assert alpha_palette.mode == "PA"
    found = np.asarray(from_pillow(alpha_palette, "RGB", background="white", where="x"))
    assert np.abs(found - on((255, 255, 255), colours, alpha)).max() <= 1
    grey = Image.fromarray((indices * 60).astype(np.uint8))
    grey.save(tmp_path / "grey.png", transparency=120)
    assert (pixels(tmp_path / "grey.png", "L") == np.where(indices == 2, 255, indices * 60)).all()
    rgb = noise(3)
    Image.fromarray(rgb).save(tmp_path / "rgb.png", transparency=tuple(int(value) for value in rgb[3, 4]))
    rgb[3, 4] = 255
    assert (pixels(tmp_path / "rgb.png") == rgb).all()


def test_opaque_images_are_what_pillow_makes_of_them(tmp_path):
    """As it was before transparency was looked at; the second of each pair has an alpha channel that is opaque."""
    rgb, opaque = noise(3), np.full((*SIZE[::-1], 1), 255, np.uint8)
    images = {
        "rgb.png": Image.fromarray(rgb),
        "rgba.png": Image.fromarray(np.dstack([rgb, opaque])),
        "l.png": Image.fromarray(rgb[..., 0]),
        "la.png": Image.fromarray(np.dstack([rgb[..., :1], opaque]), "LA"),
        "p.png": Image.fromarray(rgb).quantize(50),
        "one.png": Image.fromarray(rgb).convert("1"),
        "cmyk.tif": Image.fromarray(noise(4), "CMYK"),
        "cmyk.jpg": Image.fromarray(noise(4), "CMYK"),
        "rgb.jpg": Image.fromarray(rgb),
        "l.jpg": Image.fromarray(rgb[..., 0]),
        "rgb.webp": Image.fromarray(rgb),
        "ycc.tif": Image.fromarray(rgb).convert("YCbCr"),
        "dot.png": Image.new("RGB", (1, 1), (7, 8, 9)),
    }
    for name, image in images.items():
        image.save(tmp_path / name)
        for mode in ("RGB", "L"):
            with Image.open(tmp_path / name) as stored:
                assert (pixels(tmp_path / name, mode) == np.asarray(stored.convert(mode))).all(), (name, mode)
    for mode in ("HSV", "YCbCr"):
        image = Image.fromarray(rgb).convert(mode)
        assert (np.asarray(from_pillow(image, "L", background="white", where="x")) == np.asarray(image.convert("L"))).all()


def test_lab_is_read_by_its_definition():
    """L* of 100 is white, of 0 black; a* above 0 is red; L* of 53.39 is the grey 127.6."""
    values = [((255, 128, 128), 255), ((0, 128, 128), 0), ((136, 128, 128), 127)]
    for lab, grey in values:
        found = np.asarray(from_pillow(Image.new("LAB", (1, 1), lab), "RGB", background="white", where="x"))[0, 0].astype(int)
        assert np.abs(found - grey).max() <= 3
    red, green, _ = np.asarray(from_pillow(Image.new("LAB", (1, 1), (136, 190, 128)), "RGB", background="white", where="x"))[0, 0]
    assert int(red) > int(green) + 100


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.tif"])
def test_images_are_turned_as_they_were_held(tmp_path, orientation, name):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(noise(3)).save(tmp_path / name, exif=exif)
    with Image.open(tmp_path / name) as stored:
        expected = np.asarray(ImageOps.exif_transpose(stored).convert("RGB"))
        assert expected.shape[:2] == (SIZE[::-1] if orientation < 5 else SIZE)
    assert (pixels(tmp_path / name) == expected).all()
    with Image.open(tmp_path / name) as stored:
        assert (np.asarray(from_pillow(stored, "RGB", background="white", where="x")) == expected).all()


def test_the_upper_8_of_16_bits_are_kept_in_grey_as_in_colour(tmp_path):
    deep = noise(dtype=np.uint16)
    Image.fromarray(deep).save(tmp_path / "a.png")
    Image.fromarray(deep).save(tmp_path / "a.tif")
    (tmp_path / "a.pgm").write_bytes(b"P5 %d %d 65535\n" % SIZE + deep.astype(">u2").tobytes())
    for name in ("a.png", "a.tif", "a.pgm"):
        assert (pixels(tmp_path / name, "L") == deep >> 8).all()
        assert (pixels(tmp_path / name) == (deep >> 8)[..., None]).all()
    colour = noise(3, dtype=np.uint16)
    write_png(tmp_path / "c.png", colour, colour_type=2)
    assert (pixels(tmp_path / "c.png") == colour >> 8).all()
    key = deep[2, 3]
    write_png(tmp_path / "k.png", deep[..., None], colour_type=0, transparent=struct.pack(">H", key))
    assert (pixels(tmp_path / "k.png", "L", background="black") == np.where(deep == key, 0, deep >> 8)).all()
    write_png(tmp_path / "k.png", colour, colour_type=2, transparent=colour[2, 3].astype(">u2").tobytes())
    expected = colour >> 8
    expected[2, 3] = 255
    assert (pixels(tmp_path / "k.png") == expected).all()


def write_png(path: Path, array: np.ndarray, *, colour_type: int, transparent: bytes | None = None) -> None:
    """A PNG of 16 bits, which Pillow does not write in colour."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = array.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0))
        + (chunk(b"tRNS", transparent) if transparent else b"")
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("mode", ["F", "I"])
def test_pixels_without_a_white_are_refused(tmp_path, mode):
    Image.fromarray(noise()).convert(mode).save(tmp_path / "a.tif")
    with pytest.raises(EectlError, match=r"a\.tif: its pixels are .*convert it to 8 or 16 bits"):
        pixels(tmp_path / "a.tif")


def test_the_first_frame_is_taken_and_counted(tmp_path):
    frames = [Image.new("RGB", SIZE, colour) for colour in ("red", "lime", "blue")]
    odd = Oddities()
    for name in ("a.gif", "b.png", "c.webp", "d.tif", "e.gif"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **({"lossless": True} if "webp" in name else {}))
        assert (pixels(tmp_path / name, odd=odd) == (255, 0, 0)).all()
    frames[0].save(tmp_path / "still.gif")
    pixels(tmp_path / "still.gif", odd=odd)
    (note,) = odd.notes
    assert "(5)" in note and str(tmp_path / "a.gif") in note and note.endswith("…") and "still" not in note


def test_an_image_with_damaged_exif_data_is_read_and_named(tmp_path, recwarn, capsys):
    Image.fromarray(noise(3)).save(tmp_path / "good.png")
    expected = pixels(tmp_path / "good.png")
    for name in ("bad.png", "worse.png"):
        broken = (
            b"Exif\0\0II*\0\x08\0\0\0\x05\0" + b"\x0e\x01\x02\0\xff\xff\0\0\xff\xff\0\0" if name == "bad.png" else b"Exif\0\0XX"
        )
        Image.fromarray(noise(3)).save(tmp_path / name, exif=broken)
    odd = Oddities()
    for name in ("bad.png", "worse.png"):
        assert (pixels(tmp_path / name, odd=odd) == expected).all()
    assert [note for note in odd.notes if str(tmp_path / "bad.png") in note]
    assert not recwarn.list and capsys.readouterr().err == ""


def test_what_pillow_logs_is_not_written_to_stderr(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # pytest's own, where there is none in a program
    Image.fromarray(noise(3)).save(tmp_path / "a.tif")
    content = (tmp_path / "a.tif").read_bytes()
    samples = struct.pack("<HHI", 277, 3, 1) + struct.pack("<H", 3)  # SamplesPerPixel, of which there are three
    assert samples in content
    (tmp_path / "a.tif").write_bytes(content.replace(samples, samples[:-2] + struct.pack("<H", 2048)))
    with pytest.raises(EectlError, match="not an image"):
        pixels(tmp_path / "a.tif")
    assert capsys.readouterr().err == ""


def test_warnings_of_others_are_shown_while_images_are_read(tmp_path):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with warnings_heard(), warnings_heard():
            warnings.warn("mine", stacklevel=1)
            thread = threading.Thread(target=lambda: warnings.warn("theirs", stacklevel=1))
            thread.start()
            thread.join()
    assert {str(each.message) for each in seen} == {"mine", "theirs"}


@pytest.mark.parametrize("side", [8_200, 9_500, 14_000])  # Pillow warns of the second, and refuses the last
def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path, side, recwarn):
    rows = zlib.compress(bytes(side // 8 + 1) * 8)
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", rows), (b"IEND", b""))
    chunks = [struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts]
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    with pytest.raises(EectlError, match=r"bomb\.png: .*pixels, and eectl reads images of up to 67,108,864"):
        pixels(tmp_path / "bomb.png")
    assert not recwarn.list


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"


@pytest.mark.parametrize("name", ["a.png", "a.eps", "a.tga", "a"])
def test_a_file_that_would_run_another_program_is_not_opened_whatever_its_name(tmp_path, name):
    (tmp_path / name).write_bytes(POSTSCRIPT)
    with Image.open(tmp_path / name) as image:
        assert image.format == "EPS"  # Pillow itself would
    with pytest.raises(EectlError, match="no type that eectl reads") as caught:
        pixels(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_every_type_is_one_that_pillow_reads_and_its_endings_are_pillows():
    Image.init()
    for name, endings in (ANYWHERE | BY_NAME).items():
        assert name in Image.OPEN
        for ending in endings:
            assert Image.registered_extensions()[ending] == name, ending
    assert not {"EPS", "PDF", "WMF", "IPTC", "FITS", "HDF5"} & set(ANYWHERE | BY_NAME)
    assert len(set(EXTENSIONS)) == len(EXTENSIONS)


@pytest.mark.parametrize("ending", [".tga", ".pcx", ".dib", ".ico", ".jp2", ".sgi", ".bmp", ".ppm", ".qoi", ".dds"])
def test_files_of_the_rarer_types_are_read(tmp_path, ending):
    if ending == ".qoi" and "QOI" not in Image.SAVE:
        pytest.skip("this Pillow does not write QOI")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    image.save(tmp_path / f"a{ending}", **({"irreversible": False} if ending == ".jp2" else {}))
    assert (pixels(tmp_path / f"a{ending}") == np.asarray(image)).all()


@pytest.mark.parametrize("value", ["teal", "#abcdef", "WHITE"])
def test_a_background_that_is_a_colour(value):
    assert DataSection(background=value).background == value


@pytest.mark.parametrize("value", ["teel", "#abc", "#abcdeg", "", None, 7, [1, 2, 3], True, "rgb(1,2,3)", "hsl(0,0%,0%)"])
def test_a_background_that_is_no_colour_is_refused(value):
    with pytest.raises(ValueError, match=r"(a name|a colour.s name), such as white"):
        DataSection(background=value)


def test_texts_have_no_background():
    with pytest.raises(ValueError, match="background is for images"):
        DataSection(name="text", root="x.csv", background="black")


@pytest.fixture
def root(tmp_path):
    for name, colour in (("cold", "blue"), ("warm", "red")):
        (tmp_path / name).mkdir()
        for number in range(10):
            Image.new("RGB", SIZE, colour).save(tmp_path / name / f"{number}.png")
    return tmp_path


def load(root, **changes):
    return load_data(DataSection(name="folder", root=root, test=0.2, **{"workers": 0, **changes}), device=CPU)


def test_what_is_left_out_is_counted_in_one_note(root):
    before = load(root).notes
    (root / "warm" / "deep").mkdir()
    for place, names in (("cold", ("a.pdf", "b.pdf", "readme")), ("warm/deep", ("c.txt",))):
        for name in names:
            (root / place / name).write_text("x")
    for name in (".DS_Store", "Thumbs.db", "desktop.ini"):
        (root / "cold" / name).write_text("x")
    (root / "cold" / ".ipynb_checkpoints").mkdir()
    Image.new("RGB", (1, 1)).save(root / "cold" / ".ipynb_checkpoints" / "x.png")
    (note,) = (note for note in load(root).notes if note not in before)
    assert "4 files" in note and "2 .pdf" in note and "cold/a.pdf" in note and "Thumbs" not in note
    assert sum(map(len, load(root).splits.values())) == 20


@pytest.mark.parametrize("in_memory", [True, False])
def test_moving_images_in_a_folder_are_counted_once(root, in_memory):
    for number in range(4):
        frames = [Image.new("RGB", SIZE, colour) for colour in ("red", "blue")]
        frames[0].save(root / "warm" / f"moving{number}.gif", save_all=True, append_images=frames[1:])
    notes = [note for note in load(root, in_memory=in_memory).notes if "frames" in note]
    assert len(notes) == 1 and "(4)" in notes[0] and "moving0.gif" in notes[0]


def _loop(root):
    (root / "warm" / "again").symlink_to(root / "warm")


def _loop_of_two(root):
    (root / "warm" / "there").symlink_to(root / "cold")
    (root / "cold" / "back").symlink_to(root / "warm")


def _loop_to_the_top(root):
    (root / "warm" / "top").symlink_to("/")


def _own_target(root):
    (root / "warm" / "self.png").symlink_to(root / "warm" / "self.png")


def _pipe(root):
    os.mkfifo(root / "warm" / "pipe.png")


def _line_break(root):
    (root / "warm" / "x\n\x1b[31m.png").write_text("no image")


def _line_break_in_a_class(root):
    (root / "warm").rename(root / "wa\nrm")


def _no_utf8_in_a_class(root):
    (root / "warm").rename(root / os.fsdecode(b"w\xffrm"))


@pytest.mark.parametrize(
    "mistake",
    [_loop, _loop_of_two, _loop_to_the_top, _own_target, _pipe, _line_break, _line_break_in_a_class, _no_utf8_in_a_class],
)
def test_odd_names_and_links_are_one_printable_line(root, mistake):
    mistake(root)
    with pytest.raises(EectlError) as caught:
        load(root)
    message = str(caught.value)
    assert message.isprintable() and str(root) in message and message.encode()


@pytest.mark.skipif(sys.platform != "linux", reason="names of any bytes are Linux's")
@pytest.mark.parametrize("in_memory", [True, False])
def test_a_file_whose_name_is_no_utf8_is_read(root, in_memory):
    (root / "warm" / "3.png").rename(root / "warm" / os.fsdecode(b"\xff.png"))
    assert sum(map(len, load(root, in_memory=in_memory).splits.values())) == 20


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("place", [".", "warm", "warm/deep"])
def test_a_folder_that_may_not_be_read_is_one_line(root, place):
    (root / "warm" / "deep").mkdir()
    (root / place).chmod(0)
    try:
        with pytest.raises(EectlError, match="cannot be read"):
            load(root)
    finally:
        (root / place).chmod(0o755)
