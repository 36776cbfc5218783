"""Token-weighted cross-entropy with z-loss (training_and_evaluation.md 2).

Shape legend: N positions, W width, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

CHUNK = 2048
"""Positions whose logits exist at the same time."""


class LossParts(NamedTuple):
    """Weighted sums, not yet divided by the weights' sum."""

    cross_entropy: Tensor
    """Sum of w * CE."""
    z: Tensor
    """Sum of w * coefficient * logsumexp(logits)^2."""
    places: Tensor
    """int64 [K] positions of positive weight."""
    token_losses: Tensor
    """float32 [K] unweighted CE at `places`, detached: to be logged, by task."""


def weighted_loss(
    hidden: Tensor, head_weight: Tensor, target_ids: Tensor, weights: Tensor, z_coefficient: float
) -> LossParts:
    """Sum of weighted losses; logits are computed only where the weight is positive.

    Args:
        hidden: [N, W] after the final norm.
        head_weight: [V, W].
        target_ids: int64 [N].
        weights: float [N], 0 = ignored.
    """
    places = (weights > 0).nonzero()[:, 0]
    cross_entropy = hidden.new_zeros((), dtype=torch.float32)
    z = torch.zeros_like(cross_entropy)
    token_losses = [cross_entropy.new_zeros(0)]
    for chunk in places.split(CHUNK):
        logits = (hidden[chunk] @ head_weight.T).float()
        weight = weights[chunk].float()
        normalizer = logits.logsumexp(dim=-1)
        targets = logits.gather(1, target_ids[chunk, None])[:, 0]
        token_losses.append((normalizer - targets).detach())
        cross_entropy = cross_entropy + (weight * (normalizer - targets)).sum()
        z = z + z_coefficient * (weight * normalizer.square()).sum()
    if not places.shape[0]:  # keeps every parameter in the graph, so that ranks without targets still reduce
        cross_entropy = cross_entropy + 0.0 * (hidden.sum() + head_weight.sum())
    return LossParts(cross_entropy, z, places, torch.cat(token_losses))
