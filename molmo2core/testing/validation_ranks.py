"""What each rank of a test of validation does (importable, since ranks are spawned)."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from molmo2core.checkpoints.config import InitialWeights
from molmo2core.errors import PlatformError
from molmo2core.examples import Batch
from molmo2core.loading.held_out import HeldOutPacks
from molmo2core.model.config import named_config
from molmo2core.packing.config import PackingConfig
from molmo2core.preprocessing.config import PreprocessingConfig
from molmo2core.preprocessing.preprocessor import Preprocessor
from molmo2core.recipe.sections import TrainSection
from molmo2core.references import PackPlanRef, ShardsRef
from molmo2core.stages.train_validation import HeldOutQuestions, open_held_out
from molmo2core.testing.tiny_examples import image_examples, text_examples, write_tiny_shards
from molmo2core.testing.tiny_model import tiny_model
from molmo2core.testing.tiny_tokenizer import tiny_tokenizer
from molmo2core.testing.training import PACKING, pack_loader, training_config
from molmo2core.testing.training_ranks import signal_after
from molmo2core.tracking.config import TrackingConfig
from molmo2core.training import trainer
from molmo2core.training.callbacks.held_out_answers import HeldOutAnswers
from molmo2core.training.config import DropoutConfig, TrainingConfig, ValidationConfig
from molmo2core.training.validation_files import ANSWERS, PAGES, VALIDATION

HELD_OUT_PACKING = PackingConfig(sequence_tokens=300, crop_budget=5)
"""Six packs of the examples below: of two ranks, which take two at a time, one has none left in the second pass."""
VALIDATION_CONFIG = ValidationConfig(
    interval_steps=2,
    examples_per_dataset=7,
    generation_interval_steps=4,
    generations_per_task=2,
    max_new_tokens=6,
)
PREPROCESSOR = Preprocessor(
    geometry=named_config("tiny").geometry,
    config=PreprocessingConfig(max_crops=2),
    tokenizer=tiny_tokenizer(),
    weighting="described",
    seed=5,
)
STEPS = 5
Found = dict[str, Any]


def write_held_out_shards(workspace: Path) -> list[ShardsRef]:
    """Images and texts with a validation split each, and texts without one."""
    parts = (
        [*image_examples("images", 2), *image_examples("images", 9, split="validation", seed=1)],
        [*text_examples("texts", 2), *text_examples("texts", 5, split="validation")],
        text_examples("unseen", 2),
    )
    return [write_tiny_shards(part, str(workspace)) for part in parts]


def plan_of(shards: Sequence[ShardsRef]) -> PackPlanRef:
    """A reference of a plan that draws from all of them."""
    facts = {"draws": {ref.dataset: {"draws": 1} for ref in shards}}
    return PackPlanRef(uri="", digest="d", stage="sft", num_packs=0, facts=facts, parents=tuple(shards))


def section_of(config: TrainingConfig) -> TrainSection:
    """A section with what validation reads."""
    return TrainSection(
        workspace="",
        stage="sft",
        run_name="test",
        seed=0,
        recipe_fingerprint="",
        model=named_config("tiny"),
        tokenizer="",
        initial_weights=InitialWeights(),
        packing=HELD_OUT_PACKING,
        preprocessing=PREPROCESSOR.config,
        training=config,
        tracking=TrackingConfig(),
    )


def train_validated(folder: Path, shards: Sequence[ShardsRef], **changes: Any) -> Found:
    """Train a tiny model, with dropout, on random packs: weights on rank 0, and what validation left."""
    values = {"steps": STEPS, "validation": VALIDATION_CONFIG, "dropout": DropoutConfig(residual=0.1)} | changes
    config = training_config(**values)
    device, group, context_rank = trainer.start_ranks(config)
    model = tiny_model()
    section = section_of(config)
    folder.mkdir(parents=True, exist_ok=True)
    is_first = group == context_rank == 0
    held_out = open_held_out(section, plan_of(shards), PREPROCESSOR, folder / "cache", speaks=is_first)
    answerer = HeldOutQuestions(folder, section, held_out, PREPROCESSOR) if held_out is not None and is_first else None
    weights = trainer.train(
        model,
        pack_loader(model.config, config, group=group),
        config,
        device=device,
        folder=folder,
        metrics=folder / "metrics.jsonl",
        name="test",
        seed=0,
        packing=PACKING,
        held_out=held_out.packs if held_out is not None else None,
        answerer=answerer,
    )
    if dist.is_initialized():
        dist.barrier()  # rank 0 has written
    packs = len(held_out.packs) if held_out is not None else 0
    return found_in(folder) | {"weights": weights, "packs": packs, "random": torch.get_rng_state()}


def found_in(folder: Path) -> Found:
    """Lines and pages in a folder."""
    files = {name: folder / name for name in ("metrics.jsonl", VALIDATION, ANSWERS)}
    texts = {name: path.read_text().splitlines() if path.is_file() else [] for name, path in files.items()}
    return {**texts, PAGES: {page.name: page.read_text() for page in (folder / PAGES).glob("*")}}


class StoppedWhileValidating(Exception):
    """Stands for a kill between a step and its checkpoint."""


def stopped_while_validating(folder: Path, shards: Sequence[ShardsRef], *, written: bool, **changes: Any) -> str:
    """Train, and stop on all ranks in the second validation, that of step 4: after one pass, or when all is written."""
    read: Counter[int] = Counter()
    load, end = HeldOutPacks.batch, HeldOutAnswers.eval_end

    def stop_or_load(self: HeldOutPacks, index: int) -> Batch:
        read[index] += 1
        if not written and index >= 4 and read[index] == 2:  # of the second pass: the first one has packs 0 to 3
            raise StoppedWhileValidating
        return load(self, index)

    def end_and_stop(self: HeldOutAnswers, state: Any, logger: Any) -> None:
        end(self, state, logger)
        if written and state.timestamp.batch.value == 4:
            raise StoppedWhileValidating

    with (
        mock.patch.object(HeldOutPacks, "batch", stop_or_load),
        mock.patch.object(HeldOutAnswers, "eval_end", end_and_stop),
    ):
        try:
            train_validated(folder, shards, **changes)
        except StoppedWhileValidating:
            return "stopped"
    return "not stopped"


def validate_in_every_way(folder: Path, shards: Sequence[ShardsRef]) -> dict[str, Found]:
    """On two ranks, which cost seconds to start: all that the tests look at."""
    torch.manual_seed(dist.get_rank())
    two = {"num_processes": 2, "save_interval_steps": 3}
    results = {
        "plain": train_validated(folder / "plain", shards, **two, validation=ValidationConfig()),
        "validated": train_validated(folder / "validated", shards, **two),
        "shared": train_validated(folder / "shared", shards, **two, context_parallel=2),
    }
    for way, written in (("within", False), ("after", True)):
        stopped = stopped_while_validating(folder / way, shards, written=written, **two)
        results[f"stopped {way}"] = found_in(folder / way) | {"how": stopped}
        results[f"resumed {way}"] = train_validated(folder / way, shards, **two)
    with signal_after(3, rank=1), contextlib.suppress(PlatformError):
        train_validated(folder / "asked", shards, **two)
    results["asked to stop"] = found_in(folder / "asked")
    none = replace(VALIDATION_CONFIG, split="test")
    results["empty"] = train_validated(folder / "empty", shards, **two, validation=none)
    return results
