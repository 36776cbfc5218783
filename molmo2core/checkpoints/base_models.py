"""Base models for training from scratch: Qwen3 or OLMo3 as decoder, SigLIP2 as vision encoder (model.md 3.4)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from molmo2core.checkpoints.fields import Fields, read_json
from molmo2core.checkpoints.hf_config import yarn_config
from molmo2core.checkpoints.tensor_loading import check_equal, load_tensors
from molmo2core.checkpoints.tensor_table import BASE_EMBEDDING, HEAD, pairs
from molmo2core.checkpoints.weight_files import Progress, WeightFiles, silent
from molmo2core.errors import CheckpointError
from molmo2core.model.config import DecoderConfig, YarnConfig
from molmo2core.model.molmo2 import Molmo2

_SIGLIP = "vision_model."
_SIGLIP_UNUSED = ("text_model.", "logit_", "encoder.layers.", "post_layernorm.", "head.", "embeddings.position_ids")
_OTHER_BASE = "choose the base model that this size is built on"


def load_decoder(folder: Path, model: Molmo2, progress: Progress = silent) -> set[str]:
    """Fill `model.decoder` from a Qwen3 or OLMo3 base model, all but the new tokens; return the parameters' names.

    Raises:
        CheckpointError: the base model is another one, e.g. its rotary base or its number of layers differs.
    """
    config = model.config.decoder
    _check_decoder(Fields(read_json(folder / "config.json"), str(folder / "config.json")), config)
    files = WeightFiles(folder)
    lines = pairs(model.config, "qwen3" if config.norm_placement == "input" else "olmo3")
    if HEAD not in files.tensors:  # the base model ties its head
        embedding = next(stored for stored, ours in lines if ours == (BASE_EMBEDDING,))
        lines = tuple((embedding if stored == (HEAD,) else stored, ours) for stored, ours in lines)
    loaded = load_tensors(files, lines, model, unused=lambda name: name == HEAD, progress=progress)
    if config.tie_embeddings and HEAD in files.tensors:
        check_equal(files, HEAD, model.decoder.embedding.base)
    return loaded


def load_vision_encoder(folder: Path, model: Molmo2, progress: Progress = silent) -> set[str]:
    """Fill `model.vision_encoder` from a SigLIP2 model, with or without its text half; return the parameters' names.

    Its last blocks, last norm and head are not used.  A position table of another grid is resampled.

    Raises:
        CheckpointError: the base model has too few blocks or other shapes, or is no SigLIP.
    """
    _check_vision_encoder(Fields(read_json(folder / "config.json"), str(folder / "config.json")), model)
    files = WeightFiles(folder)
    lines = pairs(model.config, "siglip2")
    if not any(name.startswith(_SIGLIP) for name in files.tensors):
        lines = tuple((tuple(name.removeprefix(_SIGLIP) for name in stored), ours) for stored, ours in lines)
    return load_tensors(
        files,
        lines,
        model,
        unused=lambda name: name.removeprefix(_SIGLIP).startswith(_SIGLIP_UNUSED),
        convert={
            "vision_encoder.patch_embedding.weight": flat_kernel,
            "vision_encoder.position_embedding": partial(resampled_positions, grid=model.config.geometry.grid),
        },
        progress=progress,
    )


def flat_kernel(kernel: Tensor) -> Tensor:
    """A convolution kernel [W, channel, row, column] as a matrix [W, row * column * channel], channel fastest."""
    return kernel.permute(0, 2, 3, 1).flatten(1)


def resampled_positions(table: Tensor, *, grid: int) -> Tensor:
    """Positions of a square grid of patches, [n * n, W] -> [grid * grid, W], bicubic with antialiasing (model.md 2.1).

    A table of the right size, and one that is not of a square, is returned as it is.
    """
    side = math.isqrt(table.shape[0])
    if side == grid or side * side != table.shape[0]:
        return table
    image = table.float().T.reshape(1, -1, side, side)
    resampled = F.interpolate(image, size=(grid, grid), mode="bicubic", align_corners=False, antialias=True)
    return resampled.flatten(2)[0].T


def _check_decoder(found: Fields, config: DecoderConfig) -> None:
    """What shapes do not tell: a wrong rotary base or norm placement would load without a word."""
    olmo = config.norm_placement == "output"
    expected: dict[str, object] = {
        "model_type": "olmo3" if olmo else "qwen3",
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "rms_norm_eps": config.norm_eps,
        "hidden_act": "silu",
    }
    for name, value in expected.items():
        _expect(found, name, found.get(name), value)
    theta, yarn = _base_rope(found)
    _expect(found, "rope_theta", theta, config.rope_theta)
    _expect(found, "rope_scaling", yarn, config.rope_scaling)


def _base_rope(found: Fields) -> tuple[object, YarnConfig | None]:
    """Rotary base and scaling: at the top level (transformers 4), in `rope_parameters` (5), or there once per kind of
    attention (OLMo3 in 5).  Which layers are scaled is not theirs to say (model.md 1.2)."""
    name = "rope_parameters" if found.tree.get("rope_parameters") else "rope_scaling"
    rope: Mapping[str, Any] = found.section(name).tree if found.tree.get(name) else {}
    places = [rope, *(value for value in rope.values() if isinstance(value, Mapping))]
    thetas = {place["rope_theta"] for place in (found.tree, *places) if place.get("rope_theta") is not None}
    where = f"{found.where}: rope"
    scalings = [yarn_config(Fields(place, where)) for place in places if "rope_type" in place]
    yarns = {yarn for yarn in scalings if yarn is not None}
    if len(thetas) != 1 or len(yarns) > 1:
        raise CheckpointError(
            found.where,
            found=f"rope_theta {sorted(thetas)}, {len(yarns)} kinds of scaling",
            expected="one rope_theta, at most one scaling",
            mend=_OTHER_BASE,
        )
    return thetas.pop(), next(iter(yarns), None)


def _check_vision_encoder(found: Fields, model: Molmo2) -> None:
    vision = found.section("vision_config") if "vision_config" in found.tree else found
    config, geometry = model.config.vision_encoder, model.config.geometry
    if vision.value("num_hidden_layers", int) < config.num_layers:
        raise CheckpointError(
            f"{vision.where}: num_hidden_layers",
            found=str(vision.get("num_hidden_layers")),
            expected=f"at least {config.num_layers}",
            mend=_OTHER_BASE,
        )
    expected: dict[str, object] = {
        "hidden_size": config.width,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.mlp_width,
        "patch_size": geometry.patch_size,
    }
    for name, value in expected.items():
        _expect(vision, name, vision.get(name), value)
    # SigLIP's files leave these out when they are as its schema has them.
    for name, value in (("hidden_act", "gelu_pytorch_tanh"), ("layer_norm_eps", config.norm_eps), ("num_channels", 3)):
        _expect(vision, name, vision.tree.get(name, value), value)


def _expect(fields: Fields, name: str, found: object, wanted: object) -> None:
    if found != wanted:
        raise CheckpointError(
            f"{fields.where}: {name}",
            found=repr(found),
            expected=f"{wanted!r}, as the recipe's model has it",
            mend=_OTHER_BASE,
        )
