"""SigLIP2's vision transformer up to the last block that is used (model.md 2.1).

Shape legend: C crops, P patches of a crop, D bytes of a patch, W width, F concatenated feature width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from molmo2core.model.attention import attend_within_rows
from molmo2core.model.config import VisionEncoderConfig
from molmo2core.preprocessing.config import VisualGeometry


class VisionBlock(nn.Module):
    """Pre-norm transformer block; every crop attends to itself alone."""

    def __init__(self, config: VisionEncoderConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.attend: Callable[[Tensor, Tensor, Tensor], Tensor] = attend_within_rows
        """Set by model/backends.py."""
        inner = config.num_heads * config.head_dim
        self.attention_norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.query = nn.Linear(config.width, inner)
        self.key = nn.Linear(config.width, inner)
        self.value = nn.Linear(config.width, inner)
        self.attention_out = nn.Linear(inner, config.width)
        self.mlp_norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.mlp_in = nn.Linear(config.width, config.mlp_width)
        self.mlp_out = nn.Linear(config.mlp_width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """[C, P, W] -> [C, P, W]"""
        normed = self.attention_norm(x)
        query, key, value = (
            project(normed).unflatten(-1, (self.num_heads, -1)) for project in (self.query, self.key, self.value)
        )
        x = x + self.attention_out(self.attend(query, key, value).flatten(2))
        hidden: Tensor = self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x)), approximate="tanh"))
        return x + hidden


class VisionEncoder(nn.Module):
    """Patches of crops -> features of chosen blocks, concatenated."""

    def __init__(self, config: VisionEncoderConfig, geometry: VisualGeometry) -> None:
        super().__init__()
        self.feature_layers = config.feature_layers
        self.patch_embedding = nn.Linear(geometry.patch_bytes, config.width)
        self.position_embedding = nn.Parameter(torch.empty(geometry.num_patches, config.width))
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.num_layers))

    def forward(self, crops: Tensor) -> Tensor:
        """uint8 [C, P, D] -> [C, P, F]"""
        dtype = self.patch_embedding.weight.dtype
        # In bfloat16 the difference of two numbers near 1 would lose half a grey level.
        pixels = (crops.float() / 127.5 - 1.0).to(dtype)
        x = self.patch_embedding(pixels) + self.position_embedding
        features: dict[int, Tensor] = {}
        for layer, block in enumerate(self.blocks):
            x = block(x)
            if layer in self.feature_layers:
                features[layer] = x
        return torch.cat([features[layer] for layer in self.feature_layers], dim=-1)
