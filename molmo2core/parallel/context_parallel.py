"""Context parallelism: ranks of a group hold parts of one sequence and exchange heads around attention (Ulysses).

    embedding, vision   whole sequence, on every rank of the group (a later step shards the vision encoder)
    decoder stack       this rank's S/P tokens
      attention         all-to-all -> whole sequence, H/P heads -> attend -> all-to-all back -> S/P tokens, all heads
    final norm, loss    this rank's S/P tokens

The mask describes the whole sequence by two numbers per token and is the same on every rank.  Gradients need no
factor: each rank differentiates the loss of its own tokens, the exchange sends every gradient home, and summed over
the ranks they are the gradient of the whole (training_and_evaluation.md 3.6).

Shape legend: B batch, S sequence, P ranks of the group, H query heads, G key/value heads, h head dimension.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from molmo2core.errors import RecipeError
from molmo2core.model.attention import AttentionMask
from molmo2core.model.decoder import Attend, DecoderAttention, DecoderStack
from molmo2core.model.dropout import TokenDropout
from molmo2core.model.molmo2 import Molmo2
from molmo2core.parallel.batch_sharding import shard_of
from molmo2core.parallel.ranks import check_heads


def apply_context_parallel(model: Molmo2, group: dist.ProcessGroup) -> None:
    """Make `model` compute this rank's contiguous share of every sequence; `forward` then returns [B, S/P, W].

    S must be a multiple of P (batch_sharding.pad_pack).  For training only: there is no cache.
    """
    check_heads(model.config.decoder, group.size())

    def cut_inputs(stack: DecoderStack, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        x, position_ids, mask, token_dropout, *cache = inputs
        if x.shape[1] % group.size():
            raise RecipeError(
                "context parallel",
                found=f"a sequence of {x.shape[1]} tokens on {group.size()} ranks",
                expected="a length that is a multiple of the ranks",
            )
        rank, size = group.rank(), group.size()
        dropout = token_dropout and TokenDropout(
            probabilities=shard_of(token_dropout.probabilities, rank, size, dim=1),
            keys=shard_of(token_dropout.keys, rank, size, dim=1),
        )
        return (shard_of(x, rank, size, dim=1), shard_of(position_ids, rank, size, dim=1), mask, dropout, *cache)

    model.decoder.stack.register_forward_pre_hook(cut_inputs)
    for module in model.decoder.stack.modules():
        if isinstance(module, DecoderAttention):
            module.attend = _exchange_around(module.attend, group)


def _exchange_around(attend: Attend, group: dist.ProcessGroup) -> Attend:
    def exchange_and_attend(query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask) -> Tensor:
        size = group.size()
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
