"""Keys and values of tokens already seen, and the attention of new tokens to them.

Shape legend: B rows, T prompt tokens of all rows, C slots of a row, G key/value heads, R query heads per key/value
head, h head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


class KeyValueCache:
    """One [B, G, C, h] of keys and one of values per layer, head by head, so that a head's keys lie in one stretch.

    A row holds what its new tokens may attend to and nothing else.  All prompts end at the same slot, whatever their
    lengths, so that every row writes a new token into the same next slot: one slice, no index.

    Life of a cache: each layer calls `fill` during the prefill and `attend` in each later step; after each of these
    passes `advance` moves on.  `drop` removes a row that needs no more tokens.
    """

    def __init__(self, lengths: Sequence[int], is_seen: Tensor, max_new_tokens: int) -> None:
        """For prompts that the prefill computes one behind the other, without padding.

        Args:
            lengths: tokens of each prompt, T in total.
            is_seen: bool [T] on the model's device, whether the new tokens of a token's row may attend to it; the
                last token of each prompt always is.
            max_new_tokens: most tokens that a row will add.
        """
        seen = [int(part.sum()) for part in is_seen.cpu().split(list(lengths))]
        longest = max(seen)
        self.num_rows = len(seen)
        self.num_slots = 0
        """Slots written so far; 0 before the prefill."""
        self.computes_row_by_row = is_seen.device.type == "cpu"
        self._prompt_slots = longest
        self._capacity = longest + max_new_tokens
        self._first_slots = [longest - count for count in seen]
        self._tokens = is_seen.nonzero()[:, 0]
        counts = torch.tensor(seen, device=is_seen.device)
        self._rows = torch.repeat_interleave(counts, output_size=sum(seen))
        self._slots = torch.arange(sum(seen), device=is_seen.device) + (longest - counts.cumsum(0))[self._rows]
        self._bias = _bias(self._first_slots, self._capacity).to(is_seen.device) if min(seen) < longest else None
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []

    def fill(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Write the prompts' keys and values, [1, T, G, h] each; layers come in order."""
        assert len(self._keys) == layer
        for filled, new in ((self._keys, keys), (self._values, values)):
            # Zeros, not empty: a slot before a short prompt has weight 0, but 0 times a leftover NaN is NaN.
            slots = new.new_zeros(self.num_rows, new.shape[2], self._capacity, new.shape[3])
            slots[self._rows, :, self._slots] = new[0, self._tokens]
            filled.append(slots)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Write one token per row and let it attend to its row, itself included.

        Query heads that share a key head are passed as a sequence of R queries, so keys are neither repeated nor
        read more than once.

        Args:
            query: [B, 1, G * R, h].
            key, value: [B, 1, G, h].

        Returns:
            [B, 1, G * R, h]
        """
        stop = self.num_slots + 1
        keys, values = (filled[layer][: self.num_rows, :, :stop] for filled in (self._keys, self._values))
        keys[:, :, -1] = key[:, 0]
        values[:, :, -1] = value[:, 0]
        grouped = query[:, 0].unflatten(1, (key.shape[2], -1))
        if self.computes_row_by_row:
            attended = attend_row_by_row(grouped, keys, values, self._first_slots)
        else:
            bias = None if self._bias is None else self._bias[: self.num_rows, :stop]
            attended = attend_together(grouped, keys, values, bias)
        return attended.flatten(1, 2)[:, None]

    def advance(self) -> None:
        """All layers have written: the prompts, or one more token."""
        self.num_slots = self.num_slots + 1 if self.num_slots else self._prompt_slots

    def drop(self, row: int) -> None:
        """Forget `row`; the last row takes its place, which costs one row's copy whatever the number of rows."""
        self._first_slots[row] = self._first_slots[-1]
        self._first_slots.pop()
        self.num_rows -= 1
        if row == self.num_rows:
            return
        for slots in (*self._keys, *self._values):
            slots[row, :, : self.num_slots] = slots[self.num_rows, :, : self.num_slots]
        if self._bias is not None:
            self._bias[row] = self._bias[self.num_rows]


def attend_together(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
    """All rows in one call: for devices that want few, large kernels.

    Args:
        query: [B, G, R, h].
        keys, values: [B, G, C, h].
        bias: [B, C], or None where every row is full.

    Returns:
        [B, G, R, h]
    """
    mask = None if bias is None else bias[:, None, None].to(query.dtype)
    return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)


def attend_row_by_row(query: Tensor, keys: Tensor, values: Tensor, first_slots: Sequence[int]) -> Tensor:
    """Each row over its own slots: for a CPU, which so reads nothing of the slots before a short prompt.

    In float32 with plain products: the fused kernel multiplies few queries by keys slowly, while keys times queries
    runs through the keys as they lie in memory (torch 2.7, 2,048 slots: 1.3 times faster with 4 queries per key
    head, 1.7 times with one).  Half precision keeps the fused kernel, which sums in float32.

    Args:
        query: [B, G, R, h].
        keys, values: [B, G, C, h].
        first_slots: [B] slots of a row that are empty.

    Returns:
        [B, G, R, h]
    """
    stop = keys.shape[2]
    rows = [
        (key.narrow(1, first, stop - first), value.narrow(1, first, stop - first))
        for key, value, first in zip(keys.unbind(), values.unbind(), first_slots, strict=True)
    ]
    if query.dtype != torch.float32:
        return torch.stack([F.scaled_dot_product_attention(q, k, v) for q, (k, v) in zip(query, rows, strict=True)])
    columns = (query * query.shape[-1] ** -0.5).mT.unbind()
    return torch.stack([k.bmm(q).mT.softmax(dim=-1).bmm(v) for q, (k, v) in zip(columns, rows, strict=True)])


def _bias(first_slots: Sequence[int], capacity: int) -> Tensor:
    """[B, capacity]: -inf at the slots before a row's first, 0 elsewhere."""
    is_empty = torch.arange(capacity) < torch.tensor(first_slots)[:, None]
    return torch.zeros(is_empty.shape).masked_fill_(is_empty, -torch.inf)
