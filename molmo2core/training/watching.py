"""Everything that looks at training while it runs, in the order in which it looks."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from composer import Callback
from torch.utils.data import DataLoader

from molmo2core.examples import Batch
from molmo2core.model.molmo2 import Molmo2
from molmo2core.packing.config import PackingConfig
from molmo2core.training.callbacks.data_record import DataRecord, DataSource
from molmo2core.training.callbacks.group_clipping import GroupClipping
from molmo2core.training.callbacks.memory import Memory
from molmo2core.training.callbacks.metrics_file import MetricsFile
from molmo2core.training.callbacks.speed import Speed
from molmo2core.training.callbacks.step_guard import StepGuard
from molmo2core.training.callbacks.step_record import StepRecord
from molmo2core.training.callbacks.task_losses import TaskLosses
from molmo2core.training.config import TrainingConfig


def watching_callbacks(
    model: Molmo2,
    config: TrainingConfig,
    *,
    metrics: Path,
    name: str,
    loader: DataLoader[Batch],
    packing: PackingConfig,
    clipping: GroupClipping,
    counts: bool,
) -> list[Callback]:
    """The guard first, so that what they refuse is not written as a metric of a good step.

    Args:
        model: before its parameters are sharded.
        counts: whether this rank's batch counts; ranks that share sequences see the same batch.
    """
    sources = [
        StepGuard(metrics, name=name, clipping=clipping, spikes=config.spike_guard),
        TaskLosses(),
        DataRecord(metrics, source=cast(DataSource, loader.dataset), packing=packing, counts=counts),
        Speed(model, config, counts=counts),
        Memory(),
    ]
    record = StepRecord(sources)
    file = MetricsFile(
        metrics,
        clipping=clipping,
        record=record,
        steps=config.steps,
        print_interval=config.log_interval_steps,
        name=name,
    )
    return [*sources, record, file]
