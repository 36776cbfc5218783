"""Attention pooling over windows of patches, and the projector into the decoder's width (model.md 2.2).

Shape legend: N patches of all crops, F feature width, V visual tokens, K patches per pool, W connector width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from molmo2core.examples import PADDING
from molmo2core.model.config import ConnectorConfig


class Connector(nn.Module):
    """Each visual token is the mean of its valid patches, attending to those patches, then a SwiGLU projector."""

    def __init__(self, config: ConnectorConfig, feature_width: int, decoder_width: int) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        inner = config.num_heads * config.head_dim
        self.query = nn.Linear(feature_width, inner)
        self.key = nn.Linear(feature_width, inner)
        self.value = nn.Linear(feature_width, inner)
        self.pool_out = nn.Linear(inner, config.width)
        self.gate = nn.Linear(config.width, config.mlp_width, bias=False)
        self.up = nn.Linear(config.width, config.mlp_width, bias=False)
        self.down = nn.Linear(config.mlp_width, decoder_width, bias=False)

    def forward(self, features: Tensor, pooling: Tensor) -> Tensor:
        """Pool and project.

        Args:
            features: [N, F].
            pooling: int64 [V, K] indices into N, PADDING where a window is cut; no row may be all PADDING.

        Returns:
            [V, decoder width]
        """
        valid = pooling != PADDING
        patches = features[pooling.clamp(min=0)] * valid[..., None].to(features.dtype)
        mean = patches.sum(dim=1) / valid.sum(dim=1, keepdim=True).clamp(min=1).to(features.dtype)
        query = self.query(mean).unflatten(-1, (self.num_heads, 1, -1))
        key, value = (
            project(patches).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for project in (self.key, self.value)
        )
        # An all-padding row would be a softmax over nothing: NaN here, and NaN in every gradient.
        allowed = valid | ~valid.any(dim=1, keepdim=True)
        pooled = F.scaled_dot_product_attention(query, key, value, attn_mask=allowed[:, None, None])
        pooled = self.pool_out(pooled.flatten(1))
        projected: Tensor = self.down(F.silu(self.gate(pooled)) * self.up(pooled))
        return projected


def no_visual_tokens(width: int, like: Tensor) -> Tensor:
    """[0, width], for a batch without visual input."""
    return torch.zeros(0, width, dtype=like.dtype, device=like.device)
