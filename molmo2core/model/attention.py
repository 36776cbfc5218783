"""Who may attend to whom, in O(S) memory, and attention under it on any device.

The rule is message_tree/attention_rule.py's; here it is described by two numbers per token and turned into a small
dense mask per packed example only, never into S x S (DECISIONS D3).

Shape legend: B batch, S sequence, H query heads, G key/value heads, h head dimension, L length of one document.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from molmo2core.examples import DOCUMENT


@dataclass(frozen=True)
class AttentionMask:
    """Description of a batch's attention rule.

    Args:
        subsegment_ids: int64 [B, S]; document * DOCUMENT + (ROOT or branch); PADDING for padding tokens, which form
            a document of their own, so that no row of attention is empty.
        is_visual: bool [B, S].
    """

    subsegment_ids: Tensor
    is_visual: Tensor

    @cached_property
    def documents(self) -> tuple[tuple[int, int, int, Tensor | None], ...]:
        """Each run of one document: (row, start, stop, mask), mask bool [L, L] or None where it is plain causal."""
        runs: list[tuple[int, int, int, Tensor | None]] = []
        documents = torch.div(self.subsegment_ids, DOCUMENT, rounding_mode="floor")
        for row in range(documents.shape[0]):
            lengths = torch.unique_consecutive(documents[row], return_counts=True)[1].tolist()
            start = 0
            for length in lengths:
                stop = start + length
                mask = _document_mask(self.subsegment_ids[row, start:stop], self.is_visual[row, start:stop])
                runs.append((row, start, stop, mask))
                start = stop
        return tuple(runs)


def attend(queries: Tensor, keys: Tensor, values: Tensor, mask: AttentionMask) -> Tensor:
    """Attention within each document under the rule.

    Args:
        queries: [B, S, H, h].
        keys, values: [B, S, G, h], G divides H; consecutive query heads share a key head.

    Returns:
        [B, S, H, h]
    """
    batch, length = queries.shape[:2]
    parts = [
        F.scaled_dot_product_attention(
            queries[row, start:stop].transpose(0, 1),
            keys[row, start:stop].transpose(0, 1),
            values[row, start:stop].transpose(0, 1),
            attn_mask=allowed,
            is_causal=allowed is None,
            enable_gqa=queries.shape[2] != keys.shape[2],
        ).transpose(0, 1)
        for row, start, stop, allowed in mask.documents
    ]
    return torch.cat(parts).view(batch, length, *queries.shape[2:])


def attend_to_cache(queries: Tensor, keys: Tensor, values: Tensor, num_keys: Tensor) -> Tensor:
    """Attention of one new token per row to the first `num_keys` [B] cached keys of its row.

    Args:
        queries: [B, 1, H, h].
        keys, values: [B, S, G, h].

    Returns:
        [B, 1, H, h]
    """
    allowed = torch.arange(keys.shape[1], device=keys.device) < num_keys[:, None]
    return F.scaled_dot_product_attention(
        queries.transpose(1, 2),
        keys.transpose(1, 2),
        values.transpose(1, 2),
        attn_mask=allowed[:, None, None],
        enable_gqa=queries.shape[2] != keys.shape[2],
    ).transpose(1, 2)


def _document_mask(subsegment_ids: Tensor, is_visual: Tensor) -> Tensor | None:
    if bool((subsegment_ids == subsegment_ids[0]).all()) and not bool(is_visual.any()):
        return None
    length = subsegment_ids.shape[0]
    causal = torch.ones(length, length, dtype=torch.bool, device=subsegment_ids.device).tril()
    both_visual = is_visual[:, None] & is_visual[None, :]
    return (causal | both_visual) & (subsegment_ids[:, None] <= subsegment_ids[None, :])
