"""What ranks do in the test of frozen parts and adapters (importable, since ranks are spawned)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from molmo2core.errors import Molmo2Error
from molmo2core.testing.training import training_config
from molmo2core.testing.training_ranks import signal_after, train_tiny
from molmo2core.training.config import GroupSchedule, LowRankConfig, OptimizerConfig, TrainableParts

_RATE = GroupSchedule(learning_rate=1e-2, warmup_steps=1)
# A large epsilon makes AdamW nearly linear in the gradient, so that a wrong scale of gradients shows in the weights.
_LINEAR = OptimizerConfig(vision_encoder=_RATE, connector=_RATE, decoder=_RATE, eps=1.0, clip_norm=0.5)
WAYS: dict[str, dict[str, Any]] = {
    # Blocks that are one unit of FSDP and frozen; a root unit that is partly frozen.
    "frozen_vision": {"trainable": TrainableParts(vision_encoder=False, input_embedding=False)},
    "frozen_decoder": {"trainable": TrainableParts(decoder=False, output_head=False)},
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
        results[way] = train_tiny(folder / way, config)
    with signal_after(2):
        try:
            train_tiny(folder / "stopped", config)
        except Molmo2Error as error:
            results["stopped"] = str(error)
    results["resumed"] = train_tiny(folder / "stopped", config)
    return results
