"""Weights from outside: a whole Molmo2, in the released layout or transformers' own, or base models."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from molmo2core.checkpoints.base_models import load_decoder, load_vision_encoder
from molmo2core.checkpoints.config import InitialWeights
from molmo2core.checkpoints.fetch import WEIGHT_FILES, fetched_folder
from molmo2core.checkpoints.hf_config import read_model_config, same_model
from molmo2core.checkpoints.tensor_loading import check_equal, load_tensors
from molmo2core.checkpoints.tensor_table import HEAD, Layout, pairs
from molmo2core.checkpoints.weight_files import Progress, WeightFiles, silent
from molmo2core.errors import CheckpointError, RecipeError
from molmo2core.model.config import ModelConfig
from molmo2core.model.initialization import empty_model, initialize_parameters
from molmo2core.model.molmo2 import Molmo2


def initial_model(
    config: ModelConfig, weights: InitialWeights, *, seed: int, workspace: str, progress: Progress = silent
) -> Molmo2:
    """The model before stage 1: what `weights` names, and the rest random from `seed`.

    Connector and new-token embedding are random when base models are given (model.md 3.4).  A parameter is either read
    or drawn, never both, and what is drawn does not depend on what is read.

    Raises:
        RecipeError: a whole Molmo2 and base models are both given.
        CheckpointError: weights are missing or are those of another model.
        PlatformError: the object store or the hub failed.
    """
    if weights.molmo2 and (weights.decoder or weights.vision_encoder):
        raise RecipeError(
            "initial_weights", found="molmo2 and a base model", expected="one or the other", mend="remove one"
        )
    model = empty_model(config)
    drawn = {name for name, _ in model.named_parameters()}
    for uri, load in (
        (weights.molmo2, load_molmo2),
        (weights.decoder, load_decoder),
        (weights.vision_encoder, load_vision_encoder),
    ):
        if uri:
            with fetched_folder(uri, workspace, WEIGHT_FILES) as folder:
                drawn -= load(folder, model, progress)
    initialize_parameters(model, seed=seed, names=drawn)
    return model


def import_released(folder: Path, progress: Progress = silent) -> Molmo2:
    """The model of a Hugging Face folder, in float32, with the configuration that it states.

    Raises:
        CheckpointError: a file, field or tensor is missing, unknown or of another shape.
    """
    model = empty_model(read_model_config(folder))
    load_molmo2(folder, model, progress)
    return model


def load_molmo2(folder: Path, model: Molmo2, progress: Progress = silent) -> set[str]:
    """Fill `model` from a Hugging Face folder; return the names of its parameters, which are all.

    Configuration and tensor names may each be the released ones or transformers' own: `save_pretrained` of transformers
    5.23 writes its own configuration and, unless told otherwise, released names.

    Raises:
        CheckpointError: the folder holds another model, or a damaged one.
    """
    _check_same_model(read_model_config(folder), model.config, str(folder))
    files = WeightFiles(folder)
    layout: Layout = "native" if any(name.startswith("model.language_model.") for name in files.tensors) else "released"
    tied = model.config.decoder.tie_embeddings
    lines = pairs(model.config, layout)
    loaded = load_tensors(files, lines, model, unused=lambda name: tied and name == HEAD, progress=progress)
    if tied:
        check_equal(files, HEAD, model.decoder.embedding.base)
    return loaded


def _check_same_model(found: ModelConfig, wanted: ModelConfig, where: str) -> None:
    if same_model(found, wanted):
        return
    for part in dataclasses.fields(ModelConfig):
        left, right = getattr(found, part.name), getattr(wanted, part.name)
        for field in dataclasses.fields(left):
            here, there = getattr(left, field.name), getattr(right, field.name)
            if here != there and field.name not in ("tie_embeddings", "num_declared_layers"):
                raise CheckpointError(
                    f"{where}: {part.name}.{field.name}",
                    found=repr(here),
                    expected=f"{there!r}, as the recipe's model has it",
                    mend="choose the model that these weights belong to",
                )
