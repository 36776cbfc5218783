"""Cuts of a pack for ranks that share it: equal, contiguous parts of a sequence padded to a multiple of the ranks."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from molmo2core.examples import PADDING

_PADDING_VALUES = {
    "input_ids": 0,
    "target_ids": 0,
    "position_ids": 0,
    "subsegment_ids": PADDING,
    "loss_weights": 0.0,
    "is_visual": False,
}
"""Per-token arrays.  Nothing but its subsegment id marks padding: token 0 at position 0 with no target is harmless,
since padding is a document of its own."""


def pad_pack(pack: dict[str, torch.Tensor], multiple: int, at_least: int = 0) -> dict[str, torch.Tensor]:
    """`pack` with its sequence [S] padded on the right to `at_least` tokens and to a multiple of `multiple`."""
    length = pack["input_ids"].shape[0]
    missing = max(0, at_least - length)
    missing += -(length + missing) % multiple
    if not missing:
        return pack
    padded = {name: F.pad(pack[name], (0, missing), value=value) for name, value in _PADDING_VALUES.items()}
    return pack | padded


def shard_of(x: torch.Tensor, rank: int, size: int, dim: int = 0) -> torch.Tensor:
    """The `rank`-th of `size` equal parts of `x` along `dim`."""
    length = x.shape[dim] // size
    return x.narrow(dim, rank * length, length)
