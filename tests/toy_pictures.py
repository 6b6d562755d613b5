"""Small pictures in the forms that data sets keep them in: bytes, tables of the datasets library, and shards."""

import io
import json
import tarfile

import numpy as np
from PIL import Image

CLASSES = ("red", "green", "blue")  # by their bright channel


def picture(number, channel, *, size=(20, 16)):
    """A noisy picture of Pillow's with one bright channel."""
    pixels = np.random.default_rng(number).integers(0, 60, (size[1], size[0], 3), dtype=np.uint8)
    pixels[:, :, channel] += 150
    return Image.fromarray(pixels)


def encoded(image, kind="PNG", **options):
    """The bytes of a picture's file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def add(archive, name, content, **fields):
    """Add a member to an open tar archive."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for key, value in fields.items():
        setattr(member, key, value)
    archive.addfile(member, io.BytesIO(content))


def write_shard(path, numbers, *, form=tarfile.GNU_FORMAT, as_json=False, folder=""):
    """A shard whose row `number` is of class number % 3."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as archive:
        for number in numbers:
            add(archive, f"{folder}{number:05}.png", encoded(picture(number, number % 3)))
            label = json.dumps({"kind": CLASSES[number % 3]}) if as_json else str(number % 3)
            add(archive, f"{folder}{number:05}.{'json' if as_json else 'cls'}", label.encode())
    return path


def write_shards(root, *, shards=4, rows=15):
    """Shards train-000.tar and on, numbered through, and test-000.tar with other pictures."""
    for shard in range(shards):
        write_shard(root / f"train-{shard:03}.tar", range(shard * rows, (shard + 1) * rows))
    write_shard(root / "test-000.tar", range(1000, 1012))
    return root
