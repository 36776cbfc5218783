"""How fast a step was."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from composer.utils import dist

from molmo2core.model.molmo2 import Molmo2
from molmo2core.training.callbacks.step_record import OwnNumbers, StepSource
from molmo2core.training.config import TrainingConfig
from molmo2core.training.flops import (
    forward_flops,
    pack_counts,
    peak_flops,
    recomputed_flops,
    recomputed_shares,
    trained_shares,
    training_flops,
)

if TYPE_CHECKING:
    from composer import Logger, State


class Speed(StepSource):
    """`seconds` of the step, on the slowest rank, with all that happens between steps (data, saving, validation);
    `flops`, operations of all ranks (training/flops.py): `model`, and `recomputed` by activation checkpointing;
    `speed`: `tokens_per_second` of all ranks and, on a GPU whose peak is known, the shares of all GPUs' peak that the
    model's operations (`mfu`) and all operations (`hfu`) reach.

    Args:
        model: before its parameters are sharded.
        counts: whether this rank's batch counts; ranks that share sequences see the same batch.
    """

    def __init__(self, model: Molmo2, config: TrainingConfig, *, counts: bool) -> None:
        self.model_config, self.counts = model.config, counts
        self.trained = trained_shares(model)
        self.recomputed = recomputed_shares(model.config, config.activation_checkpointing)
        self.peak = config.peak_teraflops * 1e12 or None
        if self.peak is None and torch.cuda.is_available():
            self.peak = peak_flops(torch.cuda.get_device_name())
        self._last = 0.0

    def fit_start(self, state: State, logger: Logger) -> None:
        """The first step starts here."""
        self._last = time.monotonic()

    def own(self, state: State) -> OwnNumbers:
        """Operations of this rank's packs and its time."""
        now = time.monotonic()
        seconds, self._last = now - self._last, now
        counted = pack_counts(state.batch["packs"] if self.counts else [])
        forward = forward_flops(self.model_config, counted)
        flops = {"model": training_flops(forward, self.trained)}
        flops["recomputed"] = recomputed_flops(forward, self.recomputed)
        return OwnNumbers(summed=flops | {"tokens": counted.tokens}, each={"seconds": seconds})

    def fields(self, step: int, summed: Mapping[str, float], each: Mapping[str, Sequence[float]]) -> dict[str, Any]:
        """See the class."""
        seconds = max(each["seconds"])
        speed = {"tokens_per_second": round(summed["tokens"] / seconds, 1)}
        if self.peak is not None:
            available = self.peak * dist.get_world_size() * seconds
            speed["mfu"] = round(summed["model"] / available, 4)
            speed["hfu"] = round((summed["model"] + summed["recomputed"]) / available, 4)
        flops = {"model": summed["model"], "recomputed": summed["recomputed"]}
        return {"seconds": round(seconds, 4), "flops": flops, "speed": speed}
