"""The only source of randomness on the data path: counter-based, keyed by what is drawn."""

from __future__ import annotations

import hashlib

import numpy as np


def generator(*key: int | str) -> np.random.Generator:
    """Philox generator whose stream depends on `key` alone, not on process, order or earlier draws.

    Args:
        key: seed, dataset, uid, epoch and purpose of the draw.
    """
    digest = hashlib.sha256(repr(key).encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
