"""Attention by torch's FlexAttention under a block mask: the backend for packed sequences on CUDA.

The block mask is worked out from the smallest and largest ids of every block of 128 tokens, (S / 128)^2 comparisons,
where torch's own `create_block_mask` evaluates the rule for all S^2 pairs (DECISIONS D3).

Shape legend: B batch, S sequence, N = S / 128 blocks, H query heads, G key/value heads, h head dimension.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from molmo2core.examples import DOCUMENT, PADDING

BLOCK = 128
_HIGHEST = torch.iinfo(torch.int32).max


def attend(queries: Tensor, keys: Tensor, values: Tensor, mask: BlockMask) -> Tensor:
    """Attention under `mask`.

    Args:
        queries: [B, S, H, h].
        keys, values: [B, S, G, h].

    Returns:
        [B, S, H, h]
    """
    kernel = _compiled() if queries.is_cuda else _uncompiled()
    query, key, value = (x.transpose(1, 2) for x in (queries, keys, values))
    attended: Tensor = kernel(query, key, value, block_mask=mask, enable_gqa=query.shape[1] != key.shape[1])
    return attended.transpose(1, 2)


@torch.inference_mode(False)  # a mask that is first used in inference may be kept until training
def block_mask(subsegment_ids: Tensor, is_visual: Tensor) -> BlockMask:
    """The rule of message_tree/attention_rule.py for int64 [B, S] ids and bool [B, S] flags; padding sees itself."""
    length = subsegment_ids.shape[1]
    ids = subsegment_ids.to(torch.int32)
    documents = torch.div(ids, DOCUMENT, rounding_mode="floor")

    def rule(batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        both_visual = is_visual[batch, query] & is_visual[batch, key]
        same_document = documents[batch, query] == documents[batch, key]
        allowed = (ids[batch, query] <= ids[batch, key]) & same_document & ((key <= query) | both_visual)
        return (allowed & (ids[batch, query] != PADDING)) | (key == query)

    some, every = classify_blocks(ids, is_visual)
    lengths: dict[str, Any] = {}
    if "seq_lengths" in inspect.signature(BlockMask.from_kv_blocks).parameters:  # torch 2.6 has not
        lengths["seq_lengths"] = (length, length)
    return BlockMask.from_kv_blocks(
        *_as_lists(some & ~every), *_as_lists(every), BLOCK_SIZE=BLOCK, mask_mod=rule, **lengths
    )


def classify_blocks(ids: Tensor, is_visual: Tensor) -> tuple[Tensor, Tensor]:
    """Which pairs of blocks matter.

    Args:
        ids: int32 [B, S] subsegment ids.
        is_visual: bool [B, S].

    Returns:
        Two bool [B, N, N], query blocks by key blocks: whether some pair of tokens may be allowed (never False
        where one is), and whether every pair is (never True where one is not).
    """
    missing = -ids.shape[1] % BLOCK
    ids = F.pad(ids, (0, missing), value=PADDING).unflatten(1, (-1, BLOCK))
    visual = F.pad(is_visual, (0, missing), value=False).unflatten(1, (-1, BLOCK))
    real = ids != PADDING
    low, high = _extremes(ids, real)
    low_visual, high_visual = _extremes(ids, real & visual)
    number = torch.arange(ids.shape[1], device=ids.device)
    before = number[None, :] < number[:, None]
    diagonal = number[None, :] == number[:, None]

    def same_document(low: Tensor, high: Tensor) -> Tensor:
        first, last = (torch.div(x, DOCUMENT, rounding_mode="floor") for x in (low, high))
        return (first[:, :, None] <= last[:, None, :]) & (first[:, None, :] <= last[:, :, None])

    causal = (before | diagonal) & (low[:, :, None] <= high[:, None, :]) & same_document(low, high)
    looking_ahead = (low_visual[:, :, None] <= high_visual[:, None, :]) & same_document(low_visual, high_visual)
    some = causal | looking_ahead | diagonal  # the diagonal: padding sees itself
    all_real, all_visual = real.all(-1), (real & visual).all(-1)
    one_document = torch.div(low, DOCUMENT, rounding_mode="floor") == torch.div(high, DOCUMENT, rounding_mode="floor")
    together = (
        _pairs(all_real & one_document)
        & same_document(low, high)
        & (high[:, :, None] <= low[:, None, :])
        & (before | _pairs(all_visual))
    )
    return some, together


def _extremes(ids: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest chosen id of each block; an empty block has a smallest above every largest."""
    return ids.masked_fill(~chosen, _HIGHEST).amin(-1), ids.masked_fill(~chosen, PADDING).amax(-1)


def _pairs(flags: Tensor) -> Tensor:
    return flags[:, :, None] & flags[:, None, :]


def _as_lists(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """bool [B, N, N] -> number of key blocks of each query block [B, 1, N], and those first [B, 1, N, N]; int32."""
    counts = blocks.sum(-1, dtype=torch.int32)
    order = blocks.to(torch.int8).argsort(dim=-1, descending=True, stable=True).to(torch.int32)
    return counts[:, None], order[:, None].contiguous()


@cache
def _compiled() -> Any:
    # Lengths make at most four graphs for each dtype with or without gradients, of torch's eight.  Beyond these it
    # would go on uncompiled, which holds all scores (174 GB for one layer of 36,864 tokens): `fullgraph` is an error.
    return torch.compile(flex_attention, fullgraph=True)


def _uncompiled() -> Any:
    """Holds all scores and ignores the blocks: for tests alone."""
    return flex_attention
