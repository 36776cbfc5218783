"""Rotary position embedding, plain and YaRN (model.md 1.2, 2.4).

Shape legend: B batch, S sequence, h head dimension.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from molmo2core.model.config import YarnConfig


def inverse_frequencies(head_dim: int, theta: float, yarn: YarnConfig | None = None) -> Tensor:
    """Rotation per position of each of the h/2 pairs, float32 [h/2]; blended between the two ends under YaRN."""
    pair = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    plain = theta**-pair
    if yarn is None:
        return plain.float()

    def pair_that_turns(rotations: float) -> float:
        context = yarn.original_max_position_embeddings
        return head_dim * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_that_turns(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(yarn.beta_slow)), head_dim - 1)
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float64) - low) / max(high - low, 1e-3)).clamp(0, 1)
    return (ramp * plain / yarn.factor + (1 - ramp) * plain).float()


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
