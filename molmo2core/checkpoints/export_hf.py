"""A Molmo2 as a Hugging Face folder in the released format (model.md 3).  See verify.py for its acceptance."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from molmo2core.checkpoints.config import ExportConfig
from molmo2core.checkpoints.hf_config import released_config
from molmo2core.checkpoints.hf_mapping import to_released
from molmo2core.checkpoints.model_card import Lineage, model_card
from molmo2core.checkpoints.processor_files import write_json, write_processor_files
from molmo2core.checkpoints.weight_files import Progress, silent, write_weights
from molmo2core.errors import CheckpointError
from molmo2core.model.config import ModelConfig
from molmo2core.model.molmo2 import Molmo2
from molmo2core.preprocessing.config import PreprocessingConfig
from molmo2core.special_tokens import EXTRA_TOKENS, IM_PATCH, SpecialTokens, load_tokenizer


def export_model(
    folder: Path,
    model: Molmo2,
    tokenizer: Path,
    *,
    export: ExportConfig,
    preprocessing: PreprocessingConfig,
    lineage: Lineage,
    progress: Progress = silent,
) -> None:
    """Write the complete released-format folder of `model` into the existing, empty `folder`.

    Args:
        tokenizer: folder with `tokenizer.json`.

    Raises:
        CheckpointError: the tokenizer is one of another model.
        DataError: the tokenizer is missing or lacks a special token.
    """
    special = load_tokenizer(tokenizer).special
    check_vocabulary(special, model.config, str(tokenizer))
    write_processor_files(folder, tokenizer, model.config.geometry, preprocessing)
    write_json(folder / "config.json", released_config(model.config, special, dtype=export.dtype))
    write_json(
        folder / "generation_config.json",
        {"bos_token_id": special.bos, "eos_token_id": special.eos, "pad_token_id": special.pad},
    )
    write_weights(folder, _in_dtype(model, export), export.shard_bytes, progress)
    (folder / "README.md").write_text(model_card(model, export.dtype, lineage))


def _in_dtype(model: Molmo2, export: ExportConfig) -> Iterator[tuple[str, Tensor]]:
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[export.dtype]
    for name, tensor in to_released(model.state_dict(), model.config):
        yield name, tensor.to(dtype)


def check_vocabulary(special: SpecialTokens, config: ModelConfig, where: str) -> None:
    """Refuse the tokenizer of another model: its new tokens do not follow the model's base vocabulary.

    Raises:
        CheckpointError: they do not.
    """
    expected = config.decoder.vocab_size + EXTRA_TOKENS.index(IM_PATCH)
    if special.im_patch != expected:
        raise CheckpointError(
            where,
            found=f"<im_patch> has id {special.im_patch}",
            expected=f"{expected}: new tokens follow the model's {config.decoder.vocab_size} rows",
            mend="use the tokenizer that the model was trained with",
        )
