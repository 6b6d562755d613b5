"""Derive many seeds from one: each random draw has its own, which depends only on the run's seed and the purpose of the draw."""

import hashlib

from eectl.core.errors import EectlError
from eectl.core.numbers import whole_number

MOST_SEED = 2**32 - 1  # what every library takes


def derive_seed(seed: int, *purpose: object) -> int:
    """Return a 63-bit seed for one purpose, such as ("order", phase); other purposes get independent ones."""
    text = ":".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def check_seed(seed: object) -> int:
    """Return a seed that a caller gave; raises EectlError where it is no whole number from 0 to 2^32 - 1."""
    number = None if isinstance(seed, str) else whole_number(seed, least=0, most=MOST_SEED)
    if number is None:
        raise EectlError(f"seed is {seed!r:.60}; give a whole number from 0 to {MOST_SEED}")
    return number
