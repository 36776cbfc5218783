"""Shapes of our parameters and of released tensors, and our weights under the released names (model.md 3.3)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from molmo2core.checkpoints.tensor_table import BASE_EMBEDDING, HEAD, pairs
from molmo2core.model.config import ModelConfig
from molmo2core.model.molmo2 import Molmo2

Shapes = dict[str, tuple[int, ...]]


def num_tensors(config: ModelConfig) -> int:
    """Tensors of a released file (model.md 1.5)."""
    return 8 * config.decoder.num_layers + 4 + 16 * config.vision_encoder.num_layers + 3 + 11


def our_shapes(config: ModelConfig) -> Shapes:
    """Shape of each of our parameters, without allocating any."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in Molmo2(config).state_dict().items()}


def released_shapes(config: ModelConfig) -> Shapes:
    """Shape of each released tensor, without allocating any."""
    with torch.device("meta"):
        state = Molmo2(config).state_dict()
        return {name: tuple(tensor.shape) for name, tensor in to_released(state, config)}


def to_released(state: Mapping[str, Tensor], config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Released name and tensor, one at a time, without a copy; `state` is keyed by our names.

    Released tensors are cut as ours are.  The head is always there, as released files have it, tied or not.
    """
    for released, ours in pairs(config, "released"):
        yield from ((name, state[our_name]) for name, our_name in zip(released, ours, strict=True))
    if config.decoder.tie_embeddings:
        yield HEAD, state[BASE_EMBEDDING]
