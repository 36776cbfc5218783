"""A stage on one GPU as the large recipes run it: mixed precision, FlexAttention, recomputed and compiled blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from composer.utils import dist

from molmo2core.testing.training import training_config
from molmo2core.testing.training_ranks import train_tiny
from molmo2core.training.config import CheckpointedActivations, DropoutConfig, GroupSchedule, OptimizerConfig

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

_RATE = GroupSchedule(learning_rate=1e-2, warmup_steps=1)
_STAGE: dict[str, Any] = {
    "steps": 6,
    # A large epsilon makes AdamW nearly linear in the gradient: rounding stays as small as it is.
    "optimizer": OptimizerConfig(vision_encoder=_RATE, connector=_RATE, decoder=_RATE, eps=1.0),
    "dropout": DropoutConfig(residual=0.1, response_residual=0.1),
}
_EVERYTHING = CheckpointedActivations(vision_encoder=1, connector=True, decoder=1)
WAYS: dict[str, dict[str, Any]] = {
    "flex": {"attention": "flex"},
    "recomputed": {"attention": "flex", "activation_checkpointing": _EVERYTHING},
    "compiled": {"attention": "flex", "compile": True},
    "all": {"attention": "auto", "activation_checkpointing": _EVERYTHING, "compile": True},
}


@pytest.fixture(scope="module")
def in_float32(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses with SDPA; each step's packs, of many lengths and some without images, are the same in every way."""
    _, lines = train_tiny(tmp_path_factory.mktemp("fp32"), training_config(**_STAGE, attention="sdpa"))
    return [line["loss"] for line in lines]


@pytest.mark.parametrize("way", WAYS)
def test_a_stage_in_mixed_precision(in_float32: list[float], way: str, tmp_path: Path) -> None:
    """Would catch a dtype that a kernel refuses in the recomputed pass, a compiled block that autocast does not reach,
    dropout that compiled code draws otherwise, and more programs than torch allows (an error in FlexAttention).

    Tolerance: under autocast on a CPU, losses of these packs differ by up to 5e-4, relative.
    """
    assert dist.get_world_size() == 1
    weights, lines = train_tiny(tmp_path, training_config(**_STAGE | WAYS[way], precision="amp_bf16"))
    assert weights is not None and all(weight.isfinite().all() for weight in weights.values())
    assert all(weight.dtype == torch.float32 for weight in weights.values())
    assert [line["loss"] for line in lines] == pytest.approx(in_float32, rel=2e-3)
    if WAYS[way].get("compile"):
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
