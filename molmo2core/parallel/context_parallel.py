"""Context parallelism: ranks of a group hold parts of one sequence and exchange heads around attention (Ulysses).

    vision, connector   this rank's crops and the visual tokens in them, then one exchange (visual_sharding.py)
    embedding           this rank's S/P tokens
    decoder stack       this rank's S/P tokens
      attention         all-to-all -> whole sequence, H/P heads -> attend -> all-to-all back -> S/P tokens, all heads
    final norm, loss    this rank's S/P tokens

The model is given its part of everything but the mask, which describes the whole sequence by two numbers per token
and is the same on every rank (training/microbatch.py cuts).  Gradients need no factor: each rank differentiates the
loss of its own tokens, the exchanges send every gradient home, and summed over the ranks they are the gradient of the
whole (training_and_evaluation.md 3.6).

Shape legend: B batch, S sequence, P ranks of the group, H query heads, G key/value heads, h head dimension.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from molmo2core.errors import RecipeError
from molmo2core.model.attention import AttentionMask
from molmo2core.model.decoder import Attend, DecoderAttention
from molmo2core.model.molmo2 import Molmo2
from molmo2core.parallel.ranks import check_heads
from molmo2core.parallel.visual_sharding import exchange_visual


def apply_context_parallel(model: Molmo2, group: dist.ProcessGroup) -> None:
    """Make `model` attend over whole sequences of which each rank passes a contiguous part, [B, S/P, W] at a time.

    S must be a multiple of P (batch_sharding.pad_pack).  For training only: there is no cache.
    """
    check_heads(model.config.decoder, group.size())
    model.exchange = partial(exchange_visual, group=group)
    for module in model.decoder.stack.modules():
        if isinstance(module, DecoderAttention):
            module.attend = _exchange_around(module.attend, group)


def _exchange_around(attend: Attend, group: dist.ProcessGroup) -> Attend:
    def exchange_and_attend(query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask) -> Tensor:
        size = group.size()
        tokens, whole_length = query.shape[1] * size, mask.subsegment_ids.shape[1]
        if tokens != whole_length:
            raise RecipeError(
                "context parallel",
                found=f"{query.shape[1]} tokens on each of {size} ranks",
                expected=f"equal parts of the mask's sequence of {whole_length}",
                mend="pad the sequence to a multiple of the ranks",
            )
        repeats = max(1, size // key.shape[2])
        if repeats > 1:  # one copy of a key head per rank that needs it; autograd sums the copies' gradients
            key, value = (x.repeat_interleave(repeats, dim=2) for x in (key, value))
        heads = [query.shape[2] // size, key.shape[2] // size, key.shape[2] // size]
        # [B, S/P, H, h] -> [B, S/P, P, H/P, h]; q, k and v travel in one exchange.
        parts = torch.cat([x.unflatten(2, (size, -1)) for x in (query, key, value)], dim=3)
        whole: Tensor = _SequenceToHeads.apply(parts, group)  # type: ignore[no-untyped-call]
        query, key, value = whole.split(heads, dim=2)
        attended = attend(query, key, value, mask)
        back: Tensor = _HeadsToSequence.apply(attended, group)  # type: ignore[no-untyped-call]
        return back.flatten(2, 3)

    return exchange_and_attend


class _SequenceToHeads(torch.autograd.Function):
    """[B, S/P, P, heads, h] -> [B, S, heads, h]: gives away other ranks' heads, receives own heads of all tokens."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _gather_sequence(x, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _scatter_sequence(gradients[0], ctx.group), None


class _HeadsToSequence(torch.autograd.Function):
    """[B, S, heads, h] -> [B, S/P, P, heads, h], the inverse."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _scatter_sequence(x, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _gather_sequence(gradients[0], ctx.group), None


def _gather_sequence(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    sent = x.movedim(2, 0).contiguous()  # [P, B, S/P, heads, h], first axis: receiving rank
    received = torch.empty_like(sent)  # first axis: part of the sequence
    dist.all_to_all_single(received, sent, group=group)
    return received.movedim(0, 1).flatten(1, 2)


def _scatter_sequence(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    sent = x.unflatten(1, (group.size(), -1)).movedim(1, 0).contiguous()
    received = torch.empty_like(sent)  # first axis: heads of that rank
    dist.all_to_all_single(received, sent, group=group)
    return received.movedim(0, 2)
