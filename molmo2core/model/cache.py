"""Keys and values of tokens already seen, for generation.

Shape legend: B batch, S capacity, G key/value heads, h head dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor

from molmo2core.model.config import DecoderConfig


class KeyValueCache:
    """Rows are packed from slot 0 without gaps, so that prompts of unequal length need no padding rule.

    `lengths` [B] counts the tokens of each row; `extend` writes after them and `advance` moves them on, once all
    layers have written.
    """

    def __init__(self, config: DecoderConfig, batch: int, capacity: int, like: Tensor) -> None:
        shape = (config.num_layers, batch, capacity, config.num_kv_heads, config.head_dim)
        self.keys = torch.zeros(shape, dtype=like.dtype, device=like.device)
        self.values = torch.zeros_like(self.keys)
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=like.device)

    @property
    def is_empty(self) -> bool:
        """Whether nothing was written yet: the next forward is the prefill."""
        return not bool(self.lengths.any())

    def fill(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Write a whole right-padded prompt [B, L, G, h]; what stands in the padding is overwritten later."""
        self.keys[layer, :, : keys.shape[1]] = keys
        self.values[layer, :, : values.shape[1]] = values

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write one token [B, 1, G, h] after each row's last and return all keys and values [B, S, G, h]."""
        rows = torch.arange(keys.shape[0], device=keys.device)
        self.keys[layer, rows, self.lengths] = keys[:, 0]
        self.values[layer, rows, self.lengths] = values[:, 0]
        return self.keys[layer], self.values[layer]

    def advance(self, tokens: Tensor) -> None:
        """Count `tokens` [B] as written."""
        self.lengths = self.lengths + tokens
