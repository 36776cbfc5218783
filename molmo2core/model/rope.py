"""Rotary position embedding, plain and YaRN (model.md 1.2, 2.4).

Shape legend: B batch, S sequence, h head dimension.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from molmo2core.model.config import YarnConfig


def correction_range(head_dim: int, theta: float, yarn: YarnConfig) -> tuple[float, float]:
    """The pairs, unrounded, that turn `beta_fast` and `beta_slow` times within the original context.

    Pairs before the first keep their frequency under YaRN, pairs after the second are divided by its factor.
    """

    def pair_that_turns(rotations: float) -> float:
        context = yarn.original_max_position_embeddings
        return head_dim * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    return pair_that_turns(yarn.beta_fast), pair_that_turns(yarn.beta_slow)


def inverse_frequencies(head_dim: int, theta: float, yarn: YarnConfig | None = None) -> Tensor:
    """Rotation per position of each of the h/2 pairs, float32 [h/2]; blended between the two ends under YaRN.

    In float32 from the start, as transformers computes it (DECISIONS D14): float64 rounded once is nearer to the
    formula, but at position 36,864 it turns a pair by up to 0.004 rad elsewhere.
    """
    plain = 1.0 / theta ** (torch.arange(0, head_dim, 2).float() / head_dim)
    if yarn is None:
        return plain
    fast, slow = correction_range(head_dim, theta, yarn)
    low, high = max(math.floor(fast), 0), min(math.ceil(slow), head_dim - 1)
    ramp = ((torch.arange(head_dim // 2).float() - low) / max(high - low, 1e-3)).clamp(0, 1)
    return ramp * plain / yarn.factor + (1 - ramp) * plain


def rotary_table(
    position_ids: Tensor, head_dim: int, theta: float, yarn: YarnConfig | None = None
) -> tuple[Tensor, Tensor]:
    """Cosines and sines, float32 [B, S, 1, h] each, scaled by YaRN's attention factor."""
    frequencies = inverse_frequencies(head_dim, theta, yarn).to(position_ids.device)
    angles = position_ids[..., None].float() * frequencies
    angles = torch.cat([angles, angles], dim=-1)[:, :, None]
    scale = yarn.attention_factor if yarn else 1.0
    return angles.cos() * scale, angles.sin() * scale


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate queries or keys [B, S, heads, h] by their positions; the halves of h form the pairs."""
    cosines, sines = (part.to(x.dtype) for part in table)
    first, second = x.chunk(2, dim=-1)
    return x * cosines + torch.cat([-second, first], dim=-1) * sines
