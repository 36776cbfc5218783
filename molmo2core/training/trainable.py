"""Which parameters of a model are trained: whole parts, or adapters beside frozen ones."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Literal

from torch import nn

from molmo2core import storage
from molmo2core.errors import RecipeError
from molmo2core.model.config import ModelConfig
from molmo2core.model.molmo2 import Molmo2, group_of_parameter
from molmo2core.training.config import TrainableParts, TrainingConfig, check_trained_parts
from molmo2core.training.low_rank import add_adapters

Part = Literal["input_embedding", "output_head", "final_norm", "vision_encoder", "connector", "decoder"]
"""A field of TrainableParts."""

_OF_DECODER: dict[str, Part] = {
    "decoder.embedding.base": "input_embedding",
    "decoder.head": "output_head",
    "decoder.norm.weight": "final_norm",
}


def select_trained(model: Molmo2, config: TrainingConfig, *, seed: int) -> None:
    """Freeze what is not trained and add adapters, in place, before the model is sharded and the optimizer is built.

    Called by all ranks; adapters are the same on each.  On one device torch leaves out what a frozen parameter's
    gradient would cost; the vision encoder, which has nothing trained before it, then has no backward pass at all.

    Raises:
        RecipeError: see check_trained_parts.
    """
    check_trained_parts(config, tied=model.config.decoder.tie_embeddings)
    freeze(model, config.trainable)
    if config.low_rank is not None:
        add_adapters(model, config.low_rank, seed=seed)


def freeze(model: nn.Module, parts: TrainableParts) -> None:
    """Let the parameters of a Molmo2 require gradients as `parts` says."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(getattr(parts, part_of_parameter(name)))


def part_of_parameter(name: str) -> Part:
    """The part that a parameter of Molmo2 belongs to; a tied head is found as the input embedding."""
    group = group_of_parameter(name)
    return _OF_DECODER.get(name, "decoder") if group == "decoder" else group


def what_is_trained(config: TrainingConfig) -> str:
    """The same text for the same trained parameters."""
    low_rank = dataclasses.asdict(config.low_rank) if config.low_rank is not None else None
    return json.dumps({"trainable": dataclasses.asdict(config.trainable), "low_rank": low_rank})


def model_key(model: ModelConfig) -> str:
    """The same for models of the same parameters."""
    return storage.content_key(dataclasses.asdict(model))


def check_same_parts(checkpoint: Path, model: ModelConfig, config: TrainingConfig) -> None:
    """Whether a committed checkpoint, perhaps of another training, has the parameters and optimizer state of this one.

    Composer leaves out what the model does not have, without a word.

    Raises:
        RecipeError: it trained another model or other parts.
    """
    meta = storage.open_committed(str(checkpoint)).meta
    if meta.get("model") != model_key(model):
        raise RecipeError(
            "training.resume_from",
            found=f"{checkpoint}, of another model",
            expected="the recipe's model",
            mend="go on with the same model, or delete resume_from to start at step 0",
        )
    found, expected = meta.get("trained"), what_is_trained(config)
    if found != expected:
        raise RecipeError(
            "training.resume_from",
            found=f"{checkpoint}, which trained {found}",
            expected=expected,
            mend="go on with the same trainable and low_rank, or delete resume_from to start at step 0",
        )
