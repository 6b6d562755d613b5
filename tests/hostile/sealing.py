"""Damage of what a file of eectl's says, under digests that are right: what an attacker writes who knows how eectl does it.

Only the schema of the file's kind can then refuse it.
"""

import json
from pathlib import Path
from random import Random

from hostile.mutators import METADATA_KEY, damage_value

from eectl.core import files
from eectl.core.errors import EectlError


def seal_tensors(path: Path, draw: Random) -> bool:
    """Damage the JSON in a .safetensors file and write it as eectl would; returns whether that can be written at all."""
    tensors, metadata = files.read_any_tensors(path)
    said = damage_value(json.loads(metadata[METADATA_KEY]), draw)
    if draw.random() < 0.2 and tensors:
        del tensors[draw.choice(sorted(tensors))]
    if isinstance(said, dict) and "weights" in said:
        said["weights"] = files.digest(tensors)
    try:
        files.write_tensors(path, tensors, said)
    except (EectlError, TypeError, ValueError, AttributeError, UnicodeError):
        return False
    return True


def seal_json(path: Path, draw: Random) -> bool:
    """Damage a JSON file and write it as eectl would; returns whether that can be written at all."""
    try:
        files.write_json(path, damage_value(json.loads(path.read_text()), draw))
    except (EectlError, TypeError, ValueError, AttributeError, UnicodeError):
        return False
    return True
