"""transformers' own Molmo2 with the weights of one of ours, by way of an exported folder."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from molmo2core.checkpoints.hf_config import released_config
from molmo2core.checkpoints.hf_mapping import to_released
from molmo2core.checkpoints.native import load_native
from molmo2core.checkpoints.processor_files import write_json
from molmo2core.checkpoints.weight_files import write_weights
from molmo2core.model.molmo2 import Molmo2
from molmo2core.special_tokens import EXTRA_TOKENS, IM_START, SpecialTokens
from molmo2core.testing.tiny_tokenizer import tiny_tokenizer


def native_twin(model: Molmo2, folder: Path) -> Any:
    """Write `model` into `folder` in the released format and load it as `Molmo2ForConditionalGeneration`, float32."""
    special = special_tokens(model.config.decoder.vocab_size)
    write_json(folder / "config.json", released_config(model.config, special, dtype="float32"))
    write_weights(folder, to_released(model.state_dict(), model.config), 10**9)
    return load_native(folder)


def special_tokens(vocab_size: int) -> SpecialTokens:
    """Those of the tiny tokenizer, with the new tokens behind a vocabulary of `vocab_size`, as in every Molmo2."""
    special = tiny_tokenizer().special
    first = special.im_start - EXTRA_TOKENS.index(IM_START)
    ids = dataclasses.asdict(special)
    return SpecialTokens(**{name: id if id < first else id - first + vocab_size for name, id in ids.items()})
