"""Shapes of a Molmo2, torch-free, and the named sizes (model.md 1)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from molmo2core.errors import RecipeError
from molmo2core.preprocessing.config import VisualGeometry

Size = Literal["tiny", "4b", "8b", "o-7b"]
AttentionBackend = Literal["auto", "sdpa", "flex", "flash"]
"""How attention is computed; all give the same (model/attention.py)."""


@dataclass(frozen=True, kw_only=True)
class VisionEncoderConfig:
    """SigLIP2 without its last blocks, norm and head (model.md 1.3)."""

    width: int = 1152
    num_heads: int = 16
    head_dim: int = 72
    mlp_width: int = 4304
    num_declared_layers: int = 27
    """Blocks of the base encoder; only those up to the last feature layer exist."""
    feature_layers: tuple[int, ...] = (24, 18)
    """0-based blocks whose outputs are concatenated, in this order."""
    norm_eps: float = 1e-6

    @property
    def num_layers(self) -> int:
        """Blocks that exist."""
        return max(self.feature_layers) + 1


@dataclass(frozen=True, kw_only=True)
class ConnectorConfig:
    """Attention pooling and projector (model.md 1.4)."""

    width: int = 1152
    num_heads: int = 16
    head_dim: int = 72
    mlp_width: int


@dataclass(frozen=True, kw_only=True)
class YarnConfig:
    """YaRN rotary scaling (model.md 1.2)."""

    factor: float = 8.0
    attention_factor: float = 1.2079441541679836
    original_max_position_embeddings: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Qwen3 or OLMo3 decoder (model.md 1.1)."""

    width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_width: int
    """Per branch of the SwiGLU."""
    vocab_size: int
    """Rows of the base embedding and of the head."""
    additional_vocab_size: int = 128
    """Rows of the new-token embedding; they can never be predicted."""
    max_position_embeddings: int
    rope_theta: float
    rope_scaling: YarnConfig | None = None
    rope_scaling_layers: tuple[int, ...] | None = None
    """Layers that `rope_scaling` applies to; read from the released config, never derived."""
    norm_placement: Literal["input", "output"] = "input"
    """RMSNorm before each sub-layer (Qwen3) or on its output (OLMo3)."""
    qk_norm: Literal["per_head", "full"] = "per_head"
    norm_eps: float = 1e-6
    tie_embeddings: bool = False
    """Whether the head shares the base embedding during training; exports always store both."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A whole Molmo2."""

    geometry: VisualGeometry = field(default_factory=VisualGeometry)
    vision_encoder: VisionEncoderConfig = field(default_factory=VisionEncoderConfig)
    connector: ConnectorConfig
    decoder: DecoderConfig


def named_config(size: Size) -> ModelConfig:
    """The configuration that `size` names.

    Raises:
        RecipeError: no such size.
    """
    if size not in _SIZES:
        raise RecipeError("model.size", found=repr(size), expected=f"one of {', '.join(_SIZES)}")
    return _SIZES[size]


_4B = ModelConfig(
    connector=ConnectorConfig(mlp_width=9728),
    decoder=DecoderConfig(
        width=2560,
        num_layers=36,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        mlp_width=9728,
        vocab_size=151936,
        max_position_embeddings=36864,
        rope_theta=5_000_000.0,
        tie_embeddings=True,
    ),
)
_8B = ModelConfig(
    connector=ConnectorConfig(mlp_width=12288),
    decoder=replace(_4B.decoder, width=4096, mlp_width=12288, rope_theta=1_000_000.0, tie_embeddings=False),
)
_O_7B = ModelConfig(
    connector=ConnectorConfig(mlp_width=11008),
    decoder=DecoderConfig(
        width=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=32,
        head_dim=128,
        mlp_width=11008,
        vocab_size=100278,
        max_position_embeddings=65536,
        rope_theta=500_000.0,
        rope_scaling=YarnConfig(),
        rope_scaling_layers=(3, 7, 11, 15, 19, 23, 27, 31),
        norm_placement="output",
        qk_norm="full",
    ),
)
_TINY = ModelConfig(
    geometry=VisualGeometry(crop_size=54, patch_size=9, overlap_margins=(1, 1)),
    vision_encoder=VisionEncoderConfig(
        width=64, num_heads=4, head_dim=16, mlp_width=128, num_declared_layers=4, feature_layers=(2, 1)
    ),
    connector=ConnectorConfig(width=64, num_heads=4, head_dim=16, mlp_width=128),
    decoder=DecoderConfig(
        width=96,
        num_layers=3,
        num_heads=6,
        num_kv_heads=2,
        head_dim=16,
        mlp_width=192,
        vocab_size=768,
        max_position_embeddings=4096,
        rope_theta=10_000.0,
    ),
)
_SIZES: dict[str, ModelConfig] = {"tiny": _TINY, "4b": _4B, "8b": _8B, "o-7b": _O_7B}
