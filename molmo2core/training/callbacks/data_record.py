"""What all ranks were really given, step by step, and where it departed from the plan."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from composer import Callback
from composer.utils import dist

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


class DataRecord(Callback):  # type: ignore[misc]
    """Sums the small numbers of all ranks' batches in one all-reduce a step; MetricsFile writes them.

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
        self.line: dict[str, Any] = {}
        """Of the last step: `examples`, `crops`, `fill` (tokens, crops), `drawn` (examples by dataset), `waits`
        (seconds: `for_data`, training's, of the slowest rank; `for_device`, a worker's, on average), `replaced`
        (since step 0)."""
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

    def batch_end(self, state: State, logger: Logger) -> None:
        """Sum over ranks.

        Raises:
            DataError: too many media are broken (loading/deviations.py).
        """
        batch: Batch = state.batch
        names, ranks = self.source.datasets, dist.get_world_size()
        deviations = batch["deviations"] if self.counts else []
        counts = [batch["num_tokens"], batch["num_crops"], len(batch["packs"]), batch["num_examples"]]
        counts += [batch["drawn"].get(name, 0) for name in names]
        waits = torch.zeros(ranks, 2, dtype=torch.float64)
        waits[dist.get_global_rank()] = torch.tensor([batch["data_wait_seconds"], batch["loader_idle_seconds"]])
        own = torch.tensor(counts, dtype=torch.float64) * self.counts
        sums = torch.cat([own, torch.tensor([len(deviations)], dtype=torch.float64), waits.flatten()])
        if ranks > 1:
            sums = state.device.tensor_to_device(sums)
            dist.all_reduce(sums, reduce_operation="SUM")
        tokens, crops, packs, examples, *drawn = sums[: len(counts)].tolist()
        if sums[len(counts)]:
            everybodys = dist.all_gather_object(deviations) if ranks > 1 else [deviations]
            deviations = [deviation for ranks_own in everybodys for deviation in ranks_own]
        waits = sums[len(counts) + 1 :].reshape(ranks, 2)
        self._record.add(deviations, int(examples))
        self.line = {
            "examples": int(examples),
            "crops": int(crops),
            "fill": {
                "tokens": round(tokens / (packs * self.packing.sequence_tokens), 4),
                "crops": round(crops / (packs * max(self.packing.crop_budget, 1)), 4),
            },
            "drawn": {name: int(count) for name, count in zip(names, drawn, strict=True) if count},
            "replaced": self._record.num_replaced,
            "waits": {
                "for_data": round(float(waits[:, 0].max()), 4),
                "for_device": round(float(waits[:, 1].mean()), 4),
            },
        }
        step = int(state.timestamp.batch.value)
        if deviations and dist.get_global_rank() == 0:
            append_lines(self._file, step, deviations)
        self._record.check(f"training step {step}")

    @property
    def _file(self) -> Path:
        return self.metrics.with_name(DEVIATIONS)

    def _write_changes(self, step: int, lines: list[dict[str, Any]]) -> None:
        """Once, however often training is killed before it saves again."""
        if any(line["kind"] == CHANGED_DATA and line["step"] == step for line in lines):
            return
        line = {"step": step, "kind": CHANGED_DATA, "changes": [str(change) for change in self.source.changes]}
        with self._file.open("a") as file:
            file.write(json.dumps(line) + "\n")
