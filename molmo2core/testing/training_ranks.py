"""What each rank of a distributed test of training does (importable, since ranks are spawned)."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from composer import Callback, Trainer

from molmo2core.errors import Molmo2Error
from molmo2core.model.molmo2 import Molmo2
from molmo2core.testing.tiny_model import tiny_model
from molmo2core.testing.training import PACKING, pack_loader, training_config
from molmo2core.training import trainer
from molmo2core.training.config import DropoutConfig, TrainingConfig

DROPOUT = DropoutConfig(residual=0.1, response_residual=0.1)


def train_tiny(
    folder: Path, config: TrainingConfig, *, loader: dict[str, Any] | None = None, model: Molmo2 | None = None
) -> tuple[dict[str, torch.Tensor] | None, list[dict[str, Any]]]:
    """Train a tiny model on random packs; the weights (on rank 0) and all metrics."""
    device, group, _ = trainer.start_ranks(config)
    model = model or tiny_model()
    weights = trainer.train(
        model,
        pack_loader(model.config, config, group=group, **(loader or {})),
        config,
        device=device,
        folder=folder,
        metrics=folder / "metrics.jsonl",
        name="test",
        seed=0,
        packing=PACKING,
    )
    return weights, metrics_of(folder)


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    """Lines of the metrics file."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def train_in_every_way(folder: Path, changes: dict[str, Any]) -> dict[str, Any]:
    """On two ranks, which cost seconds to start: all that the tests look at."""
    results: dict[str, Any] = {}
    two = training_config(num_processes=2, **changes)
    with mock.patch.object(trainer, "average_gradients_on_gloo"):
        results["unguarded"] = train_tiny(folder / "unguarded", two)
    results["fsdp"] = train_tiny(folder / "fsdp", two)
    together = training_config(num_processes=2, context_parallel=2, **changes)
    results["context_parallel"] = train_tiny(folder / "context_parallel", together)
    results["dict_config"] = _error_of(_train_with_a_dict, folder / "dict", two)
    return results | stop_and_resume(folder / "stopped", changes | {"steps": 4, "dropout": DROPOUT})


def stop_and_resume(folder: Path, changes: dict[str, Any]) -> dict[str, Any]:
    """On two ranks: SIGTERM on one of them after step 2, then the same training again; and a NaN on one rank."""
    config = training_config(num_processes=2, **changes)
    results: dict[str, Any] = {}
    with signal_after(2, rank=1):
        results["stopped"] = _error_of(train_tiny, folder, config)
    results["saved"] = sorted(path.name for path in folder.iterdir())
    results["resumed"] = train_tiny(folder, config)
    results["undisturbed"] = train_tiny(folder / "undisturbed", config)
    poisoned = tiny_model()
    if dist.get_rank() == 1:
        with torch.no_grad():
            poisoned.vision_encoder.patch_embedding.weight.fill_(float("nan"))
    results["nan"] = _error_of(train_tiny, folder / "nan", config, model=poisoned)
    results["nan_saved"] = [path.name for path in (folder / "nan").glob("*ba*")]
    # Packs 4 ... 7 are of the second step, 6 and 7 of rank 1.
    results["bad_pack"] = _error_of(train_tiny, folder / "bad_pack", config, loader={"bad_pack": 6})
    results["refused"] = json.loads((folder / "bad_pack" / "refused-step-2.json").read_text())
    return results


class SignalAfter(Callback):  # type: ignore[misc]
    """Sends this process SIGTERM while a step runs."""

    def __init__(self, step: int, rank: int) -> None:
        self.step, self.rank = step, rank

    def after_backward(self, state: Any, logger: Any) -> None:
        here = not dist.is_initialized() or dist.get_rank() == self.rank
        if here and state.timestamp.batch.value + 1 == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def signal_after(step: int, rank: int = 0) -> Any:
    """Context in which trainings get SIGTERM on `rank` while step `step` runs."""

    def with_signal(**arguments: Any) -> Trainer:
        arguments["callbacks"] = [*arguments["callbacks"], SignalAfter(step, rank)]
        return Trainer(**arguments)

    return mock.patch.object(trainer, "Trainer", with_signal)


def _train_with_a_dict(folder: Path, config: TrainingConfig) -> None:
    def with_dict(**arguments: Any) -> Trainer:
        arguments["parallelism_config"] = {"fsdp2": {"state_dict_type": "sharded"}}
        return Trainer(**arguments)

    with mock.patch.object(trainer, "Trainer", with_dict):
        train_tiny(folder, config)


def _error_of(function: Any, *arguments: Any, **named: Any) -> str:
    try:
        function(*arguments, **named)
    except Molmo2Error as error:
        return f"{type(error).__name__}: {error}"
    return "no error"
