"""Attention by torch's scaled_dot_product_attention, one document at a time: the backend that runs anywhere.

A plain causal document needs no mask.  Any other short document gets one small mask, which all layers share.  A long
one is cut into rows of queries, each with a mask over the keys that it can reach; those masks are made again in every
layer and in the backward pass, so that memory stays O(S).

Keys are never repeated for grouped heads: they are given to the kernel with a stride of 0.  `enable_gqa` would take
torch's unfused path on a CPU (torch 2.7: 3.5 times slower at 2,048 tokens, scores in memory).

Shape legend: B batch, S sequence, L length of a document, Q queries, K keys, H query heads, G key/value heads, h head
dimension.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from molmo2core.examples import DOCUMENT, PADDING

SHORT = 1024
"""Documents up to this many tokens are computed at once, and their masks kept."""
QUERY_ROWS = 512
"""Queries of a longer document that are computed at once."""


KeptMasks = dict[tuple[int, torch.dtype], Tensor]
"""Small masks [L, L] that all layers share, by number of the span."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Span:
    """One document of a row, or a run of padding."""

    row: int
    start: int
    stop: int
    is_padding: bool
    subsegment_ids: Tensor
    """[L] on the CPU."""
    is_visual: Tensor
    """[L] on the CPU."""
    is_plain_causal: bool
    """Whether the rule forbids nothing of the past and allows nothing ahead: one branch at most, and no two visual
    tokens that see each other."""

    @property
    def length(self) -> int:
        """Tokens."""
        return self.stop - self.start


def document_spans(subsegment_ids: Tensor, is_visual: Tensor) -> tuple[Span, ...]:
    """Runs of one document in each row; [B, S] tensors on the CPU."""
    spans: list[Span] = []
    documents = torch.div(subsegment_ids, DOCUMENT, rounding_mode="floor")
    for row in range(documents.shape[0]):
        start = 0
        for length in torch.unique_consecutive(documents[row], return_counts=True)[1].tolist():
            ids, visual = subsegment_ids[row, start : start + length], is_visual[row, start : start + length]
            spans.append(
                Span(
                    row=row,
                    start=start,
                    stop=start + length,
                    is_padding=int(ids[0]) == PADDING,
                    subsegment_ids=ids,
                    is_visual=visual,
                    is_plain_causal=bool((ids.diff() <= 0).all() and (ids[visual].diff() < 0).all()),
                )
            )
            start += length
    return tuple(spans)


def attend(queries: Tensor, keys: Tensor, values: Tensor, spans: Sequence[Span], masks: KeptMasks) -> Tensor:
    """Attention within each span.

    Args:
        queries: [B, S, H, h].
        keys, values: [B, S, G, h].
        spans: all tokens, in order.
        masks: kept from layer to layer; filled here.

    Returns:
        [B, S, H, h], 0 on padding.
    """
    batch, length, _, _ = queries.shape
    parts: list[Tensor] = []
    for number, span in enumerate(spans):
        query, key, value = (x[span.row, span.start : span.stop] for x in (queries, keys, values))
        if span.is_padding:
            parts.append(torch.zeros_like(query))
        elif span.is_plain_causal:
            parts.append(_sdpa(query, key, value, None))
        elif span.length <= SHORT:
            kept = (number, query.dtype)
            if kept not in masks:
                masks[kept] = _bias(span, 0, span.length, span.length, query)
            parts.append(_sdpa(query, key, value, masks[kept]))
        else:
            parts += _long_document(query, key, value, span)
    return torch.cat(parts).view(batch, length, *queries.shape[2:])


def _long_document(query: Tensor, key: Tensor, value: Tensor, span: Span) -> Iterator[Tensor]:
    visual = span.is_visual.nonzero()[:, 0]
    last_visual = int(visual[-1]) + 1 if visual.numel() else 0
    for start in range(0, span.length, QUERY_ROWS):
        stop = min(start + QUERY_ROWS, span.length)
        reach = max(stop, last_visual) if bool(span.is_visual[start:stop].any()) else stop
        rows = (query[start:stop], key[:reach], value[:reach], span, start, stop)
        if torch.is_grad_enabled():  # else autograd would keep every mask: S x S in the end
            yield checkpoint(_masked_rows, *rows, use_reentrant=False, preserve_rng_state=False)
        else:
            yield _masked_rows(*rows)


def _masked_rows(query: Tensor, key: Tensor, value: Tensor, span: Span, start: int, stop: int) -> Tensor:
    return _sdpa(query, key, value, _bias(span, start, stop, key.shape[0], query))


@torch.inference_mode(False)  # a mask that is first used in inference may be kept until training
def _bias(span: Span, start: int, stop: int, reach: int, like: Tensor) -> Tensor:
    """[stop - start, reach] 0 where a query may attend and -inf elsewhere (faster than bool in torch's CPU kernel)."""
    ids, visual = span.subsegment_ids.to(like.device), span.is_visual.to(like.device)
    position = torch.arange(reach, device=like.device)
    causal = position[None, :] <= position[start:stop, None]
    both_visual = visual[start:stop, None] & visual[None, :reach]
    allowed = (causal | both_visual) & (ids[start:stop, None] <= ids[None, :reach])
    return torch.zeros(allowed.shape, dtype=like.dtype, device=like.device).masked_fill_(~allowed, float("-inf"))


def _sdpa(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
    """[Q, H, h], [K, G, h] -> [Q, H, h]; causal without `bias`."""
    groups = key.shape[1]
    grouped = query.unflatten(1, (groups, -1)).permute(1, 2, 0, 3)  # [G, H/G, Q, h]
    shared_key, shared_value = (x.transpose(0, 1)[:, None].expand(-1, grouped.shape[1], -1, -1) for x in (key, value))
    attended = F.scaled_dot_product_attention(grouped, shared_key, shared_value, attn_mask=bias, is_causal=bias is None)
    return attended.permute(2, 0, 1, 3).flatten(1, 2)
