"""Tiny models of every variant and random prompts for them, for tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
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


def _with_decoder(config: ModelConfig, **changes: Any) -> ModelConfig:
    return replace(config, decoder=replace(config.decoder, **changes))


TINY_CONFIGS: dict[str, ModelConfig] = {
    "qwen": tiny_config(),
    "qwen-tied": tiny_config(tied=True),
    "olmo": tiny_config("olmo"),
    "olmo-tied": tiny_config("olmo", tied=True),
    # As the released sizes: heads that are together wider than the stream, three groups, tied; a key head per head.
    "4b": _with_decoder(tiny_config(tied=True), head_dim=32, num_kv_heads=3),
    "o-7b": _with_decoder(tiny_config("olmo"), num_kv_heads=6),
    "one-key-head": _with_decoder(tiny_config(), num_kv_heads=1),
}
"""Every kind of decoder in small."""


def tiny_model(seed: int = 0, variant: Variant = "qwen", *, tied: bool = False) -> Molmo2:
    """A random model of the size `tiny`."""
    return random_model(tiny_config(variant, tied=tied), seed=seed)


def random_model(config: ModelConfig, *, seed: int) -> Molmo2:
    """Random weights in which every parameter matters: norms are not ones, biases are not zeros."""
    model = build_model(config, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model.eval()


def random_prompt(
    config: ModelConfig, *, seed: int, images: int = 0, frames: int = 0, words: int = 12
) -> TokenizedExample:
    """A random tree of one branch of `words` tokens."""
    return random_tree(config, seed=seed, images=images, frames=frames, branches=(words,))


def random_tree(
    config: ModelConfig, *, seed: int, images: int = 0, frames: int = 0, branches: Sequence[int] = (12, 8)
) -> TokenizedExample:
    """Random text, pixels and pooling windows in the real structure (a root with all eight kinds of visual token, then
    branches whose positions restart), without a tokenizer.  Targets and loss weights are 0.

    Args:
        images: images of two crops, with windows of the image pooling, some of them cut.
        frames: video frames, with windows of the video pooling.
        branches: text tokens of each branch.
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
    input_ids = np.array([*root, *(token for words in branches for token in text(words))], dtype=np.int32)
    length = len(input_ids)
    visual_ids = [first_new[name] for name in VISUAL_TOKENS]
    starts = [np.arange(len(root)), *(len(root) + np.arange(words) for words in branches)]
    return TokenizedExample(
        uid=f"random-{seed}",
        input_ids=input_ids,
        target_ids=np.zeros(length, dtype=np.int32),
        loss_weights=np.zeros(length, dtype=np.float32),
        position_ids=np.concatenate(starts).astype(np.int32),
        subsegment_ids=np.repeat(np.array([ROOT, *range(len(branches))], dtype=np.int32), [len(root), *branches]),
        is_visual=np.isin(input_ids, visual_ids),
        crops=rng.integers(0, 256, (num_crops, geometry.num_patches, geometry.patch_bytes), dtype=np.uint8),
        pooling=np.array(pooling, dtype=np.int32).reshape(-1, geometry.max_pool),
        tasks=("text",) * len(branches),
    )


def branch_alone(tree: TokenizedExample, branch: int) -> TokenizedExample:
    """The conversation that branch number `branch` of a tree is: its root and itself."""
    kept = (tree.subsegment_ids == ROOT) | (tree.subsegment_ids == branch)

    def cut(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return array[kept]

    return replace(
        tree,
        input_ids=cut(tree.input_ids),
        target_ids=cut(tree.target_ids),
        loss_weights=cut(tree.loss_weights),
        position_ids=np.arange(kept.sum(), dtype=np.int32),
        subsegment_ids=np.where(cut(tree.subsegment_ids) == ROOT, ROOT, 0).astype(np.int32),
        is_visual=cut(tree.is_visual),
        tasks=tree.tasks[branch : branch + 1],
    )
