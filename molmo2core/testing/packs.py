"""Random packed sequences, as far as attention sees them."""

from __future__ import annotations

import numpy as np
import torch

from molmo2core.examples import DOCUMENT, PADDING, ROOT
from molmo2core.model.attention import AttentionMask


def random_pack(
    rng: np.random.Generator, *, max_tokens: int, padding: bool = True, plain: bool = False
) -> AttentionMask:
    """One row of documents with a root and branches, lengths from one token to most of the row.

    Args:
        padding: whether padding may stand before, between and after documents.
        plain: documents of a root and one branch, without visual tokens.
    """
    ids: list[int] = []
    visual: list[bool] = []
    length = int(rng.integers(max(max_tokens // 2, 1), max_tokens + 1))
    document = 0
    while len(ids) < length:
        if padding and rng.random() < 0.2:
            run = int(rng.integers(1, 30))
            ids += [PADDING] * run
            visual += [False] * run
        root = int(length * rng.random() ** 3) + 1
        branches = 1 if plain else int(rng.integers(1, 5))
        density, in_branches = (0.0, 0.0) if plain else (rng.choice([0.0, 0.3, 0.95]), 0.02)
        parts = [(ROOT, root, density)]
        parts += [(branch, int(length * rng.random() ** 4) + 1, in_branches) for branch in range(branches)]
        for subsegment, run, share in parts:
            ids += [document * DOCUMENT + subsegment] * run
            visual += (rng.random(run) < share).tolist()
        document += int(rng.integers(1, 3))
    flags = np.array(visual[:length]) & (np.array(ids[:length]) != PADDING)
    return AttentionMask(torch.tensor(ids[:length])[None], torch.from_numpy(flags)[None])
