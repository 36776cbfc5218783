"""Weights from outside: a whole Molmo2 in the released format, or Qwen3 / OLMo3 and SigLIP2 base models."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from molmo2core.checkpoints.config import InitialWeights
from molmo2core.checkpoints.fetch import WEIGHT_FILES, fetched_folder
from molmo2core.checkpoints.hf_config import read_json, read_model_config, same_model
from molmo2core.checkpoints.hf_mapping import Read, check_names, checked_shape, from_released, released_shapes
from molmo2core.checkpoints.weight_files import WeightFiles
from molmo2core.errors import CheckpointError, RecipeError
from molmo2core.model.config import DecoderConfig, ModelConfig
from molmo2core.model.initialization import build_model
from molmo2core.model.molmo2 import Molmo2


def initial_model(config: ModelConfig, weights: InitialWeights, *, seed: int, workspace: str) -> Molmo2:
    """The model before stage 1: random from `seed`, with every part replaced that `weights` names.

    Connector and new-token embedding stay random when base models are given (model.md 3.4).

    Raises:
        RecipeError: a whole Molmo2 and base models are both given.
        CheckpointError: weights are missing or are those of another model.
        PlatformError: the object store or the hub failed.
    """
    if weights.molmo2 and (weights.decoder or weights.vision_encoder):
        raise RecipeError(
            "initial_weights", found="molmo2 and a base model", expected="one or the other", mend="remove one"
        )
    model = build_model(config, seed=seed)
    for uri, load in (
        (weights.molmo2, load_released),
        (weights.decoder, load_decoder),
        (weights.vision_encoder, load_vision_encoder),
    ):
        if uri:
            with fetched_folder(uri, workspace, WEIGHT_FILES) as folder:
                load(folder, model)
    return model


def import_released(folder: Path) -> Molmo2:
    """The model of a folder in the released format, with the configuration that it states.

    Raises:
        CheckpointError: a file, field or tensor is missing, unknown or of another shape.
    """
    with torch.device("meta"):
        model = Molmo2(read_model_config(folder))
    model.to_empty(device="cpu")
    load_released(folder, model)
    return model


def load_released(folder: Path, model: Molmo2) -> None:
    """Copy the weights of a released folder into `model`.

    Raises:
        CheckpointError: the folder holds another model, or a damaged one.
    """
    _check_same_model(read_model_config(folder), model.config, str(folder))
    with WeightFiles(folder) as files:
        check_names(files.names(), set(released_shapes(model.config)), str(folder))
        _copy(from_released(files.read, model.config, str(folder)), model, str(folder))


def load_decoder(folder: Path, model: Molmo2) -> None:
    """Copy a Qwen3 or OLMo3 base model into `model.decoder`; new tokens are left alone (model.md 3.4).

    Raises:
        CheckpointError: the base model is another one, e.g. its rotary base or its number of layers differs.
    """
    config = model.config.decoder
    _check_base_config(read_json(folder / "config.json"), config, str(folder / "config.json"))
    names = _decoder_names(config)
    with WeightFiles(folder) as files:
        found = files.names()
        if "lm_head.weight" not in found:  # the base model ties its head
            names |= {"decoder.head": ("model.embed_tokens.weight",)} if not config.tie_embeddings else {}
        expected = {name for base in names.values() for name in base}
        check_names(found - {"lm_head.weight"}, expected - {"lm_head.weight"}, str(folder))
        if config.tie_embeddings and "lm_head.weight" in found:
            _check_tied(files.read, str(folder))
        joined = ((ours, torch.cat([files.read(name) for name in base])) for ours, base in names.items())
        _copy(joined, model, str(folder))


def load_vision_encoder(folder: Path, model: Molmo2) -> None:
    """Copy a SigLIP2 model into `model.vision_encoder`; its last blocks, last norm, head and text part are not used.

    Raises:
        CheckpointError: the base model has too few blocks or other shapes (a position table of another size too).
    """
    with WeightFiles(folder) as files:
        prefix = "vision_model." if any(name.startswith("vision_model.") for name in files.names()) else ""

        def tensors() -> Iterator[tuple[str, Tensor]]:
            for ours, base in _vision_names(model.config.vision_encoder.num_layers).items():
                tensor = files.read(prefix + base)
                if ours == "patch_embedding.weight":  # a convolution kernel [W, channel, row, column]
                    tensor = tensor.permute(0, 2, 3, 1).flatten(1)
                yield f"vision_encoder.{ours}", tensor

        _copy(tensors(), model, str(folder))


def _copy(tensors: Iterator[tuple[str, Tensor]], model: Molmo2, where: str) -> None:
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in tensors:
            parameter = parameters[name]
            parameter.copy_(checked_shape(tensor, name, tuple(parameter.shape), where))


def _decoder_names(config: DecoderConfig) -> dict[str, tuple[str, ...]]:
    """Our name -> the base model's tensors that it holds, concatenated along dimension 0."""
    on_input = config.norm_placement == "input"
    in_block = {
        "attention.query_key_value": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "attention.out": ("self_attn.o_proj",),
        "attention.query_norm": ("self_attn.q_norm",),
        "attention.key_norm": ("self_attn.k_norm",),
        "attention_norm": ("input_layernorm" if on_input else "post_attention_layernorm",),
        "mlp_norm": ("post_attention_layernorm" if on_input else "post_feedforward_layernorm",),
        "mlp.up_gate": ("mlp.up_proj", "mlp.gate_proj"),
        "mlp.down": ("mlp.down_proj",),
    }
    names: dict[str, tuple[str, ...]] = {
        "decoder.embedding.base": ("model.embed_tokens.weight",),
        "decoder.norm.weight": ("model.norm.weight",),
    }
    if not config.tie_embeddings:
        names["decoder.head"] = ("lm_head.weight",)
    return names | {
        f"decoder.stack.blocks.{i}.{ours}.weight": tuple(f"model.layers.{i}.{name}.weight" for name in base)
        for i in range(config.num_layers)
        for ours, base in in_block.items()
    }


