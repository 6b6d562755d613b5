"""Damage to the bytes of a real file: at random, or knowing the form of the file, as a careful attacker would do it.

Everything is drawn from one generator, so a seed names a case. What the files mean to eectl is not known here, except where its
JSON lies in a .safetensors file.
"""

import copy
import io
import json
import struct
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

METADATA_KEY = "eectl"
TWICE, DEEP = "\x01twice", "\x01deep"  # stand for what json.dumps cannot say, until the text is made
DEEP_LEVELS = 100_000
STRINGS = [
    *("", " ", "\x00", "a\x00b", "\x1b[31m\x1b[2J", "\u202eevil", "\x9b1m", "é" * 50, "x" * 100_000, "a\nb", "a\rb", "\ud800"),
    *("../../etc/passwd", "/dev/zero", "/dev/full", "model.safetensors", ".", "~", "hf/x", "timm/x", "https://127.0.0.1:9/x"),
    *("nan", "inf", "017", "1:30", "0x10", "1_0", "1e400", "١٢", "no", "null", "float32", "%s%n", "{}", "[red]x[/red]"),
]
NUMBERS: list[Any] = [
    *(0, -1, 1, 2, 10**6, 10**8, 2 * 10**9, 2**31, 2**63, -(2**63), 10**20, 10**30, 10**400),
    *(0.5, -0.5, 1e-300, 1e300, 1e308, -1e308, float("nan"), float("inf"), float("-inf")),
]
OTHERS: list[Any] = [True, False, None, [], {}, [1], [[[]]], {"a": 1}, [None], DEEP, [0] * 1000, dict.fromkeys("abcdefgh", 0)]
BAD_VALUES = [*STRINGS, *NUMBERS, *OTHERS]
SNIPPETS = [
    *(
        b"!!python/object/apply:os.system [id]",
        b"&a [*a]",
        b"<<: *x",
        b"? [1, 2]\n: 3",
        b"---\n",
        b"%YAML 9.9\n",
        b"a: 1\na: 1\n",
    ),
    *(b"017", b"1:30", b"0x1F", b"1_000", b"2024-01-01", b"!!binary aGk=", b".nan", b"-.inf", b"[" * 5000, b"{a: " * 2000),
    *(b"\t", b"\x00", b"\x1b[31m", b"\xff\xfe", b"\xef\xbb\xbf", b"'", b'"', b"\r"),
]


def damage_bytes(content: bytes, draw: Random) -> bytes:
    """Flip, zero, cut, insert, repeat or swap bytes of a file, once or a few times."""
    for _ in range(draw.choice([1, 1, 1, 2, 5])):
        content = draw.choice(_BYTE_DAMAGES)(content, draw)
    return content


def _span(content: bytes, draw: Random) -> tuple[int, int]:
    """Draw a stretch of the content: near the front more often, where headers are."""
    start = draw.randrange(min(len(content), draw.choice([16, 512, len(content) or 1])) or 1)
    return start, min(start + draw.choice([1, 2, 8, 64, 1024, len(content)]), len(content))


def _flip(content: bytes, draw: Random) -> bytes:
    changed = bytearray(content)
    for _ in range(draw.choice([1, 1, 4, 32])):
        if changed:
            changed[_span(content, draw)[0]] ^= 1 << draw.randrange(8)
    return bytes(changed)


def _zero(content: bytes, draw: Random) -> bytes:
    start, stop = _span(content, draw)
    return content[:start] + draw.choice([b"\x00", b"\xff"]) * (stop - start) + content[stop:]


def _cut(content: bytes, draw: Random) -> bytes:
    return content[: draw.randrange(len(content) + 1)]


def _insert(content: bytes, draw: Random) -> bytes:
    start, _ = _span(content, draw)
    return content[:start] + draw.choice([draw.randbytes(draw.choice([1, 8, 300])), draw.choice(SNIPPETS)]) + content[start:]


def _repeat(content: bytes, draw: Random) -> bytes:
    start, stop = _span(content, draw)
    return content[:stop] + content[start:stop] * draw.choice([1, 1, 5]) + content[stop:]


