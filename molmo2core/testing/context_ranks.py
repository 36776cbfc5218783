"""Training on shared sequences, through Composer, FSDP and the real loader (importable, since ranks are spawned)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from composer import Callback, Trainer

from molmo2core.errors import PlatformError
from molmo2core.loading.dataset import LoadedPack, PackDataset
from molmo2core.parallel.mesh import host_context_group
from molmo2core.parallel.pack_exchange import PackExchange
from molmo2core.testing.loading import GLOBAL_BATCH, PACKING, open_loading_data, tiny_loader
from molmo2core.testing.shared_sequence import eight_heads
from molmo2core.testing.tiny_model import random_model
from molmo2core.testing.training import training_config
from molmo2core.testing.training_ranks import SignalAfter, metrics_of
from molmo2core.training import trainer
from molmo2core.training.config import DropoutConfig, TrainingConfig

STEPS, STOPPED_AFTER = 4, 2
Trained = tuple[dict[str, torch.Tensor] | None, list[dict[str, Any]]]


class NotePacks(Callback):  # type: ignore[misc]
    """Notes the numbers of the packs that each step was given."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def after_dataloader(self, state: Any, logger: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps([int(state.timestamp.batch.value) + 1, state.batch["pack_numbers"]]) + "\n")


def train_shared(
    data_folder: Path, folder: Path, optimizer: Any, *, ranks: int, context_parallel: int, stops: bool = False
) -> Trained:
    """Four steps with dropout on `ranks` ranks, from a checkpoint in `folder` if there is one; weights on rank 0."""
    config: TrainingConfig = training_config(
        steps=STEPS,
        optimizer=optimizer,
        num_processes=ranks,
        context_parallel=context_parallel,
        global_batch_packs=GLOBAL_BATCH,
        dropout=DropoutConfig(residual=0.1, response_residual=0.1),
    )
    device, group, context_rank = trainer.start_ranks(config)
    folder.mkdir(parents=True, exist_ok=True)
    sharing = PackExchange(host_context_group(context_parallel), verify=True) if context_parallel > 1 else None
    loader = tiny_loader(
        open_loading_data(data_folder),
        data_parallel_rank=group,
        data_parallel_size=config.data_parallel,
        sharing=sharing,
    )
    added: list[Callback] = [NotePacks(folder / f"packs-{group}-{context_rank}.jsonl")]
    added += [SignalAfter(STOPPED_AFTER, rank=1)] if stops else []

    def with_notes(**arguments: Any) -> Trainer:
        arguments["callbacks"] = [*arguments["callbacks"], *added]
        return Trainer(**arguments)

    with mock.patch.object(trainer, "Trainer", with_notes):
        weights = trainer.train(
            random_model(eight_heads(2), seed=1),
            loader,
            config,
            device=device,
            folder=folder,
            metrics=folder / "metrics.jsonl",
            name="test",
            seed=0,
            packing=PACKING,
        )
    return weights, metrics_of(folder)


def stop_on_two_ranks(data_folder: Path, folder: Path, optimizer: Any) -> str:
    """Two ranks that share sequences are asked to stop: a checkpoint of `STOPPED_AFTER` steps is left."""
    try:
        train_shared(data_folder, folder, optimizer, ranks=2, context_parallel=2, stops=True)
    except PlatformError as error:
        return str(error)
    return "no error"


def fail_on_one_rank(data_folder: Path, folder: Path, optimizer: Any) -> None:
    """Of two ranks that share sequences the second cannot load a pack in step 2, for a reason nobody thought of."""
    load = PackDataset.load

    def failing(dataset: PackDataset, index: int) -> LoadedPack:
        if index == GLOBAL_BATCH + 1:
            raise ValueError(f"pack {index} on rank {torch.distributed.get_rank()}")
        return load(dataset, index)

    with mock.patch.object(PackDataset, "load", failing):
        train_shared(data_folder, folder, optimizer, ranks=2, context_parallel=2)


def train_on_four_ranks(data_folder: Path, folder: Path, stopped: Path, optimizer: Any) -> dict[str, Trained]:
    """Four share each sequence; two share each of two; and four go on from what two left."""
    resumed = folder / "resumed"
    if torch.distributed.get_rank() == 0:
        shutil.copytree(stopped, resumed)
    torch.distributed.barrier()
    return {
        "four share": train_shared(data_folder, folder / "four", optimizer, ranks=4, context_parallel=4),
        "two and two share": train_shared(data_folder, folder / "two", optimizer, ranks=4, context_parallel=2),
        "four go on": train_shared(data_folder, resumed, optimizer, ranks=4, context_parallel=4),
    }


def packs_of(folder: Path, group: int, context_rank: int) -> list[tuple[int, list[int]]]:
    """(step, pack numbers) in order, as noted by one rank; steps that were done again stand twice."""
    lines = (folder / f"packs-{group}-{context_rank}.jsonl").read_text().splitlines()
    return [(step, numbers) for step, numbers in map(json.loads, lines)]
