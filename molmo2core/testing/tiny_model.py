"""Tiny models of every variant, for tests."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch

from molmo2core.model.config import ModelConfig, YarnConfig, named_config
from molmo2core.model.molmo2 import Molmo2, build_model

Variant = Literal["qwen", "olmo"]


def tiny_config(variant: Variant = "qwen", *, tied: bool = False) -> ModelConfig:
    """The size `tiny` as a Qwen3-like decoder, or OLMo3-like: norms on outputs, q/k norm over the whole projection,
    YaRN on some layers (with a context so short that short test sequences leave it)."""
    config = named_config("tiny")
    decoder = replace(config.decoder, tie_embeddings=tied)
    if variant == "olmo":
        decoder = replace(
            decoder,
            norm_placement="output",
            qk_norm="full",
            rope_scaling=YarnConfig(original_max_position_embeddings=64),
            rope_scaling_layers=(0, 2),
        )
    return replace(config, decoder=decoder)


def tiny_model(seed: int = 0, variant: Variant = "qwen", *, tied: bool = False) -> Molmo2:
    """A random tiny model in which every parameter matters: norms are not ones, biases are not zeros."""
    model = build_model(tiny_config(variant, tied=tied), seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model.eval()
