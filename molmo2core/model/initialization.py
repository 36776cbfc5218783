"""Random weights, a function of seed and parameter name alone.

A parameter's values do not depend on the order of initialisation, on which other parameters come from a checkpoint, or
on how a model is split over processes: each has a generator of its own, keyed by (seed, name), that draws it whole.

New tokens and connector are normal with standard deviation 0.02 as published (model.md 3.4), or 1/sqrt(width) where
that is more, which it is for tiny widths alone.  What real runs load from base models begins so that a tiny model
learns within minutes (DECISIONS D10): matrices with deviation 1/sqrt(inputs), positions of patches as sines and
cosines, so that where something is can be read off linearly from the first step.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from molmo2core.model.config import ModelConfig
from molmo2core.model.molmo2 import Molmo2, group_of_parameter
from molmo2core.preprocessing.randomness import generator

INITIAL_STD = 0.02
"""Of new tokens and connector, as published."""


def model_without_weights(config: ModelConfig) -> Molmo2:
    """A Molmo2 on the meta device: shapes alone."""
    with torch.device("meta"):
        return Molmo2(config)


def empty_model(config: ModelConfig) -> Molmo2:
    """A Molmo2 on CPU whose parameters hold whatever was in memory; pages are taken when they are written to."""
    return model_without_weights(config).to_empty(device="cpu")


def build_model(config: ModelConfig, *, seed: int) -> Molmo2:
    """A Molmo2 with random weights, the same for the same seed."""
    model = empty_model(config)
    initialize_parameters(model, seed=seed)
    return model


@torch.no_grad()
def initialize_parameters(model: Molmo2, *, seed: int, names: Collection[str] | None = None) -> None:
    """Fill parameters with their initial values, e.g. after `to_empty`.

    Args:
        names: which of them, by the model's names; all without it.
    """
    for name, parameter in model.named_parameters():
        if names is None or name in names:
            parameter.copy_(initial_value(name, tuple(parameter.shape), model.config, seed=seed))


def initial_value(name: str, shape: tuple[int, ...], config: ModelConfig, *, seed: int) -> Tensor:
    """Initial value of one whole parameter, float32 on CPU."""
    if name.endswith("norm.weight"):
        return torch.ones(shape)
    if name == "vision_encoder.position_embedding":
        return _patch_positions(config.geometry.grid, shape[1])
    if len(shape) == 1:
        return torch.zeros(shape)
    values = generator("initial value", seed, name).standard_normal(shape, dtype="float32")
    return torch.from_numpy(values).mul_(_standard_deviation(name, shape, config))


def _standard_deviation(name: str, shape: tuple[int, ...], config: ModelConfig) -> float:
    if group_of_parameter(name) == "connector" or name in ("decoder.embedding.base", "decoder.head"):
        return max(INITIAL_STD, float(config.decoder.width) ** -0.5)
    return float(shape[1]) ** -0.5


def _patch_positions(grid: int, width: int) -> Tensor:
    """Sines and cosines of row and column, [grid * grid, width], periods from four grids to half a grid."""
    frequencies = torch.pi * 2.0 ** torch.linspace(-1, 2, -(-width // 4))
    angles = (torch.arange(grid) + 0.5)[:, None] / grid * frequencies
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)
    rows, columns = waves[:, None].expand(grid, grid, -1), waves[None].expand(grid, grid, -1)
    return torch.cat([rows, columns], dim=-1).reshape(grid * grid, -1)[:, :width]