def _swap(content: bytes, draw: Random) -> bytes:
    one, two = sorted((_span(content, draw), _span(content, draw)))
    if one[1] > two[0]:
        return content[::-1]
    return content[: one[0]] + content[two[0] : two[1]] + content[one[1] : two[0]] + content[one[0] : one[1]] + content[two[1] :]


def _remove(content: bytes, draw: Random) -> bytes:
    start, stop = _span(content, draw)
    return content[:start] + content[stop:]


_BYTE_DAMAGES = [_flip, _flip, _zero, _cut, _insert, _repeat, _swap, _remove]


def damage_value(value: Any, draw: Random) -> Any:
    """Return a copy of a JSON value in which one thing, or a few, is another, missing, renamed, there twice, or nested deep."""
    value = copy.deepcopy(value)
    for _ in range(draw.choice([1, 1, 1, 2, 4])):
        places = list(_places(value))
        if not places:
            return draw.choice(BAD_VALUES)
        holder, key = draw.choice(places)
        _damage_at(holder, key, draw)
    return value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Give every container with every key or index in it, at any depth."""
    if isinstance(value, dict | list):
        for key, item in list(value.items() if isinstance(value, dict) else enumerate(value)):
            yield value, key
            yield from _places(item)


def _damage_at(holder: Any, key: Any, draw: Random) -> None:
    old = holder[key]
    kind = draw.choice(["value", "value", "value", "remove", "rename", "twice", "number", "wrap", "grow"])
    if kind == "remove":
        del holder[key]
    elif kind == "rename" and isinstance(holder, dict):
        holder[draw.choice([f"{key}x", str(key).upper(), *STRINGS])] = holder.pop(key)
    elif kind == "twice" and isinstance(holder, dict):
        holder[f"{key}{TWICE}"] = draw.choice([old, draw.choice(BAD_VALUES)])
    elif kind == "number" and isinstance(old, int | float) and not isinstance(old, bool):
        holder[key] = draw.choice([-old, old + 1, old - 1, old * 2, old + 0.5, str(old), bool(old), old * 10**6, [old]])
    elif kind == "wrap":
        holder[key] = draw.choice([[old], {"x": old}])
    elif kind == "grow" and isinstance(old, list):
        holder[key] = draw.choice([old + old, old[:-1], old * 1000 if len(old) < 100 else old[::-1]])
    else:
        holder[key] = draw.choice(BAD_VALUES)


def as_text(value: Any) -> bytes:
    """Return a damaged value as JSON, with the keys that stand twice and the deep nesting that it asks for."""
    text = json.dumps(value).replace(json.dumps(TWICE)[1:-1], "")
    return text.replace(json.dumps(DEEP), "[" * DEEP_LEVELS + "]" * DEEP_LEVELS).encode()


def damage_json(content: bytes, draw: Random) -> bytes:
    """Damage a JSON file: its bytes, or its values."""
    if draw.random() < 0.3:
        return damage_bytes(content, draw)
    return as_text(damage_value(json.loads(content), draw))


def damage_config(content: bytes, draw: Random) -> bytes:
    """Damage a library's own JSON file, or let it name code that lies beside it."""
    if draw.random() < 0.7:
        return damage_json(content, draw)
    names = ("AutoConfig", "AutoTokenizer", "AutoModel", "AutoModelForSequenceClassification")
    value = json.loads(content) | {"auto_map": dict.fromkeys(names, draw.choice(["canary.Config", ["canary.Config"] * 2]))}
    if draw.random() < 0.7:
        value |= {"model_type": "canary", "tokenizer_class": "Config"}
    return as_text(value)


