"""What all ranks have to say about a step, brought together in one all-reduce."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from composer import Callback
from composer.utils import dist

if TYPE_CHECKING:
    from composer import Logger, State


@dataclass(frozen=True, kw_only=True)
class OwnNumbers:
    """One rank's.  The names are the same on all ranks."""

    summed: Mapping[str, float] = field(default_factory=dict)
    """Added over ranks."""
    each: Mapping[str, float] = field(default_factory=dict)
    """Kept for each rank."""


class StepSource(Callback):  # type: ignore[misc]
    """A callback that measures something on every rank."""

    @abstractmethod
    def own(self, state: State) -> OwnNumbers:
        """What this rank measured in the step that just ended."""

    @abstractmethod
    def fields(self, step: int, summed: Mapping[str, float], each: Mapping[str, Sequence[float]]) -> dict[str, Any]:
        """Fields of the step's metrics line (callbacks/metrics_file.py), the same on every rank.

        Args:
            step: number of the step, from 1.
            summed: over all ranks, by the names of this source's OwnNumbers.
            each: by rank.
        """


class StepRecord(Callback):  # type: ignore[misc]
    """Asks every source at the end of a step; `line` then holds their fields.

    Args:
        sources: in the order of their fields.  They are callbacks of the trainer as well.
    """

    def __init__(self, sources: Sequence[StepSource]) -> None:
        self.sources = tuple(sources)
        self.line: dict[str, Any] = {}

    def batch_end(self, state: State, logger: Logger) -> None:
        """One all-reduce, in float64: counts stay whole numbers."""
        own = [source.own(state) for source in self.sources]
        rank, ranks = dist.get_global_rank(), dist.get_world_size()
        sums = torch.tensor([value for numbers in own for value in numbers.summed.values()], dtype=torch.float64)
        each = torch.zeros(ranks, sum(len(numbers.each) for numbers in own), dtype=torch.float64)
        each[rank] = torch.tensor([value for numbers in own for value in numbers.each.values()], dtype=torch.float64)
        if ranks > 1:
            flat = state.device.tensor_to_device(torch.cat([sums, each.flatten()]))
            dist.all_reduce(flat, reduce_operation="SUM")
            sums, each = flat[: len(sums)], flat[len(sums) :].view(ranks, -1)
        of_sums, of_each = iter(sums.tolist()), iter(each.T.tolist())
        step = int(state.timestamp.batch.value)
        self.line = {}
        for source, numbers in zip(self.sources, own, strict=True):
            summed = {name: next(of_sums) for name in numbers.summed}
            by_rank = {name: next(of_each) for name in numbers.each}
            self.line |= source.fields(step, summed, by_rank)
