"""Token-weighted cross-entropy with z-loss (training_and_evaluation.md 2).

Logits exist for CHUNK positions at a time, and never again: their gradients are computed together with the loss, chunk
by chunk, so that 36k positions and a vocabulary of 152k never meet in one matrix.

Shape legend: N positions, K positions of positive weight, c of a chunk, W width, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

CHUNK = 2048
"""Positions whose logits exist at the same time."""


class LossParts(NamedTuple):
    """Weighted sums, not yet divided by the weights' sum."""

    total: Tensor
    """Sum of w * (CE + z).  This is what is differentiated; the others are detached."""
    cross_entropy: Tensor
    """Sum of w * CE."""
    z: Tensor
    """Sum of w * coefficient * logsumexp(logits)^2."""
    places: Tensor
    """int64 [K] positions of positive weight."""
    token_losses: Tensor
    """float32 [K] unweighted CE at `places`: to be logged, by task."""


def weighted_loss(
    hidden: Tensor, head_weight: Tensor, target_ids: Tensor, weights: Tensor, z_coefficient: float
) -> LossParts:
    """Sum of weighted losses; logits are computed only where the weight is positive.

    Products are in autocast's dtype if it is on, else in the arguments'; logits, their losses and the sum of the head's
    gradient over chunks are float32 (float64 if the arguments are).  The gradient of an argument that needs none is
    not computed.  `total` can be differentiated once.

    Args:
        hidden: [N, W] after the final norm.
        head_weight: [V, W].
        target_ids: int64 [N].
        weights: float [N], 0 = ignored.
    """
    places = (weights > 0).nonzero()[:, 0]
    device = hidden.device.type
    dtype = torch.promote_types(hidden.dtype, head_weight.dtype)
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    with torch.autocast(device, enabled=False):
        total, cross_entropy, z, token_losses = _WeightedLoss.apply(  # type: ignore[no-untyped-call]
            hidden,
            head_weight,
            places,
            target_ids[places],
            weights[places],
            z_coefficient,
            dtype,
            torch.is_grad_enabled(),
        )
    return LossParts(total, cross_entropy, z, places, token_losses)


class _WeightedLoss(torch.autograd.Function):
    """Computes gradients in forward, since the logits are there then; backward scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head_weight: Tensor,
        places: Tensor,
        targets: Tensor,
        weights: Tensor,
        z_coefficient: float,
        dtype: torch.dtype,
        with_gradients: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        exact = torch.promote_types(dtype, torch.float32)
        head = head_weight.to(dtype)
        weights = weights.to(exact)
        losses, squares = (torch.empty_like(weights) for _ in range(2))
        for_hidden, for_head = (needed and with_gradients for needed in ctx.needs_input_grad[:2])
        hidden_gradient = hidden.new_empty(len(places) if for_hidden else 0, hidden.shape[1], dtype=dtype)
        head_gradient = torch.zeros_like(head_weight, dtype=exact) if for_head else None
        for start in range(0, len(places), CHUNK):
            chunk = slice(start, start + CHUNK)
            states = hidden[places[chunk]].to(dtype)
            logits = (states @ head.T).to(exact)
            normalizer = logits.logsumexp(dim=-1, keepdim=True)
            target, weight = targets[chunk, None], weights[chunk, None]
            losses[chunk] = (normalizer - logits.gather(1, target))[:, 0]
            squares[chunk] = normalizer[:, 0].square()
            if not for_hidden and not for_head:
                continue
            # d/dlogits of w * (CE + c * lse^2) is w * ((1 + 2 * c * lse) * softmax - onehot): in place of the logits.
            logits.sub_(normalizer).exp_().mul_(weight * (1 + 2 * z_coefficient * normalizer))
            gradient = logits.scatter_add_(1, target, -weight).to(dtype)
            if for_hidden:
                torch.mm(gradient, head, out=hidden_gradient[chunk])
            if head_gradient is not None:
                _add_product(head_gradient, gradient.T, states)
        cross_entropy, z = (weights * losses).sum(), z_coefficient * (weights * squares).sum()
        ctx.save_for_backward(places, hidden_gradient, head_gradient)
        ctx.hidden_shape, ctx.dtypes = hidden.shape, (hidden.dtype, head_weight.dtype)
        ctx.mark_non_differentiable(cross_entropy, z, losses)
        return cross_entropy + z, cross_entropy, z, losses

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        places, hidden_gradient, head_gradient = ctx.saved_tensors
        scale = gradients[0]
        hidden_dtype, head_dtype = ctx.dtypes
        of_hidden, of_head = None, None
        if ctx.needs_input_grad[0]:
            of_hidden = hidden_gradient.new_zeros(ctx.hidden_shape, dtype=hidden_dtype)
            of_hidden[places] = hidden_gradient.to(hidden_dtype) * scale
        if head_gradient is not None:
            # In place: a second matrix of the head's size would come on top of everything that backward still needs.
            of_head = head_gradient.mul_(scale).to(head_dtype)
        return of_hidden, of_head, *(None,) * 6


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, where `total` may be of a wider dtype, which torch's own addmm does not take."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total.add_(left @ right)