def _vision_names(num_layers: int) -> dict[str, str]:
    """Our name below `vision_encoder.` -> the base model's below `vision_model.`."""
    in_block = {
        "attention_norm": "layer_norm1",
        "query": "self_attn.q_proj",
        "key": "self_attn.k_proj",
        "value": "self_attn.v_proj",
        "attention_out": "self_attn.out_proj",
        "mlp_norm": "layer_norm2",
        "mlp_in": "mlp.fc1",
        "mlp_out": "mlp.fc2",
    }
    return {
        "patch_embedding.weight": "embeddings.patch_embedding.weight",
        "patch_embedding.bias": "embeddings.patch_embedding.bias",
        "position_embedding": "embeddings.position_embedding.weight",
    } | {
        f"blocks.{i}.{ours}.{kind}": f"encoder.layers.{i}.{base}.{kind}"
        for i in range(num_layers)
        for ours, base in in_block.items()
        for kind in ("weight", "bias")
    }


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


def _check_base_config(found: dict[str, Any], config: DecoderConfig, where: str) -> None:
    """What shapes do not tell: a wrong rotary base or norm placement would load without a word."""
    expected: dict[str, tuple[Any, Any]] = {
        "model_type": (found.get("model_type"), "qwen3" if config.norm_placement == "input" else "olmo3"),
        "num_hidden_layers": (found.get("num_hidden_layers"), config.num_layers),
        "num_attention_heads": (found.get("num_attention_heads"), config.num_heads),
        "rms_norm_eps": (found.get("rms_norm_eps"), config.norm_eps),
        "rope_theta": (_rope_theta(found), config.rope_theta),
    }
    for key, (value, wanted) in expected.items():
        if value != wanted:
            raise CheckpointError(
                f"{where}: {key}",
                found=repr(value),
                expected=f"{wanted!r}, as the recipe's model has it",
                mend="choose the base model that this size is built on",
            )


def _rope_theta(found: dict[str, Any]) -> Any:
    """At the top level, in `rope_parameters` (transformers 5), or there once per kind of attention (OLMo3)."""
    rope = found.get("rope_parameters") or {}
    places = [found, rope, *(value for value in rope.values() if isinstance(value, dict))]
    values = {place["rope_theta"] for place in places if place.get("rope_theta") is not None}
    return values.pop() if len(values) == 1 else sorted(values)


def _check_tied(read: Read, where: str) -> None:
    if not torch.equal(read("lm_head.weight"), read("model.embed_tokens.weight")):
        raise CheckpointError(
            f"{where}: lm_head.weight",
            found="a head that differs from the embedding",
            expected="the same values, as model.decoder.tie_embeddings says",
            mend="set tie_embeddings: false",
        )
