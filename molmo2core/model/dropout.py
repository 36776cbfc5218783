"""Dropout whose masks follow from what is dropped, not from how much was drawn before.

Each element's bits are a hash of (seed, pack, position in the pack, branch, channel).  So masks are the same however
packs are split into microbatches and ranks, on each rank of a sequence that several share, in the second pass of
activation checkpointing and after a resumption; there is no random state to save (training_and_evaluation.md 1.6, 8.4).
A hash of a few integer operations, good enough for dropout (tests/property/test_dropout.py), not for anything else;
on a CPU it takes half the time of torch.bernoulli.

Shape legend: B batch, S sequence, W width.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

_LEVELS = 1 << 16
"""A probability is rounded to a multiple of 1 / _LEVELS: one hash of 32 bits serves two elements."""
_STREAM = 0x3C6EF372


@dataclass(frozen=True, kw_only=True)
class TokenDropout:
    """What is dropped where.  No tuple of tensors, or FSDP would round the probabilities to half precision."""

    probabilities: Tensor
    """float32 [B, S], 0 <= p < 1."""
    keys: Tensor
    """int32 [B, S], of `dropout_keys`."""

    def from_branch(self, first: int) -> TokenDropout:
        """Its branch 0 is this one's branch `first`: blocks then need no number, and all are one compiled program."""
        return TokenDropout(probabilities=self.probabilities, keys=self.keys + _shift(first))


def dropout_keys(seed: int, pack: int, length: int) -> Tensor:
    """int32 [length] keys of a pack's positions.

    Args:
        seed: of the training.
        pack: its number in the plan.
    """
    digest = hashlib.blake2b(f"{seed} {pack}".encode(), digest_size=4).digest()
    pack_key = int.from_bytes(digest, "little", signed=True)
    return _mixed(torch.arange(length, dtype=torch.int32) ^ pack_key)


def drop(x: Tensor, dropout: TokenDropout | None, branch: int) -> Tensor:
    """[B, S, W] with each element zero with its token's probability, and else divided by what is kept on average.

    Args:
        branch: number of this branch in the model; branches draw different masks.
    """
    if dropout is None:
        return x
    width = x.shape[-1]
    rows = _mixed(dropout.keys + _shift(branch + 1))
    bits = _mixed(rows[..., None] ^ _columns((width + 1) // 2, x.device))
    dropped = (dropout.probabilities * _LEVELS).round().clamp(max=_LEVELS - 1)[..., None]
    kept = bits.view(torch.int16)[..., :width] >= (dropped - _LEVELS // 2).to(torch.int16)
    scale = _LEVELS / (_LEVELS - dropped)
    return torch.where(kept, x * scale.to(x.dtype), 0)


def _shift(branches: int) -> int:
    """What sets keys of different branches apart; shifts add up, modulo 2 ** 32."""
    return (branches * _STREAM + (1 << 31)) % (1 << 32) - (1 << 31)


def _columns(count: int, device: torch.device) -> Tensor:
    """int32 [count], all different.

    Without overflow: compiled code computes with what `arange` gives in 64 bits, whatever its type.
    """
    x = torch.arange(1, count + 1, device=device) * 0x9E3779B1 & 0xFFFFFFFF
    x = (x ^ x >> 15) * 0x2C1B3C6D & 0xFFFFFFFF
    x = (x ^ x >> 12) * 0x297A2D39 & 0xFFFFFFFF
    return ((x ^ x >> 15) - (1 << 31)).to(torch.int32)


def _mixed(x: Tensor) -> Tensor:
    """int32 -> int32, one to one, each bit of the result depending on all of `x` (the constants are Wellons's)."""
    x = x ^ ((x >> 16) & 0xFFFF)  # torch shifts the sign in
    x.mul_(0x7FEB352D)
    x.bitwise_xor_((x >> 15).bitwise_and_(0x1FFFF))
    x.mul_(0x846CA68B - (1 << 32))
    return x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF))
