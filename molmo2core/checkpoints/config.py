"""Where weights come from before training, and how they are exported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class InitialWeights:
    """Weights before stage 1.  Nothing set: random.  A uri is a folder (workspace, absolute, `s3://`) or `hf://name`."""

    molmo2: str = ""
    """A whole Molmo2 in the released format."""
    decoder: str = ""
    """A Qwen3 or OLMo3 base model; connector and new tokens are initialised at random."""
    vision_encoder: str = ""
    """A SigLIP2 base model."""


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Hugging Face export."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    shard_bytes: int = 5_000_000_000
    """Size of one safetensors file at most."""
    logit_tolerance: float = 1e-4
    """Largest difference to transformers' native class on the probe inputs, relative to the largest logit."""
