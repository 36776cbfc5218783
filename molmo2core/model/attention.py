"""Who may attend to whom, in O(S) memory, and attention under it.

The rule is message_tree/attention_rule.py's.  A batch describes it by two numbers per token, document and branch in one
id and a visual flag, and never as S x S.  Three backends compute the same from that description:

    sdpa    torch's scaled_dot_product_attention, document by document; any device    attention_sdpa.py
    flex    FlexAttention with a block mask; CUDA                                     attention_flex.py
    flash   flash-attn's variable-length kernel, for what is plainly causal; CUDA     attention_flash.py

`auto` takes `sdpa` on a CPU; on CUDA `flash` where it is installed and the batch is plain causal text, else `flex`.
flash-attn knows no masks, so `flash` too leaves batches with images or several branches to `flex`.

Shape legend: B batch, S sequence, H query heads, G key/value heads, h head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from molmo2core.model import attention_flash, attention_flex, attention_sdpa
from molmo2core.model.attention_sdpa import KeptMasks, Span
from molmo2core.model.config import AttentionBackend


class VariableLengths(NamedTuple):
    """Documents one after the other, as flash-attn wants them."""

    offsets: Tensor
    """int32 [documents + 1], the first token of each document and the number of tokens."""
    longest: int


@dataclass(frozen=True)
class AttentionMask:
    """Description of a batch's attention rule.  What backends derive from it is kept, so all layers share it.

    Args:
        subsegment_ids: int64 [B, S]; document * DOCUMENT + (ROOT or branch), ascending documents and branches in a
            row; PADDING, which nobody sees, between documents.  What padding itself attends to is left to the backend.
        is_visual: bool [B, S].
    """

    subsegment_ids: Tensor
    is_visual: Tensor

    @cached_property
    def spans(self) -> tuple[Span, ...]:
        """Runs of one document, or of padding, in order of rows and tokens.  The one place that waits for a GPU."""
        return attention_sdpa.document_spans(self.subsegment_ids.cpu(), self.is_visual.cpu())

    @cached_property
    def is_plain_causal(self) -> bool:
        """Whether every document is plain text: a root and one branch at most, and no visual tokens that see ahead."""
        return all(span.is_plain_causal for span in self.spans)

    @cached_property
    def block_mask(self) -> BlockMask:
        """FlexAttention's block mask: bool [S / 128, S / 128] and ids, not S x S."""
        return attention_flex.block_mask(self.subsegment_ids, self.is_visual)

    @cached_property
    def variable_lengths(self) -> VariableLengths:
        """Bounds of all spans."""
        offsets = [0]
        for span in self.spans:
            offsets.append(offsets[-1] + span.length)
        device = self.subsegment_ids.device
        longest = max((span.length for span in self.spans), default=0)
        return VariableLengths(torch.tensor(offsets, dtype=torch.int32, device=device), longest)

    @cached_property
    def span_masks(self) -> KeptMasks:
        """What attention_sdpa keeps from one layer to the next."""
        return {}


def attend(
    queries: Tensor, keys: Tensor, values: Tensor, mask: AttentionMask, backend: AttentionBackend = "auto"
) -> Tensor:
    """Attention within each document under the rule.

    Args:
        queries: [B, S, H, h].
        keys, values: [B, S, G, h], G divides H; consecutive query heads share a key head.

    Returns:
        [B, S, H, h]; rows of padding are finite and mean nothing.
    """
    chosen = backend
    if chosen == "auto":
        chosen = "sdpa" if queries.device.type == "cpu" else "flash" if attention_flash.can_run(queries) else "flex"
    if chosen == "sdpa":
        return attention_sdpa.attend(queries, keys, values, mask.spans, mask.span_masks)
    if chosen == "flash" and mask.is_plain_causal:
        lengths = mask.variable_lengths
        return attention_flash.attend(
            queries, keys, values, offsets=lengths.offsets, longest=lengths.longest, causal=True
        )
    return attention_flex.attend(queries, keys, values, mask.block_mask)


def attend_within_rows(queries: Tensor, keys: Tensor, values: Tensor, backend: AttentionBackend = "auto") -> Tensor:
    """Every token attends to its whole row: the vision encoder, whose rows are crops.

    Args:
        queries, keys, values: [B, S, H, h].

    Returns:
        [B, S, H, h]
    """
    # FlexAttention has nothing to add without a mask: SDPA takes a fused kernel by itself.
    if backend == "flash" or (backend == "auto" and attention_flash.can_run(queries)):
        rows, length = queries.shape[:2]
        offsets = torch.arange(rows + 1, dtype=torch.int32, device=queries.device) * length
        return attention_flash.attend(queries, keys, values, offsets=offsets, longest=length, causal=False)
    query, key, value = (x.transpose(1, 2) for x in (queries, keys, values))
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2)
