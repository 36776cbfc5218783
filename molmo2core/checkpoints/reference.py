"""Weights between stages: a folder with safetensors under our names and `model_config.json`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from molmo2core.checkpoints.fields import Fields, read_json
from molmo2core.checkpoints.tensor_loading import load_tensors
from molmo2core.checkpoints.weight_files import Progress, WeightFiles, silent, write_weights
from molmo2core.errors import CheckpointError
from molmo2core.model.config import ConnectorConfig, DecoderConfig, ModelConfig, VisionEncoderConfig, YarnConfig
from molmo2core.model.initialization import empty_model
from molmo2core.model.molmo2 import Molmo2
from molmo2core.preprocessing.config import VisualGeometry

CONFIG = "model_config.json"
SHARD_BYTES = 5_000_000_000


def save_weights(folder: Path, model: Molmo2, config: ModelConfig, progress: Progress = silent) -> None:
    """Write `model`'s parameters, in the dtype they have, and `config` into an existing folder."""
    (folder / CONFIG).write_text(json.dumps(model_config_to_json(config), indent=1, sort_keys=True) + "\n")
    write_weights(folder, model.state_dict().items(), SHARD_BYTES, progress)


def load_weights(folder: Path, progress: Progress = silent) -> Molmo2:
    """The model of a folder that `save_weights` wrote, float32 on CPU.

    Raises:
        CheckpointError: a file is missing or damaged, or a tensor is missing, unknown or of another shape.
    """
    model = empty_model(read_config(folder))
    names = [name for name, _ in model.named_parameters()]
    load_tensors(WeightFiles(folder), [((name,), (name,)) for name in names], model, progress=progress)
    return model


def read_config(folder: Path) -> ModelConfig:
    """The configuration of a folder that `save_weights` wrote.

    Raises:
        CheckpointError: the file is missing, or a field is missing or unknown.
    """
    return model_config_from_json(read_json(folder / CONFIG), str(folder / CONFIG))


def model_config_to_json(config: ModelConfig) -> dict[str, Any]:
    """`config` as a JSON object."""
    return dataclasses.asdict(config)


def model_config_from_json(found: Mapping[str, Any], where: str) -> ModelConfig:
    """Inverse of `model_config_to_json`.

    Raises:
        CheckpointError: a field is missing or unknown.
    """
    fields = Fields(found, where)
    decoder = fields.section("decoder")
    scaling = decoder.get("rope_scaling")
    return ModelConfig(
        geometry=_build(VisualGeometry, fields.section("geometry")),
        vision_encoder=_build(VisionEncoderConfig, fields.section("vision_encoder")),
        connector=_build(ConnectorConfig, fields.section("connector")),
        decoder=dataclasses.replace(
            _build(DecoderConfig, decoder),
            rope_scaling=None if scaling is None else _build(YarnConfig, decoder.section("rope_scaling")),
        ),
    )


def _build(kind: Any, section: Fields) -> Any:
    known = {field.name for field in dataclasses.fields(kind)}
    if unknown := sorted(section.tree.keys() - known):
        raise CheckpointError(section.where, found=f"unknown field {unknown[0]}", expected=f"fields of {kind.__name__}")
    values = {name: section.get(name) for name in known}
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})
