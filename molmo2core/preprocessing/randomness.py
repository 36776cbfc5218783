"""The only source of randomness on the data path: counter-based, keyed by what is drawn."""

from __future__ import annotations

import hashlib

import numpy as np


def generator(*key: int | str) -> np.random.Generator:
    """Philox generator whose stream depends on `key` alone, not on process, order or earlier draws.

    Args:
        key: seed, dataset, uid, epoch and purpose of the draw.
    """
    plain = tuple(part if isinstance(part, str) else int(part) for part in key)  # numpy's integers print differently
    digest = hashlib.sha256(repr(plain).encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
