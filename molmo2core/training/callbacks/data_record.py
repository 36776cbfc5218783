"""What all ranks were really given, step by step, and where it departed from the plan."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, Protocol

from composer.utils import dist

from molmo2core import storage
from molmo2core.examples import Deviation
from molmo2core.loading.deviations import (
    CHANGED_DATA,
    DEVIATIONS,
    DeviationRecord,
    append_lines,
    keep_lines_up_to,
)
from molmo2core.loading.provenance import Change
from molmo2core.packing.config import PackingConfig
from molmo2core.training.callbacks.metrics_file import read_metrics
from molmo2core.training.callbacks.step_record import OwnNumbers, StepSource

if TYPE_CHECKING:
    from composer import Logger, State

    from molmo2core.examples import Batch


class DataSource(Protocol):
    """What is asked of a loader's dataset (loading.dataset.PackDataset)."""

    @property
    def datasets(self) -> tuple[str, ...]:
        """Names that batches count examples by."""

    @property
    def changes(self) -> tuple[Change, ...]:
        """Accepted differences from the data of the checkpoint that was resumed from."""


class DataRecord(StepSource):
    """`packs`, `tokens`, `examples` and `crops` of all ranks' batches; `fill` of the packs' budgets (tokens, crops);
    `drawn` (examples by dataset); `replaced` (broken media since step 0); `waits` in seconds: `for_data`, training's,
    of the slowest rank, and `for_device`, a loader worker's, on average.

    Rank 0 appends every deviation to `deviations.jsonl` beside the metrics.  Too many broken media end training on
    all ranks at once; they are counted over all ranks and steps, also those before a resume.

    Args:
        metrics: the metrics file.
        source: the loader's dataset.
        packing: budgets of a pack.
        counts: whether this rank's batch counts; ranks that share sequences see the same batch.
    """

    def __init__(self, metrics: Path, *, source: DataSource, packing: PackingConfig, counts: bool) -> None:
        self.metrics, self.source, self.packing, self.counts = metrics, source, packing, counts
        self._deviations: list[Deviation] = []
        self._record = DeviationRecord()

    def fit_start(self, state: State, logger: Logger) -> None:
        """Take up the count where the checkpoint was made."""
        step = int(state.timestamp.batch.value)
        found: list[tuple[int, list[dict[str, Any]]]] = [(0, [])]
        if dist.get_global_rank() == 0:
            lines = keep_lines_up_to(self._file, step)
            drawn = sum(line["examples"] for line in read_metrics(self.metrics) if line["step"] <= step)
            found = [(drawn, [line for line in lines if line["kind"] != CHANGED_DATA])]
            if self.source.changes:
                self._write_changes(step, lines)
        if dist.get_world_size() > 1:
            dist.broadcast_object_list(found, src=0)
        (drawn, lines), fields = found[0], [field.name for field in dataclasses.fields(Deviation)]
        self._record = DeviationRecord()
        self._record.add([Deviation(**{name: line[name] for name in fields}) for line in lines], drawn)

    def own(self, state: State) -> OwnNumbers:
        """Counts of this rank's batch."""
        batch: Batch = state.batch
        drawn = Counter(itertools.chain.from_iterable(batch["datasets"]))
        self._deviations = batch["deviations"] if self.counts else []
        counts = {
            "tokens": batch["num_tokens"],
            "crops": batch["num_crops"],
            "packs": len(batch["packs"]),
            "examples": batch["num_examples"],
            "deviations": len(batch["deviations"]),
        }
        counts |= {f"of {name}": drawn[name] for name in self.source.datasets}
        waits = {"for_data": batch["data_wait_seconds"], "for_device": batch["loader_idle_seconds"]}
        return OwnNumbers(summed={name: count * self.counts for name, count in counts.items()}, each=waits)

    def fields(self, step: int, summed: Mapping[str, float], each: Mapping[str, Sequence[float]]) -> dict[str, Any]:
        """See the class.

        Raises:
            DataError: too many media are broken (loading/deviations.py).
        """
        deviations = self._deviations
        if summed["deviations"]:
            everybodys = dist.all_gather_object(deviations) if dist.get_world_size() > 1 else [deviations]
            deviations = [deviation for ranks_own in everybodys for deviation in ranks_own]
        self._record.add(deviations, int(summed["examples"]))
        if deviations and dist.get_global_rank() == 0:
            append_lines(self._file, step, deviations)
        self._record.check(f"training step {step}")
        drawn = {name: int(summed[f"of {name}"]) for name in self.source.datasets}
        packs, packing = summed["packs"], self.packing
        return {
            "packs": int(packs),
            "tokens": int(summed["tokens"]),
            "examples": int(summed["examples"]),
            "crops": int(summed["crops"]),
            "fill": {
                "tokens": round(summed["tokens"] / (packs * packing.sequence_tokens), 4),
                "crops": round(summed["crops"] / (packs * max(packing.crop_budget, 1)), 4),
            },
            "drawn": {name: count for name, count in drawn.items() if count},
            "replaced": self._record.num_replaced,
            "waits": {
                "for_data": round(max(each["for_data"]), 4),
                "for_device": round(fmean(each["for_device"]), 4),
            },
        }

    @property
    def _file(self) -> Path:
        return self.metrics.with_name(DEVIATIONS)

    def _write_changes(self, step: int, lines: list[dict[str, Any]]) -> None:
        """Once, however often training is killed before it saves again."""
        if any(line["kind"] == CHANGED_DATA and line["step"] == step for line in lines):
            return
        line = {"step": step, "kind": CHANGED_DATA, "changes": [str(change) for change in self.source.changes]}
        storage.append_text(self._file, json.dumps(line) + "\n")
