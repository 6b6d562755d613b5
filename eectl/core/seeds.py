"""Derive many seeds from one: each random draw has its own, which depends only on the run's seed and the purpose of the draw."""

import hashlib


def derive_seed(seed: int, *purpose: object) -> int:
    """Return a 63-bit seed for one purpose, such as ("order", phase); other purposes get independent ones."""
    text = ":".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