def damage_lines(content: bytes, draw: Random) -> bytes:
    """Damage a file of JSON lines, or of any lines: a line's values, lines swapped, dropped, run together; or bytes."""
    lines = content.splitlines(keepends=True)
    kind = draw.choice(["bytes", "value", "value", "drop", "swap", "join", "repeat"])
    if kind == "bytes" or not lines:
        return damage_bytes(content, draw)
    number = draw.randrange(len(lines))
    if kind == "value":
        try:
            lines[number] = as_text(damage_value(json.loads(lines[number]), draw)) + b"\n"
        except ValueError:
            lines[number] = damage_bytes(lines[number], draw)
    elif kind == "drop":
        del lines[number]
    elif kind == "swap":
        other = draw.randrange(len(lines))
        lines[number], lines[other] = lines[other], lines[number]
    elif kind == "join":
        lines[number] = lines[number].rstrip(b"\n")
    else:
        lines.insert(number, lines[number])
    return b"".join(lines)


def damage_recipe(content: bytes, draw: Random) -> bytes:
    """Damage a recipe: its bytes, its values (JSON is YAML), or a line of it replaced by something that only YAML has."""
    import yaml

    kind = draw.choice(["bytes", "value", "value", "value", "snippet"])
    if kind == "bytes":
        return damage_bytes(content, draw)
    if kind == "value":
        return as_text(damage_value(yaml.safe_load(content), draw))
    lines = content.splitlines(keepends=True)
    number = draw.randrange(len(lines))
    lines[number] = draw.choice([b"", b"", lines[number].rstrip(b"\n").split(b":")[0] + b": "]) + draw.choice(SNIPPETS) + b"\n"
    return b"".join(lines)


