"""transformers' own Molmo2 with the weights of one of ours, by way of an exported folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from molmo2core.checkpoints.hf_config import released_config
from molmo2core.checkpoints.hf_mapping import to_released
from molmo2core.checkpoints.native import load_native
from molmo2core.checkpoints.processor_files import write_json
from molmo2core.checkpoints.weight_files import write_weights
from molmo2core.model.molmo2 import Molmo2
from molmo2core.testing.tiny_tokenizer import tiny_tokenizer


def native_twin(model: Molmo2, folder: Path) -> Any:
    """Write `model` into `folder` in the released format and load it as `Molmo2ForConditionalGeneration`, float32."""
    write_json(folder / "config.json", released_config(model.config, tiny_tokenizer().special, dtype="float32"))
    write_weights(folder, to_released(model.state_dict(), model.config), 10**9)
    return load_native(folder)
