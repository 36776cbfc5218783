"""Writes losses on held-out examples, for the process that follows training and for the person who watches."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

from composer import Callback
from composer.utils import dist
from torch.distributed.fsdp import FSDPModule

from molmo2core import storage
from molmo2core.loading.deviations import keep_lines_up_to
from molmo2core.training.validation_files import VALIDATION

if TYPE_CHECKING:
    from composer import Logger, State


class ValidationFile(Callback):  # type: ignore[misc]
    """Rank 0 appends one JSON line per validation, and prints it.

    Fields: `step`, `loss` (cross-entropy), `z`, `loss_by_dataset`, `loss_by_task`, `weight` (of all targets),
    `examples`, `seconds` and `time_ms`.

    Args:
        metrics: the metrics file, beside which it writes.
        label: of Composer's evaluator.
        metric: name of a training.validation.HeldOutLoss.
        num_examples: that the loss is of.
        name: what its lines in the log begin with.
    """

    def __init__(self, metrics: Path, *, label: str, metric: str, num_examples: int, name: str) -> None:
        self.path = metrics.with_name(VALIDATION)
        self.label, self.metric, self.num_examples, self.name = label, metric, num_examples, name
        self._started = 0.0

    def fit_start(self, state: State, logger: Logger) -> None:
        """Drop the lines of steps that a killed run did after its last checkpoint; they will be done again."""
        if dist.get_global_rank() == 0:
            keep_lines_up_to(self.path, int(state.timestamp.batch.value))

    def eval_start(self, state: State, logger: Logger) -> None:
        """From here on it is validation's time."""
        self._started = time.monotonic()

    def eval_end(self, state: State, logger: Logger) -> None:
        """One line; and the memory of what FSDP keeps gathered for a backward pass that does not come."""
        if isinstance(state.model.model, FSDPModule):
            state.model.model.reshard()
        if dist.get_global_rank() != 0:
            return
        found = state.eval_metrics[self.label][self.metric].line
        step, seconds = int(state.timestamp.batch.value), time.monotonic() - self._started
        line = {
            "step": step,
            **found,
            "examples": self.num_examples,
            "seconds": round(seconds, 3),
            "time_ms": int(time.time() * 1000),
        }
        storage.append_text(self.path, json.dumps(line) + "\n")
        tasks = ", ".join(f"{task} {loss:.3f}" for task, loss in found["loss_by_task"].items())
        print(
            f"{self.name}: step {step}: loss {found['loss']:.3f} on {self.num_examples} held-out examples "
            f"({tasks}), {seconds:.1f} s",
            flush=True,
        )
