"""Tiny models of every variant and random prompts for them, for tests."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
import torch

from molmo2core.examples import PADDING, ROOT, TokenizedExample
from molmo2core.model.config import ModelConfig, YarnConfig, named_config
from molmo2core.model.initialization import build_model
from molmo2core.model.molmo2 import Molmo2
from molmo2core.special_tokens import (
    EXTRA_TOKENS,
    FRAME_END,
    FRAME_START,
    IM_COL,
    IM_END,
    IM_LOW,
    IM_PATCH,
    IM_START,
    LOW_RES_IM_START,
    VISUAL_TOKENS,
)

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
            max_position_embeddings=512,
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


def random_prompt(
    config: ModelConfig, *, seed: int, images: int = 0, frames: int = 0, words: int = 12
) -> TokenizedExample:
    """A prompt with random text, pixels and pooling windows: the real structure (root with all eight kinds of visual
    token, one branch), without a tokenizer.

    Args:
        images: images of two crops, with windows of the image pooling, some of them cut.
        frames: video frames, with windows of the video pooling.
        words: text tokens after the visual ones.
    """
    rng = np.random.default_rng(seed)
    geometry, size = config.geometry, config.decoder.vocab_size
    first_new = {name: size + k for k, name in enumerate(EXTRA_TOKENS)}

    def text(length: int) -> list[int]:
        return list(rng.integers(0, size, length))

    root, pooling = text(1), []
    num_crops = 2 * images + frames
    for visual in range(images + frames):
        is_image = visual < images
        rows, columns = geometry.image_pooling if is_image else geometry.video_pooling
        windows = rng.integers(0, num_crops * geometry.num_patches, (5, rows * columns))
        windows[1, 1:] = PADDING
        windows[3, 0] = PADDING
        pooling += [np.pad(window, (0, geometry.max_pool - window.size), constant_values=PADDING) for window in windows]
        patch, column = first_new[IM_PATCH], first_new[IM_COL]
        root += [
            *text(2),
            first_new[LOW_RES_IM_START if is_image else FRAME_START],
            *[patch, patch, column, patch, column],
            first_new[IM_END if is_image else FRAME_END],
            *[first_new[IM_START], patch, patch, first_new[IM_LOW], first_new[IM_END]],
        ]
    branch = text(words)
    input_ids = np.array([*root, *branch], dtype=np.int32)
    length = len(input_ids)
    visual_ids = [first_new[name] for name in VISUAL_TOKENS]
    return TokenizedExample(
        uid=f"random-{seed}",
        input_ids=input_ids,
        target_ids=np.zeros(length, dtype=np.int32),
        loss_weights=np.zeros(length, dtype=np.float32),
        position_ids=np.arange(length, dtype=np.int32),
        subsegment_ids=np.array([ROOT] * len(root) + [0] * len(branch), dtype=np.int32),
        is_visual=np.isin(input_ids, visual_ids),
        crops=rng.integers(0, 256, (num_crops, geometry.num_patches, geometry.patch_bytes), dtype=np.uint8),
        pooling=np.array(pooling, dtype=np.int32).reshape(-1, geometry.max_pool),
        tasks=("text",),
    )