def open_tensors(content: bytes) -> tuple[dict[str, Any], bytes]:
    """Return the header and the data of a .safetensors file."""
    (size,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def close_tensors(header: bytes, data: bytes) -> bytes:
    """Return a .safetensors file of a header, as text, and data."""
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + data


def damage_tensors(content: bytes, draw: Random) -> bytes:
    """Damage a .safetensors file: its bytes, its header, eectl's JSON in it, or single numbers of its tensors."""
    kind = draw.choice(["bytes", "header", "metadata", "metadata", "data"])
    if kind == "bytes":
        return damage_bytes(content, draw)
    header, data = open_tensors(content)
    if kind == "data" and data:
        return content[: -len(data)] + damage_bytes(data, draw)
    if kind == "metadata" and METADATA_KEY in header.get("__metadata__", {}):
        own = json.loads(header["__metadata__"][METADATA_KEY])
        header["__metadata__"][METADATA_KEY] = as_text(damage_value(own, draw)).decode()
        return close_tensors(json.dumps(header).encode(), data)
    return close_tensors(as_text(damage_value(header, draw)), data)


def damage_table(content: bytes, draw: Random) -> bytes:
    """Damage a CSV or TSV file: its bytes, its lines, or a cell."""
    if draw.random() < 0.5:
        return damage_lines(content, draw)
    lines = content.splitlines(keepends=True)
    number = draw.choice([0, draw.randrange(len(lines))])
    mark = b"\t" if b"\t" in lines[number] else b","
    cells = lines[number].rstrip(b"\r\n").split(mark)
    cells[draw.randrange(len(cells))] = str(draw.choice(BAD_VALUES)).encode("utf-8", "surrogatepass")
    lines[number] = mark.join(cells) + b"\n"
    return b"".join(lines)


def damage_image(content: bytes, draw: Random) -> bytes:
    """Replace an image by one of another kind (size, mode, format, lying dimensions), whole or damaged."""
    made = draw.choice([content, *(make() for make in IMAGES)])
    return made if draw.random() < 0.3 else damage_bytes(made, draw)


def _image(mode: str, size: tuple[int, int], form: str, **options: Any) -> bytes:
    from PIL import Image

    stream = io.BytesIO()
    Image.new(mode, size, options.pop("colour", 0)).save(stream, form, **options)
    return stream.getvalue()


def _huge_png() -> bytes:
    """Return a PNG that says that it is 60,000 by 60,000 and holds next to nothing."""
    import zlib

    whole = bytearray(_image("L", (1, 1), "PNG"))
    whole[16:24] = struct.pack(">II", 60_000, 60_000)
    whole[29:33] = struct.pack(">I", zlib.crc32(bytes(whole[12:29])))
    return bytes(whole)


def _turned_jpeg() -> bytes:
    from PIL import Image

    tags = Image.Exif()
    tags[0x0112] = 6
    return _image("RGB", (9, 7), "JPEG", exif=tags)


def _moving_gif() -> bytes:
    from PIL import Image

    frames = [Image.new("P", (8, 8), number) for number in range(3)]
    return _image("P", (8, 8), "GIF", save_all=True, append_images=frames)


IMAGES: list[Callable[[], bytes]] = [
    lambda: _image("RGBA", (8, 8), "PNG", colour=(1, 2, 3, 0)),
    lambda: _image("LA", (8, 8), "PNG"),
    lambda: _image("P", (8, 8), "PNG", transparency=0),
    lambda: _image("I;16", (8, 8), "PNG"),
    lambda: _image("1", (8, 8), "PNG"),
    lambda: _image("F", (8, 8), "TIFF"),
    lambda: _image("CMYK", (8, 8), "JPEG"),
    lambda: _image("RGB", (1, 1), "BMP"),
    lambda: _image("RGB", (8, 8), "WEBP"),
    lambda: _image("L", (8, 8), "PPM"),
    lambda: _image("L", (3000, 1), "PNG"),
    lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n(/etc/passwd) (r) file\n",
    lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    lambda: b"",
    _huge_png,
    _turned_jpeg,
    _moving_gif,
]


BLOCK = 512  # bytes of a tar archive's header
HEADER_FIELDS = {"name": (0, 100), "size": (124, 136), "type": (156, 157), "link": (157, 257), "prefix": (345, 500)}
SIZES = [
    b"\x80" + (2**62).to_bytes(11, "big"),
    b"\xff" * 12,
    b"77777777777\x00",
    b"00000000000\x00",
    b"-0000000001\x00",
    b"1_0         ",
]
NAMES = [b"/etc/passwd", b"../../up.png", b"", b"a" * 100, b"\x1b[31m.png", b"\xff\xfe.png", b"00.PNG", b"00.pyd", b".", b"d/"]


def damage_shard(content: bytes, draw: Random) -> bytes:
    """Change a member's name, size or type and mend its header's checksum, or damage the bytes of the archive."""
    if draw.random() < 0.4:
        return damage_bytes(content, draw)
    changed = bytearray(content)
    starts = [start for start in range(0, len(content), BLOCK) if content[start + 257 : start + 262] == b"ustar"]
    for start in draw.sample(starts, min(len(starts), draw.choice([1, 1, 2]))):
        field = draw.choice([*HEADER_FIELDS])
        first, last = HEADER_FIELDS[field]
        new = (
            draw.choice(SIZES)
            if field == "size"
            else draw.choice(b"01234567gxLKSV").to_bytes()
            if field == "type"
            else draw.choice(NAMES)
        )
        changed[start + first : start + last] = new.ljust(last - first, b"\x00")
        changed[start + 148 : start + 156] = b" " * 8
        changed[start + 148 : start + 156] = b"%06o\x00 " % sum(changed[start : start + BLOCK])
    return bytes(changed)


def damage_option(content: bytes, draw: Random) -> bytes:
    """Replace the value of an option, or damage it."""
    if draw.random() < 0.5:
        return damage_bytes(content, draw).replace(b"\x00", b"0")  # no argument of a program can hold NUL
    return (
        str(draw.choice([*STRINGS, *NUMBERS, "[" * 3000, "1," * 3000, "{a: 1}", "[1, 2"]))
        .replace("\x00", "0")
        .encode("utf-8", "surrogatepass")
    )


def damage_setting(content: bytes, draw: Random) -> bytes:
    """Replace the value of KEY=VALUE, or a part of it, by another value, or damage the text."""
    import yaml

    if draw.random() < 0.3:
        return damage_option(content, draw)
    key, value = content.split(b"=", 1)
    return key + b"=" + as_text(damage_value(yaml.safe_load(value), draw))
