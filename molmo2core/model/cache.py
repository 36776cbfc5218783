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

    Prompts end at the same slot, whatever their lengths, so that all rows write a new token into the same next slot:
    one slice, no index.  Slots before a short prompt, and tokens that the last prompt token may not attend to (other
    branches), are hidden by one bias per row, made once.

    Life of a cache: each layer calls `fill` during the prefill and `attend` in each later step; after each of both
    passes `advance` moves on.  `drop` removes a row that needs no more tokens.
    """

    def __init__(self, lengths: Sequence[int], is_visible: Tensor, max_new_tokens: int) -> None:
        """Of prompts that the prefill sees one after another, without padding.

        Args:
            lengths: tokens of each prompt, T in total.
            is_visible: bool [T], whether the new tokens of the prompt's row may attend to this token.
            max_new_tokens: most tokens that a row will add.
        """
        device = is_visible.device
        self.num_rows = len(lengths)
        self.num_slots = 0
        """Slots written so far; 0 before the prefill."""
        self._longest = max(lengths)
        self._capacity = self._longest + max_new_tokens
        ends = torch.tensor(lengths, device=device).cumsum(0)
        self._rows = torch.repeat_interleave(torch.tensor(lengths, device=device), output_size=len(is_visible))
        self._slots = torch.arange(len(is_visible), device=device) + (self._longest - ends)[self._rows]
        self._bias: Tensor | None = None
        if min(lengths) < self._longest or not bool(is_visible.all()):
            self._bias = torch.full((self.num_rows, self._capacity), -torch.inf, device=device)
            self._bias[self._rows[is_visible], self._slots[is_visible]] = 0
            self._bias[:, self._longest :] = 0
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []

    def fill(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Write the prompts' keys and values, [1, T, G, h] each; layers come in order."""
        for filled, new in ((self._keys, keys), (self._values, values)):
            # Zeros, not empty: a hidden slot has weight 0, but 0 times a leftover NaN is NaN.
            slots = new.new_zeros(self.num_rows, new.shape[2], self._capacity, new.shape[3])
            slots[self._rows, :, self._slots] = new[0]
            assert len(filled) == layer
            filled.append(slots)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Write one token per row and let it attend to what it may see in its row, itself included.

        The query heads of one key head are passed as a sequence of R queries: keys are neither repeated nor read
        more than once.

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
        bias = None if self._bias is None else self._bias[: self.num_rows, None, None, :stop].to(query.dtype)
        grouped = query[:, 0].unflatten(1, (key.shape[2], -1))
        attended = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=bias)
        return attended.flatten(1, 2)[:, None]

    def advance(self) -> None:
        """All layers have written: the prompts, or one more token."""
        self.num_slots = self.num_slots + 1 if self.num_slots else self._longest

    def drop(self, row: int) -> None:
        """Forget `row`; the last row takes its place, which costs one row's copy whatever the number of rows."""
        self.num_rows -= 1
        if row == self.num_rows:
            return
        for slots in (*self._keys, *self._values):
            slots[row, :, : self.num_slots] = slots[self.num_rows, :, : self.num_slots]
        if self._bias is not None:
            self._bias[row] = self._bias[self.num_rows]
