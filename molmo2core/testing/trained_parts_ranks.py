"""What ranks do in the test of frozen parts and adapters (importable, since ranks are spawned)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from composer.utils import dist

from molmo2core.errors import Molmo2Error
from molmo2core.model.molmo2 import Molmo2
from molmo2core.testing.tiny_model import tiny_model
from molmo2core.testing.training import training_config
from molmo2core.testing.training_ranks import signal_after, train_tiny
from molmo2core.training.config import GroupSchedule, LowRankConfig, OptimizerConfig, TrainableParts, TrainingConfig

_RATE = GroupSchedule(learning_rate=1e-2, warmup_steps=1)
# A large epsilon makes AdamW nearly linear in the gradient, so that a wrong scale of gradients shows in the weights.
_LINEAR = OptimizerConfig(vision_encoder=_RATE, connector=_RATE, decoder=_RATE, eps=1.0, clip_norm=0.5)
WAYS: dict[str, dict[str, Any]] = {
    # Blocks that are one unit of FSDP and frozen; a root unit that is partly frozen.
    "frozen_vision": {"trainable": TrainableParts(vision_encoder=False, input_embedding=False)},
    "frozen_decoder": {"trainable": TrainableParts(decoder=False, output_head=False)},
    # FSDP sees no gradient arrive at the model.
    "head_alone": {
        "trainable": TrainableParts(
            input_embedding=False, final_norm=False, vision_encoder=False, connector=False, decoder=False
        ),
    },
    # Of a rank of 1, the second process has no row of A; frozen matrices and adapters lie in the same unit.
    "low_rank": {
        "trainable": TrainableParts(
            input_embedding=False, output_head=False, final_norm=False, vision_encoder=False, decoder=False
        ),
        "low_rank": LowRankConfig(rank=1, alpha=8.0, parts=("decoder_attention", "decoder_mlp", "vision_encoder")),
    },
}


def train_every_way(folder: Path, processes: int) -> dict[str, Any]:
    """Weights and metrics of each way; and of adapters whose training was stopped after step 2 and goes on."""
    results: dict[str, Any] = {}
    for way, changes in WAYS.items():
        config = training_config(num_processes=processes, steps=4, optimizer=_LINEAR, **changes)
        results[way] = train_tiny(folder / way, config, model=_model())
    with signal_after(2):
        results["stopped"] = _error_of(folder / "stopped", config)
    low_rank = replace(WAYS["low_rank"]["low_rank"], alpha=4.0)
    results["other_scale"] = _error_of(folder / "stopped", replace(config, low_rank=low_rank))
    results["resumed"] = train_tiny(folder / "stopped", config)
    return results


def _model() -> Molmo2:
    """Weights on the first rank alone, as when they are read from files."""
    model = tiny_model()
    return model if dist.get_global_rank() == 0 else model.to("meta")


def _error_of(folder: Path, config: TrainingConfig) -> str:
    try:
        train_tiny(folder, config)
    except Molmo2Error as error:
        return f"{type(error).__name__}: {error}"
    return "no error"
