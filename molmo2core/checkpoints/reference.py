"""Weights between stages: a folder with `model.safetensors` (our names) and `model_config.json`."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from molmo2core.checkpoints.hf_config import model_config_from_json, model_config_to_json, read_json
from molmo2core.checkpoints.hf_mapping import check_names, checked_shape, our_shapes
from molmo2core.checkpoints.weight_files import WeightFiles, write_weights
from molmo2core.model.config import ModelConfig
from molmo2core.model.molmo2 import Molmo2

CONFIG = "model_config.json"
_SHARD_BYTES = 5_000_000_000


def save_weights(folder: Path, model: Molmo2, config: ModelConfig) -> None:
    """Write `model`'s parameters, in the dtype they have, and `config` into an existing folder."""
    (folder / CONFIG).write_text(json.dumps(model_config_to_json(config), indent=1, sort_keys=True) + "\n")
    write_weights(folder, model.state_dict().items(), _SHARD_BYTES)


def load_weights(folder: Path) -> Molmo2:
    """The model of a folder that `save_weights` wrote, on CPU.

    Raises:
        CheckpointError: a file is missing or damaged, or a tensor is missing, unknown or of another shape.
    """
    config = read_config(folder)
    with torch.device("meta"):
        model = Molmo2(config)
    expected = our_shapes(config)
    with WeightFiles(folder) as files:
        check_names(files.names(), set(expected), str(folder))
        state = {name: checked_shape(files.read(name), name, expected[name], str(folder)) for name in expected}
    model.load_state_dict(state, strict=True, assign=True)
    return model.requires_grad_(True)


def read_config(folder: Path) -> ModelConfig:
    """The configuration of a folder that `save_weights` wrote.

    Raises:
        CheckpointError: the file is missing, or a field is missing or unknown.
    """
    return model_config_from_json(read_json(folder / CONFIG), str(folder / CONFIG))
