"""Ends training, on all ranks together and with the names of the examples, when its loss is no longer sane."""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from composer.utils import dist

from molmo2core import storage
from molmo2core.errors import RecipeError
from molmo2core.training.callbacks.group_clipping import GroupClipping
from molmo2core.training.callbacks.metrics_file import read_metrics
from molmo2core.training.callbacks.step_record import OwnNumbers, StepSource
from molmo2core.training.config import SpikeGuardConfig
from molmo2core.training.refused_steps import REFUSED, described, inspect_command, suspects

if TYPE_CHECKING:
    from composer import Logger, State

    from molmo2core.examples import Batch


class StepGuard(StepSource):
    """Refuses a step whose loss or gradient is not finite, before it changes a weight, and losses that stay spikes.

    Both are known alike to all ranks without a word: norms and the step's loss are sums over them.  Only when one is
    refused do ranks tell each other the losses and examples of their microbatches; rank 0 writes them to
    `refused-step-<n>.json` beside the metrics.  (Composer's NaNMonitor looks at each rank's own loss and leaves the
    other ranks hanging in a collective.)

    `spikes`: how many steps in a row, this one included, had such a loss.

    Args:
        metrics: the metrics file, from whose kept steps the mean loss is taken up after a resume.
        name: of the training stage.
        clipping: an algorithm, which Composer runs before callbacks.
        spikes: when a loss is a spike.
    """

    def __init__(self, metrics: Path, *, name: str, clipping: GroupClipping, spikes: SpikeGuardConfig) -> None:
        self.metrics, self.name, self.clipping, self.spikes = metrics, name, clipping, spikes
        self._losses: list[tuple[torch.Tensor, int]] = []
        """Of this rank's microbatches of the step, and the number of their packs."""
        self._before: deque[float] = deque(maxlen=spikes.window)
        self._streak = 0

    def fit_start(self, state: State, logger: Logger) -> None:
        """Take up the mean and the streak where the checkpoint was made, so that a resumed run ends as another."""
        found: list[list[float]] = [[]]
        if dist.get_global_rank() == 0:
            step = int(state.timestamp.batch.value)
            found = [[line["loss"] for line in read_metrics(self.metrics) if line["step"] <= step]]
        if dist.get_world_size() > 1:
            dist.broadcast_object_list(found, src=0)
        self._before.clear()
        self._streak = 0
        for loss in found[0]:
            self._count(loss)

    def before_train_batch(self, state: State, logger: Logger) -> None:
        """Start again."""
        self._losses = []

    def after_loss(self, state: State, logger: Logger) -> None:
        """Remember a microbatch's loss, on the device: nothing waits for it."""
        self._losses.append((state.loss["total"].detach().clone(), state.batch["num_packs"]))

    def after_train_batch(self, state: State, logger: Logger) -> None:
        """Between clipping and the update.

        Raises:
            RecipeError: a gradient norm is not finite.
        """
        bad = {group: norm for group, norm in self.clipping.norms.items() if not math.isfinite(norm)}
        if bad:
            norms = ", ".join(f"{norm} in {group}" for group, norm in bad.items())
            self._refuse(
                state, int(state.timestamp.batch.value) + 1, f"gradient norm {norms}", "a finite norm", math.inf
            )

    def batch_end(self, state: State, logger: Logger) -> None:
        """Before the metrics of this step are written and its checkpoint is saved.

        Raises:
            RecipeError: the loss is not finite, or the last steps' losses were all spikes.
        """
        step, losses = int(state.timestamp.batch.value), state.total_loss_dict
        for name, value in losses.items():
            if not math.isfinite(value):
                self._refuse(state, step, f"{name} = {value}", "a finite loss", math.inf)
        loss, limit = losses["loss/train/cross_entropy"], self.limit
        self._count(loss)
        if not self._streak or limit is None:
            return
        found = f"loss {loss:.3f}, spike number {self._streak} in a row"
        expected = (
            f"less than {limit:.3f}, {self.spikes.factor:g} times the mean of {self.spikes.window} steps "
            f"and {self.spikes.least_rise:g} above it"
        )
        if self._streak >= self.spikes.patience:
            self._refuse(state, step, found, expected, limit)
        if dist.get_global_rank() == 0:
            print(f"{self.name}: step {step}: {found}; expected {expected}", flush=True)

    @property
    def limit(self) -> float | None:
        """Losses from here on are spikes; None: too few steps are known, or nobody asked."""
        if not self.spikes.patience or len(self._before) < self.spikes.window:
            return None
        mean = fmean(self._before)
        return max(self.spikes.factor * mean, mean + self.spikes.least_rise)

    def own(self, state: State) -> OwnNumbers:
        """Nothing: all ranks know the same."""
        return OwnNumbers()

    def fields(self, step: int, summed: Mapping[str, float], each: Mapping[str, Sequence[float]]) -> dict[str, Any]:
        """See the class."""
        return {"spikes": self._streak}

    def _count(self, loss: float) -> None:
        limit = self.limit
        if limit is not None and loss >= limit:
            self._streak += 1
        else:
            self._streak = 0
            self._before.append(loss)

    def _refuse(self, state: State, step: int, found: str, expected: str, limit: float) -> NoReturn:
        own = self._own_microbatches(state.batch)
        everybodys = dist.all_gather_object(own) if dist.get_world_size() > 1 else [own]
        microbatches = [microbatch for ranks_own in everybodys for microbatch in ranks_own]
        bad = suspects(microbatches, limit)
        place = self.metrics.with_name(REFUSED.format(step))
        if dist.get_global_rank() == 0:
            content = {"stage": self.name, "step": step, "found": found, "expected": expected}
            content |= {"suspects": bad, "microbatches": microbatches}
            storage.write_bytes(str(place), json.dumps(content, indent=1).encode())
        dist.barrier()  # a launcher ends all ranks when the first one fails
        raise RecipeError(
            f"{self.name}: training step {step}",
            found=f"{found}; {described(bad)}",
            expected=expected,
            mend=f"look at the packs with `{inspect_command(self.metrics.parent, self.name, bad)}` ({place} names all "
            "of this step's); leave out examples that are wrong, or lower the learning rates",
        )

    def _own_microbatches(self, batch: Batch) -> list[dict[str, Any]]:
        """Loss, packs and examples of each of this rank's microbatches."""
        names = [
            [f"{dataset}/{uid}" for dataset, uid in zip(datasets, uids, strict=True)]
            for datasets, uids in zip(batch["datasets"], batch["uids"], strict=True)
        ]
        packs = [
            {"pack": number, "examples": examples}
            for number, examples in zip(batch["pack_numbers"], names, strict=True)
        ]
        found, first = [], 0
        for loss, count in self._losses:
            of_microbatch = packs[first : first + count]
            found.append({"rank": dist.get_global_rank(), "loss": str(float(loss)), "packs": of_microbatch})
            first += count
        return found
