"""The next token from its logits: the most likely one, or one drawn from a truncated distribution.

Shape legend: N rows, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor


def truncated_distribution(logits: Tensor, temperature: Tensor, top_p: Tensor) -> Tensor:
    """Probabilities after temperature and nucleus truncation, float64 [N, V].

    The nucleus is the smallest set of most likely tokens whose probability reaches `top_p`; it is never empty.  Of
    equally likely tokens at its edge those with the lower id are in.

    Args:
        logits: [N, V].
        temperature: [N], above 0.
        top_p: [N], above 0 and at most 1.
    """
    logits = logits.double()
    logits = logits - logits.amax(dim=-1, keepdim=True)  # so that a temperature next to 0 gives -inf, never NaN
    probabilities = (logits / temperature.double()[:, None]).softmax(dim=-1)
    ordered, ids = probabilities.sort(dim=-1, descending=True, stable=True)
    more_likely = ordered.cumsum(dim=-1) - ordered
    more_likely[:, 0] = 0  # the most likely token stays, whatever the rounding
    top_p = top_p.double()[:, None]
    ordered = ordered.where((more_likely < top_p) | (top_p == 1), 0)
    nucleus = torch.zeros_like(probabilities).scatter(1, ids, ordered)
    return nucleus / nucleus.sum(dim=-1, keepdim=True)


def draw(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Inverse of the cumulative distribution in order of token ids, int64 [N].

    Args:
        probabilities: float64 [N, V].
        uniform: float64 [N] in [0, 1).
    """
    cumulative = probabilities.cumsum(dim=-1)
    wanted = uniform[:, None] * cumulative[:, -1:]  # below the total also when rounded, since uniform <= 1 - 2^-53
    return torch.searchsorted(cumulative, wanted, right=True)[:, 0]
