"""Loss on held-out examples while training goes on, as one of Composer's evaluators.

Composer runs it between a step's end and its checkpoint, without gradients and in evaluation mode, on all ranks.  It
draws nothing from a random state and touches no position, so that training goes on as if it had not been.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from composer import Callback, DataSpec, Evaluator, Event, State
from composer.devices import Device
from composer.utils import dist
from torchmetrics import Metric

from molmo2core.annotations import TASKS
from molmo2core.examples import DOCUMENT, PADDING, Batch
from molmo2core.loading.held_out import HeldOutBatches, HeldOutPacks
from molmo2core.model.loss import LossParts
from molmo2core.model.molmo2 import Molmo2
from molmo2core.packing.config import PackingConfig
from molmo2core.parallel.batch_sharding import shard_of
from molmo2core.training.batches import microbatch_maker, packs_per_microbatch
from molmo2core.training.callbacks.held_out_answers import Answerer, HeldOutAnswers
from molmo2core.training.callbacks.validation_file import ValidationFile
from molmo2core.training.config import DropoutConfig, TrainingConfig

LABEL, METRIC = "validation", "loss"


class HeldOutLoss(Metric):
    """Weighted mean cross-entropy by dataset and by task over all ranks, each target counted once.

    Sums are kept in float64: they do not depend on how targets fall to ranks, up to its rounding.

    Args:
        datasets: names that `dataset_ids` of a microbatch count through.
    """

    full_state_update = False
    sums: torch.Tensor
    """float64 [datasets, tasks, 2] sums of weight * CE and of weights."""
    z: torch.Tensor
    """float64 [] weighted sum."""

    def __init__(self, datasets: tuple[str, ...]) -> None:
        super().__init__()
        self.datasets = datasets
        shape = (len(datasets), len(TASKS), 2)
        self.add_state("sums", default=torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("z", default=torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.line: dict[str, Any] = {}
        """Of the last `compute`: `loss`, `z`, `loss_by_dataset`, `loss_by_task` and `weight`, the sum of weights."""

    def update(self, parts: LossParts, microbatch: dict[str, Any]) -> None:
        """Add what one forward pass gave."""
        chosen = parts.places
        places = microbatch["dataset_ids"][chosen] * len(TASKS) + microbatch["task_ids"][chosen]
        weights = microbatch["loss_weights"][chosen].double()
        numbers = torch.stack([weights * parts.token_losses, weights], dim=1)
        self.sums.view(-1, 2).index_add_(0, places, numbers)
        self.z += parts.z

    def compute(self) -> torch.Tensor:
        """The mean over all targets, as training would weigh them."""
        total, weight = self.sums.sum(dim=(0, 1)).tolist()
        self.line = {
            "loss": total / weight if weight else 0.0,
            "z": float(self.z) / weight if weight else 0.0,
            "loss_by_dataset": _means(self.datasets, self.sums.sum(dim=1)),
            "loss_by_task": _means(TASKS, self.sums.sum(dim=0)),
            "weight": weight,
        }
        return torch.tensor(self.line["loss"])


@dataclass(frozen=True, kw_only=True)
class Validation:
    """What Composer's Trainer is told."""

    evaluator: Evaluator
    metrics: dict[str, Metric]
    """Of the model, by name."""
    callbacks: tuple[Callback, ...]
    """Behind those that watch training."""


def build_validation(
    packs: HeldOutPacks,
    model: Molmo2,
    config: TrainingConfig,
    *,
    device: Device,
    packing: PackingConfig,
    metrics: Path,
    name: str,
    answerer: Answerer | None,
) -> Validation:
    """Validation of one stage.  Arguments as of training.trainer.train.

    Args:
        packs: at least one.
    """
    group, context_rank = divmod(dist.get_global_rank(), config.context_parallel)
    size = packs_per_microbatch(config, device, packing.sequence_tokens)
    maker = replace(microbatch_maker(model, config, context_rank), dropout=DropoutConfig())

    def split(batch: Batch, packs_per_microbatch: int | float) -> list[dict[str, Any]]:
        microbatch: dict[str, Any] = dict(maker.make(batch["packs"], batch["tasks"]))
        ids = datasets_of_tokens(microbatch["subsegment_ids"][0], batch, packs.datasets)
        microbatch["dataset_ids"] = shard_of(ids, context_rank, config.context_parallel)
        return [microbatch]

    data = DataSpec(
        HeldOutBatches(packs, group=group, groups=config.data_parallel, size=size),
        split_batch=split,
        get_num_samples_in_batch=lambda batch: len(batch["packs"]),
        get_num_tokens_in_batch=lambda batch: batch["num_tokens"],
    )
    evaluator = Evaluator(
        label=LABEL,
        dataloader=data,
        metric_names=[METRIC],
        eval_interval=due_every(config.validation.interval_steps, config.steps),
        device_eval_microbatch_size=size,
    )
    callbacks: list[Callback] = [
        ValidationFile(metrics, label=LABEL, metric=METRIC, num_examples=packs.num_examples, name=name)
    ]
    if config.validation.generation_interval_steps:
        callbacks.append(HeldOutAnswers(answerer, config, model.config))
    return Validation(evaluator=evaluator, metrics={METRIC: HeldOutLoss(packs.datasets)}, callbacks=tuple(callbacks))


def due_every(interval: int, steps: int) -> Callable[[State, Event], bool]:
    """After every `interval`-th step, and after the last of `steps`.

    Composer's own intervals also count the end of a training that was asked to stop.
    """

    def is_due(state: State, event: Event) -> bool:
        step = int(state.timestamp.batch.value)
        return event == Event.BATCH_END and (step % interval == 0 or step == steps)

    return is_due


def datasets_of_tokens(subsegment_ids: torch.Tensor, batch: Batch, datasets: tuple[str, ...]) -> torch.Tensor:
    """int64 [S] place in `datasets` of each token's example; PADDING where there is none.

    Args:
        subsegment_ids: int64 [S] of the batch's packs, merged: documents are numbered through.
        batch: whose `datasets` name every document.
    """
    places = {name: place for place, name in enumerate(datasets)}
    found = [places.get(name, PADDING) for names in batch["datasets"] for name in names]
    table = torch.tensor([*found, PADDING])  # the last one: padding, and what is added for packs without images
    return table[(subsegment_ids // DOCUMENT).clamp(max=len(found))]


def _means(names: tuple[str, ...], sums: torch.Tensor) -> dict[str, float]:
    """[names, 2] -> mean of each name that has a target."""
    return {name: value / weight for name, (value, weight) in zip(names, sums.tolist(), strict=True) if weight}
