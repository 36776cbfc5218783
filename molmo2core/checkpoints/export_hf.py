"""A Molmo2 as a Hugging Face folder in the released format (model.md 3).  See verify.py for its acceptance."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from molmo2core.checkpoints.config import ExportConfig
from molmo2core.checkpoints.hf_config import released_config
from molmo2core.checkpoints.hf_mapping import to_released
from molmo2core.checkpoints.processor_files import write_json, write_processor_files
from molmo2core.checkpoints.weight_files import write_weights
from molmo2core.errors import CheckpointError
from molmo2core.model.molmo2 import Molmo2
from molmo2core.preprocessing.config import PreprocessingConfig
from molmo2core.special_tokens import SpecialTokens, load_tokenizer


@dataclass(frozen=True, kw_only=True)
class Lineage:
    """What the model card says about where the weights come from."""

    checkpoint_digest: str = ""
    recipe_fingerprint: str = ""
    stage: str = ""
    step: int = 0
    datasets: tuple[tuple[str, str], ...] = ()
    """(name, content digest) of each dataset that a plan could draw from."""


def export_model(
    folder: Path,
    model: Molmo2,
    tokenizer: Path,
    *,
    export: ExportConfig,
    preprocessing: PreprocessingConfig,
    lineage: Lineage,
) -> None:
    """Write the complete released-format folder of `model` into the existing, empty `folder`.

    Args:
        tokenizer: folder with `tokenizer.json`.

    Raises:
        CheckpointError: the tokenizer is one of another model.
        DataError: the tokenizer is missing or lacks a special token.
    """
    special = load_tokenizer(tokenizer).special
    _check_vocabulary(special, model, tokenizer)
    write_processor_files(folder, tokenizer, model.config.geometry, preprocessing)
    write_json(folder / "config.json", released_config(model.config, special, dtype=export.dtype))
    write_json(
        folder / "generation_config.json",
        {"bos_token_id": special.bos, "eos_token_id": special.eos, "pad_token_id": special.pad},
    )
    write_weights(folder, _in_dtype(model, export), export.shard_bytes)
    (folder / "README.md").write_text(_model_card(model, export, lineage))


def _in_dtype(model: Molmo2, export: ExportConfig) -> Iterator[tuple[str, Tensor]]:
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[export.dtype]
    for name, tensor in to_released(model.state_dict(), model.config):
        yield name, tensor.to(dtype)


def _check_vocabulary(special: SpecialTokens, model: Molmo2, tokenizer: Path) -> None:
    if special.im_patch != model.im_patch_id:
        raise CheckpointError(
            str(tokenizer),
            found=f"<im_patch> has id {special.im_patch}",
            expected=f"{model.im_patch_id}: new tokens follow the model's {model.config.decoder.vocab_size} rows",
            mend="export with the tokenizer that the model was trained with",
        )


def _model_card(model: Molmo2, export: ExportConfig, lineage: Lineage) -> str:
    decoder = model.config.decoder
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    datasets = "\n".join(f"| {name} | `{digest}` |" for name, digest in lineage.datasets)
    return f"""\
---
library_name: transformers
pipeline_tag: image-text-to-text
---
# Molmo2, {num_parameters:,} parameters

A video-language model that points and tracks, in the released Molmo2 format ({export.dtype}). transformers 5.23 or
newer loads it without remote code: `AutoModelForImageTextToText.from_pretrained(folder)` and
`AutoProcessor.from_pretrained(folder)`.

| | |
| --- | --- |
| decoder | {decoder.num_layers} layers, width {decoder.width}, {decoder.vocab_size} tokens |
| vision encoder | {model.config.vision_encoder.num_layers} blocks, crops of {model.config.geometry.crop_size} pixels |
| recipe fingerprint | `{lineage.recipe_fingerprint}` |
| training stage, step | {lineage.stage}, {lineage.step} |
| checkpoint digest | `{lineage.checkpoint_digest}` |

## Data
| dataset | content digest (sha256) |
| --- | --- |
{datasets}

## To know
- transformers samples video frames without the last instant that training always includes.
- The chat template puts a space before past assistant turns, as the released one does; training has none.
"""
