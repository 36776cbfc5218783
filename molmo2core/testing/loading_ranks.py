"""Training on the tiny data, on ranks that note what they were given (importable, since ranks are spawned)."""

from __future__ import annotations

import itertools
import json
import os
import signal
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from composer import Callback, Trainer
from torch import distributed

from molmo2core.errors import DataError, Molmo2Error
from molmo2core.examples import Example, TokenizedExample
from molmo2core.loading import deviations
from molmo2core.packing.config import PackingConfig
from molmo2core.packing.plan import ENTRY, PackPlan
from molmo2core.preprocessing.preprocessor import Preprocessor
from molmo2core.testing.loading import (
    NUM_IMAGES,
    PACKING,
    PACKS,
    PREPROCESSOR,
    loading_examples,
    open_loading_data,
    pack_hashes,
    tiny_loader,
)
from molmo2core.testing.tiny_model import tiny_model
from molmo2core.testing.training_ranks import signal_after
from molmo2core.training import trainer
from molmo2core.training.checkpoint_folders import CheckpointPlace
from molmo2core.training.config import TrainingConfig


class HashBatches(Callback):  # type: ignore[misc]
    """Appends what each step was given to a file per rank; may kill this process while a step runs."""

    def __init__(self, folder: Path, kill_in_step: int) -> None:
        self.folder, self.kill_in_step = folder, kill_in_step

    def after_dataloader(self, state: Any, logger: Any) -> None:
        rank, step = distributed.get_rank() if distributed.is_initialized() else 0, int(state.timestamp.batch.value) + 1
        with (self.folder / f"hashes-{rank}.txt").open("a") as file:
            file.write(json.dumps([step, pack_hashes(state.batch)]) + "\n")

    def after_backward(self, state: Any, logger: Any) -> None:
        if int(state.timestamp.batch.value) + 1 == self.kill_in_step:
            os.kill(os.getpid(), signal.SIGKILL)


def train_hashed(
    data_folder: Path, folder: Path, config: TrainingConfig, resume_from: Path | None, kill_in_step: int = 0
) -> None:
    """Train a tiny model on the tiny data, on this rank."""
    device, group, _ = trainer.start_ranks(config)
    folder.mkdir(parents=True, exist_ok=True)
    loader = tiny_loader(
        open_loading_data(data_folder),
        data_parallel_rank=group,
        data_parallel_size=config.data_parallel,
        num_workers=config.loader_workers,
    )
    with _callback_added(HashBatches(folder, kill_in_step)):
        trainer.train(
            tiny_model(),
            loader,
            config,
            device=device,
            folder=folder,
            metrics=folder / "metrics.jsonl",
            name="test",
            seed=0,
            packing=PACKING,
            resume_from=CheckpointPlace(folder=resume_from) if resume_from is not None else None,
        )


def hashes_in(folder: Path, ranks: Sequence[int]) -> dict[int, list[str]]:
    """Step -> hashes of all slots, as `HashBatches` wrote them."""
    found: dict[int, list[str]] = {}
    for rank in ranks:
        for line in (folder / f"hashes-{rank}.txt").read_text().splitlines():
            step, hashes = json.loads(line)
            found.setdefault(step, []).extend(hashes)
    return found


@contextmanager
def _callback_added(callback: Callback) -> Iterator[None]:
    def with_callback(**arguments: Any) -> Trainer:
        arguments["callbacks"] = [*arguments["callbacks"], callback]
        return Trainer(**arguments)

    with mock.patch.object(trainer, "Trainer", with_callback):
        yield


def plan_with(places: dict[int, list[int]], packing: PackingConfig) -> PackPlan:
    """Two whole images in each pack, those of `places` in these packs and nowhere else."""
    others = itertools.cycle(sample for sample in range(1, NUM_IMAGES) if sample not in places)
    samples = [
        [*(sample for sample, packs in places.items() if pack in packs), next(others), next(others)][:2]
        for pack in range(PACKS)
    ]
    branches = [len(example.annotations) for example in loading_examples()]
    entries = np.array([(sample, 0, branches[sample], 0) for pair in samples for sample in pair], ENTRY)
    return PackPlan(entries=entries, pack_offsets=np.arange(0, 2 * PACKS + 1, 2), packing=packing)


class BreakingPreprocessor(Preprocessor):
    """Media of some uids do not decode."""

    broken: frozenset[str] = frozenset()

    def tokenize(self, example: Example, *, epoch: int, branches: tuple[int, int] | None = None) -> TokenizedExample:
        if example.uid in self.broken:
            raise DataError(example.uid, found="truncated JPEG")
        return super().tokenize(example, epoch=epoch, branches=branches)


def breaking_preprocessor(broken: Collection[str]) -> Preprocessor:
    """PREPROCESSOR, but for the media of `broken`."""
    kind = type("Breaking", (BreakingPreprocessor,), {"broken": frozenset(broken)})
    made: Preprocessor = kind(**{field.name: getattr(PREPROCESSOR, field.name) for field in fields(PREPROCESSOR)})
    return made


def train_with_broken_media(
    data_folder: Path, folder: Path, places: dict[int, list[int]], config: TrainingConfig
) -> dict[str, str]:
    """On two ranks: undisturbed; stopped after step 1 and gone on; and both with one broken medium borne at most.

    Args:
        places: samples that do not decode -> packs that they stand in.
    """
    data = open_loading_data(data_folder)
    data = replace(data, plan=plan_with(places, data.plan.packing))
    broken = [data.reader.example(sample).uid for sample in places]

    def train(name: str) -> str:
        device, group, _ = trainer.start_ranks(config)
        out = folder / name
        loader = tiny_loader(
            data,
            data_parallel_rank=group,
            data_parallel_size=config.data_parallel,
            preprocessor=breaking_preprocessor(broken),
        )
        try:
            trainer.train(
                tiny_model(),
                loader,
                config,
                device=device,
                folder=out,
                metrics=out / "metrics.jsonl",
                name="test",
                seed=0,
                packing=PACKING,
            )
        except Molmo2Error as error:
            return f"{type(error).__name__}: {error}"
        return "no error"

    found = {"undisturbed": train("undisturbed")}
    with signal_after(1):
        found["stopped"] = train("stopped")
        found["stopped for strict"] = train("strict stopped")
    found["gone on"] = train("stopped")
    with mock.patch.object(deviations, "MIN_BROKEN", 1), mock.patch.object(deviations, "MAX_BROKEN_FRACTION", 0.0):
        found["strict"] = train("strict")
        found["strict gone on"] = train("strict stopped")
    return found
