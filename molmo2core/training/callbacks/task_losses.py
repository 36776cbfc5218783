"""Loss of each task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from molmo2core.annotations import TASKS
from molmo2core.examples import PADDING
from molmo2core.training.callbacks.step_record import OwnNumbers, StepSource

if TYPE_CHECKING:
    from composer import Logger, State


class TaskLosses(StepSource):
    """`loss_by_task`: weighted mean cross-entropy of each task's targets, of all ranks' microbatches and shares.

    The step's `loss` is their mean, each with the weight of its targets.
    """

    def __init__(self) -> None:
        self._sums = torch.zeros(0)
        """[tasks, 2] sums of weight * CE and of weights, on the device, so that no microbatch waits for it."""

    def before_train_batch(self, state: State, logger: Logger) -> None:
        """Start again."""
        self._sums = state.device.tensor_to_device(torch.zeros(len(TASKS), 2, dtype=torch.float64))

    def after_loss(self, state: State, logger: Logger) -> None:
        """Add one microbatch."""
        parts = state.model.parts
        tasks = state.batch["task_ids"][parts.places]
        weights = state.batch["loss_weights"][parts.places].double()
        weights = torch.where(tasks == PADDING, 0.0, weights)
        numbers = torch.stack([weights * parts.token_losses, weights], dim=1)
        self._sums.index_add_(0, tasks.clamp(min=0), numbers)

    def own(self, state: State) -> OwnNumbers:
        """Both sums of every task."""
        sums = self._sums.tolist()
        losses = {f"{task} loss": row[0] for task, row in zip(TASKS, sums, strict=True)}
        return OwnNumbers(summed=losses | {f"{task} weight": row[1] for task, row in zip(TASKS, sums, strict=True)})

    def fields(self, step: int, summed: Mapping[str, float], each: Mapping[str, Sequence[float]]) -> dict[str, Any]:
        """Tasks without a target in this step are left out."""
        weights = {task: summed[f"{task} weight"] for task in TASKS}
        means = {task: summed[f"{task} loss"] / weight for task, weight in weights.items() if weight}
        return {"loss_by_task": means}
