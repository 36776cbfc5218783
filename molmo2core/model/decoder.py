"""Qwen3 and OLMo3 decoders from one code (model.md 2.3, 2.4).

Shape legend: B batch, S sequence, W width, H query heads, G key/value heads, h head dimension.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from molmo2core.model.attention import AttentionMask, attend
from molmo2core.model.cache import KeyValueCache
from molmo2core.model.config import DecoderConfig
from molmo2core.model.dropout import TokenDropout, drop
from molmo2core.model.rope import rotary_table, rotate

RotaryTable = tuple[Tensor, Tensor]
Attend = Callable[[Tensor, Tensor, Tensor, AttentionMask], Tensor]


class RMSNorm(nn.Module):
    """Root-mean-square norm in float32; the weight is applied after the cast back."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """[..., W] -> [..., W]"""
        normed = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)


class TokenEmbedding(nn.Module):
    """The base table, and the table of new tokens whose ids follow the base vocabulary."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.base = nn.Parameter(torch.empty(config.vocab_size, config.width))
        self.new = nn.Parameter(torch.empty(config.additional_vocab_size, config.width))

    def forward(self, input_ids: Tensor) -> Tensor:
        """int64 [B, S] -> [B, S, W]"""
        size = self.base.shape[0]
        base = F.embedding(input_ids.clamp(max=size - 1), self.base)
        new = F.embedding((input_ids - size).clamp(min=0), self.new)
        return torch.where((input_ids < size)[..., None], base, new)


class DecoderAttention(nn.Module):
    """Grouped-query attention with q/k norm and rotary positions."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.config = config
        self.attend: Attend = attend
        """Replaced by parallel/context_parallel.py; everything else in this module is blind to ranks."""
        query_width = config.num_heads * config.head_dim
        key_width = config.num_kv_heads * config.head_dim
        self.query_key_value = nn.Linear(config.width, query_width + 2 * key_width, bias=False)
        """Rows of the queries, then of the keys, then of the values, as released files have them."""
        self.widths = (query_width, key_width, key_width)
        self.out = nn.Linear(query_width, config.width, bias=False)
        per_head = config.qk_norm == "per_head"
        self.query_norm = RMSNorm(config.head_dim if per_head else query_width, config.norm_eps)
        self.key_norm = RMSNorm(config.head_dim if per_head else key_width, config.norm_eps)

    def forward(self, x: Tensor, rotary: RotaryTable, mask: AttentionMask, cache: KeyValueCache | None) -> Tensor:
        """[B, S, W] -> [B, S, W]"""
        projected_query, projected_key, projected_value = self.query_key_value(x).split(self.widths, dim=-1)
        value = projected_value.unflatten(-1, (-1, self.config.head_dim))
        # Under autocast a norm's float32 weight made them float32: rounded here, since kernels want one dtype.
        query = rotate(self._heads(projected_query, self.query_norm), rotary).to(value.dtype)
        key = rotate(self._heads(projected_key, self.key_norm), rotary).to(value.dtype)
        if cache is not None and cache.num_slots:
            attended = cache.attend(self.layer, query, key, value)
        else:
            attended = self.attend(query, key, value, mask)
            if cache is not None:
                cache.fill(self.layer, key, value)
        out: Tensor = self.out(attended.flatten(2))
        return out

    def _heads(self, projected: Tensor, norm: RMSNorm) -> Tensor:
        heads = (-1, self.config.head_dim)
        if self.config.qk_norm == "per_head":
            return norm(projected.unflatten(-1, heads))
        return norm(projected).unflatten(-1, heads)


class DecoderMLP(nn.Module):
    """SwiGLU with one fused input matrix: rows of the up branch first, then of the gate, as in released files."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.up_gate = nn.Linear(config.width, 2 * config.mlp_width, bias=False)
        self.down = nn.Linear(config.mlp_width, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, W] -> [B, S, W]"""
        up, gate = self.up_gate(x).chunk(2, dim=-1)
        out: Tensor = self.down(F.silu(gate) * up)
        return out


class DecoderBlock(nn.Module):
    """Attention and MLP, each with its norm on the input (Qwen3) or on the output (OLMo3)."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.norm_on_input = config.norm_placement == "input"
        self.attention = DecoderAttention(config, layer)
        self.attention_norm = RMSNorm(config.width, config.norm_eps)
        self.mlp = DecoderMLP(config)
        self.mlp_norm = RMSNorm(config.width, config.norm_eps)

    def forward(
        self,
        x: Tensor,
        rotary: RotaryTable,
        mask: AttentionMask,
        token_dropout: TokenDropout | None,
        cache: KeyValueCache | None,
    ) -> Tensor:
        """[B, S, W] -> [B, S, W]"""
        if self.norm_on_input:
            x = x + drop(self.attention(self.attention_norm(x), rotary, mask, cache), token_dropout, 0)
            return x + drop(self.mlp(self.mlp_norm(x)), token_dropout, 1)
        x = x + drop(self.attention_norm(self.attention(x, rotary, mask, cache)), token_dropout, 0)
        return x + drop(self.mlp_norm(self.mlp(x)), token_dropout, 1)


class DecoderStack(nn.Module):
    """All blocks.  The module whose inputs context parallelism cuts along the sequence."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList(DecoderBlock(config, layer) for layer in range(config.num_layers))

    def forward(
        self,
        x: Tensor,
        position_ids: Tensor,
        mask: AttentionMask,
        token_dropout: TokenDropout | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """[B, S, W] -> [B, S, W]

        Args:
            position_ids: int64 [B, S].
            mask: rule of the whole sequence; a step after the prefill follows the cache instead.
            token_dropout: of each token's residual branches, or None.
        """
        config = self.config
        plain = rotary_table(position_ids, config.head_dim, config.rope_theta)
        scaled = plain
        if config.rope_scaling is not None:
            scaled = rotary_table(position_ids, config.head_dim, config.rope_theta, config.rope_scaling)
        # No list of layers means that every layer is scaled (model.md 3.2).
        layers = config.rope_scaling_layers if config.rope_scaling_layers is not None else range(config.num_layers)
        for layer, block in enumerate(self.blocks):
            dropout = token_dropout.from_branch(2 * layer) if token_dropout is not None else None
            x = block(x, scaled if layer in layers else plain, mask, dropout, cache)
        if cache is not None:
            cache.advance()
        return x


class Decoder(nn.Module):
    """Embedding, blocks, final norm and head."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = TokenEmbedding(config)
        self.stack = DecoderStack(config)
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.head = None if config.tie_embeddings else nn.Parameter(torch.empty(config.vocab_size, config.width))

    @property
    def head_weight(self) -> Tensor:
        """[V, W] rows of the base vocabulary only: new tokens can never be predicted."""
        return self.embedding.base if self.head is None else self.head
