"""Damage of what a file of eectl's says, under digests that are right: what an attacker writes who knows how eectl does it.

Only the schema of the file's kind can then refuse it.
"""

import json
from pathlib import Path
from random import Random

from hostile.mutators import METADATA_KEY, damage_value

from eectl.core.errors import EectlError
from eectl.core.json_files import DIGEST, json_text, sealed
from eectl.core.tensor_files import TENSORS, WEIGHTS, digest, read_any_tensors, write_tensors

UNWRITABLE = (EectlError, TypeError, ValueError, AttributeError, RecursionError)  # the damage cannot even be written


def seal_tensors(path: Path, draw: Random) -> bool:
    """Damage the JSON in a .safetensors file and write it as eectl would; returns whether that can be written at all."""
    tensors, metadata = read_any_tensors(path)
    said = damage_value(json.loads(metadata[METADATA_KEY]), draw)
    if draw.random() < 0.2 and tensors:
        del tensors[draw.choice(sorted(tensors))]
    try:
        if WEIGHTS in said:
            said[WEIGHTS] = digest(tensors)
        write_tensors(path, tensors, {key: item for key, item in said.items() if key != TENSORS})
    except UNWRITABLE:
        return False
    return True


def seal_json(path: Path, draw: Random) -> bool:
    """Damage a JSON file and write it as eectl would; returns whether that can be written at all."""
    try:
        path.write_text(json_text(sealed(damage_value(json.loads(path.read_text()), draw))))
    except UNWRITABLE:
        return False
    return True


def has_seal(path: Path) -> bool:
    """Return whether a file still says a digest of itself: without one it is taken for a file of an older eectl."""
    content = path.read_bytes()
    return any(key in content for key in (f'"{DIGEST}"'.encode(), f'\\"{DIGEST}\\"'.encode()))  # plain, and in a header
