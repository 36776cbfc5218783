"""Random packs with everything that packs may have, and loaders over them, for tests of training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from molmo2core.checkpoints.config import InitialWeights
from molmo2core.examples import DOCUMENT, PADDING, ROOT, Batch
from molmo2core.loading.provenance import Change
from molmo2core.model.config import ModelConfig, named_config
from molmo2core.packing.config import PackingConfig
from molmo2core.preprocessing.config import PreprocessingConfig
from molmo2core.recipe.sections import TrainSection
from molmo2core.special_tokens import EXTRA_TOKENS, IM_PATCH
from molmo2core.tracking.config import TrackingConfig
from molmo2core.training.config import GroupSchedule, OptimizerConfig, TrainingConfig

Pack = dict[str, torch.Tensor]
PACKING = PackingConfig(sequence_tokens=64, crop_budget=4)
"""Budgets of the packs below, by default."""


_TREE_TASKS = ("image_qa", "image_caption") * 4


def random_pack(config: ModelConfig, seed: int, *, tokens: int = 64, images: int = 1, branches: int = 2) -> Pack:
    """Two documents, `tokens` long in all: a message tree (with `images` crops in its root), and a plain text.

    Targets are learnable: each is its input plus one.
    """
    generator = torch.Generator().manual_seed(seed)
    geometry, vocabulary = config.geometry, config.decoder.vocab_size
    visual = 4 * images
    text = max(tokens // 3, 4)
    branch_length = (tokens - text - visual - 2) // branches
    root = tokens - text - branches * branch_length
    input_ids = torch.randint(0, vocabulary - 1, (tokens,), generator=generator)
    target_ids = input_ids + 1
    input_ids[1 : 1 + visual] = vocabulary + EXTRA_TOKENS.index(IM_PATCH)
    starts = [torch.arange(root)] + [root + torch.arange(branch_length)] * branches + [torch.arange(text)]
    subsegments = [torch.full((root,), ROOT)]
    subsegments += [torch.full((branch_length,), number) for number in range(branches)]
    subsegments += [torch.full((1,), DOCUMENT + ROOT), torch.full((text - 1,), DOCUMENT)]
    weights = torch.rand(tokens, generator=generator) + 0.1
    weights[:root] = 0
    weights[torch.rand(tokens, generator=generator) < 0.3] = 0
    is_visual = torch.zeros(tokens, dtype=torch.bool)
    is_visual[1 : 1 + visual] = True
    pooling = torch.randint(0, max(images, 1) * geometry.num_patches, (visual, geometry.max_pool), generator=generator)
    pooling[:, -1] = PADDING
    return {
        "input_ids": input_ids,
        "target_ids": target_ids,
        "position_ids": torch.cat(starts),
        "subsegment_ids": torch.cat(subsegments),
        "loss_weights": weights,
        "is_visual": is_visual,
        "crops": torch.randint(
            0, 256, (images, geometry.num_patches, geometry.patch_bytes), dtype=torch.uint8, generator=generator
        ),
        "pooling": pooling,
    }


def as_batch(packs: list[Pack], numbers: Sequence[int] = ()) -> Batch:
    """A batch of `packs`, with two examples each.  The branches of the first are of two tasks, taking turns."""
    return Batch(
        packs=packs,
        pack_numbers=list(numbers or range(len(packs))),
        uids=[(f"tree-{number}", f"text-{number}") for number in numbers or range(len(packs))],
        datasets=[("images", "texts")] * len(packs),
        tasks=[(_TREE_TASKS, ("text",))] * len(packs),
        loss_weight=float(sum(pack["loss_weights"].sum(dtype=torch.float64) for pack in packs)),
        num_tokens=sum(len(pack["input_ids"]) for pack in packs),
        num_examples=2 * len(packs),
        num_crops=sum(len(pack["crops"]) for pack in packs),
        deviations=[],
        data_wait_seconds=0.0,
        loader_idle_seconds=0.0,
    )


class PackStream(IterableDataset[Batch]):
    """Endless batches of one data-parallel group; position and state are counted in packs of all groups."""

    datasets = ("images", "texts")
    changes: tuple[Change, ...] = ()

    def __init__(
        self, config: ModelConfig, global_batch_packs: int, group: int, groups: int, bad_pack: int = -1, **pack: Any
    ) -> None:
        self.config, self.bad_pack, self.pack = config, bad_pack, pack
        self.global_batch_packs, self.group, self.groups = global_batch_packs, group, groups
        self.position = 0

    def __iter__(self) -> Iterator[Batch]:
        first = self.position
        share = self.global_batch_packs // self.groups
        while True:
            start = first + self.group * share
            numbers = range(start, start + share)
            yield as_batch([self._pack(index) for index in numbers], numbers)
            first += self.global_batch_packs

    def state_dict(self, num_samples: int, from_beginning: bool) -> dict[str, int]:
        return {"packs": num_samples}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["packs"]

    def _pack(self, index: int) -> Pack:
        """Lengths and image counts vary; every third pack has no image.  The bad one's loss is no number."""
        sizes = {"tokens": 48 + index % 5, "images": index % 3} | self.pack
        pack = random_pack(self.config, index, **sizes)
        if index == self.bad_pack:
            pack["loss_weights"][-1] = float("inf")
        return pack


def pack_loader(config: ModelConfig, training: TrainingConfig, *, group: int = 0, **pack: Any) -> DataLoader[Batch]:
    """A loader over PackStream."""
    stream = PackStream(config, training.global_batch_packs, group, training.data_parallel, **pack)
    return DataLoader(stream, batch_size=None)


def training_config(**changes: Any) -> TrainingConfig:
    """A short training of a tiny model."""
    schedule = GroupSchedule(learning_rate=1e-3, warmup_steps=2)
    values: dict[str, Any] = {
        "steps": 4,
        "global_batch_packs": 4,
        "optimizer": OptimizerConfig(vision_encoder=schedule, connector=schedule, decoder=schedule),
        "weighting": "none",
        "save_interval_steps": 100,
        "threads_per_process": 1,
    }
    return TrainingConfig(**values | changes)


def train_section(workspace: Path, training: TrainingConfig, *, tracking: TrackingConfig | None = None) -> TrainSection:
    """A section of the second stage."""
    return TrainSection(
        workspace=str(workspace),
        stage="sft",
        run_name="test",
        seed=1,
        recipe_fingerprint="f",
        model=named_config("tiny"),
        tokenizer="tokenizer",
        initial_weights=InitialWeights(),
        packing=PACKING,
        preprocessing=PreprocessingConfig(),
        training=training,
        tracking=tracking or TrackingConfig(),
    )
