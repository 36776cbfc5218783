"""What each rank of the acceptance tests of training does (importable, since ranks are fresh processes).

Every experiment is one step of Composer's Trainer as stages build it, over packs given by hand.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from composer import Callback, Trainer
from composer.utils import dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from molmo2core.examples import ROOT, Batch, TokenizedExample
from molmo2core.loading.collator import collate_packs
from molmo2core.model.initialization import build_model
from molmo2core.model.molmo2 import Molmo2
from molmo2core.packing.concat import pack_examples
from molmo2core.testing.tiny_model import TINY_CONFIGS, branch_alone, random_tree
from molmo2core.testing.training import PACKING, Pack, PackStream, as_batch, random_pack, training_config
from molmo2core.training import batches, trainer
from molmo2core.training.config import DropoutConfig, TrainableParts, TrainingConfig

Z = 1e-2
"""A hundred times the recipe's, so that a fault in the z term shows."""
DROPOUT = DropoutConfig(residual=0.1, response_residual=0.2)
KINDS = {"uneven": "qwen", "silent": "qwen-tied"}
"""Model that each set of packs is trained with: untied, and tied."""
RELEASED = TrainableParts(input_embedding=False)
RELEASED_TIED = TrainableParts(input_embedding=False, output_head=False)
_FACTOR = 7.3


@dataclass(kw_only=True)
class Step:
    """What one rank saw of a step."""

    gradients: dict[str, Tensor | None] = field(default_factory=dict)
    """Of the global batch, whole, before the update; None where there is none."""
    losses: dict[str, float] = field(default_factory=dict)
    """That Composer reports, of the global batch."""
    logits: list[Tensor] = field(default_factory=list)
    """[N, V] of each microbatch, at all positions."""
    token_losses: list[Tensor] = field(default_factory=list)
    """[K] of each microbatch."""
    dropped: list[Tensor] = field(default_factory=list)
    """bool [N, W] of each microbatch: what the first decoder block added is exactly 0."""
    loss_weights: list[Tensor] = field(default_factory=list)
    """[N] of each microbatch."""


def one_step(
    folder: Path, packs: Sequence[Pack], kind: str, *, packs_per_pass: int = 1, factor: float = 1.0, **changes: Any
) -> Step:
    """Train a random model for one step.

    Args:
        packs: the global batch.
        kind: of TINY_CONFIGS.
        packs_per_pass: packs of a microbatch.
        factor: on all loss weights.
        changes: to the training.
    """
    config = training_config(
        steps=1, global_batch_packs=len(packs), num_processes=dist.get_world_size(), z_loss=Z, **changes
    )
    config = replace(config, optimizer=replace(config.optimizer, clip_norm=1e9))
    model = start_model(kind)
    weighted = [pack | {"loss_weights": factor * pack["loss_weights"]} for pack in packs]
    probe = Probe(model)

    def with_probe(**arguments: Any) -> Trainer:
        arguments["callbacks"] = [*arguments["callbacks"], probe]
        return Trainer(**arguments)

    device, group, _ = trainer.start_ranks(config)
    with (
        mock.patch.object(trainer, "Trainer", with_probe),
        mock.patch.object(batches, "MERGED_TOKENS", packs_per_pass * PACKING.sequence_tokens),
    ):
        trainer.train(
            model,
            DataLoader(GivenPacks(weighted, config, group), batch_size=None),
            config,
            device=device,
            folder=folder,
            metrics=folder / "metrics.jsonl",
            name="test",
            seed=0,
            packing=PACKING,
        )
    return probe.seen


def start_model(kind: str) -> Molmo2:
    """A random model that is nearer to how training starts than random_model, whose logits magnify float32's noise."""
    model = build_model(TINY_CONFIGS[kind], seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.03)
    return model


class GivenPacks(PackStream):
    """One global batch, again and again."""

    def __init__(self, packs: Sequence[Pack], config: TrainingConfig, group: int) -> None:
        super().__init__(TINY_CONFIGS["qwen"], len(packs), group, config.data_parallel)
        self.packs = packs

    def __iter__(self) -> Iterator[Batch]:
        share = len(self.packs) // self.groups
        numbers = range(self.group * share, (self.group + 1) * share)
        while True:
            yield as_batch([self.packs[number] for number in numbers], numbers)


class Probe(Callback):  # type: ignore[misc]
    """Records a Step."""

    def __init__(self, model: Molmo2) -> None:
        self.model, self.seen = model, Step()
        model.decoder.stack.blocks[0].register_forward_hook(self._compare)

    def _compare(self, block: object, inputs: tuple[Any, ...], output: Tensor) -> None:
        self.seen.dropped.append((output == inputs[0])[0].detach())

    def after_forward(self, state: Any, logger: Any) -> None:
        with torch.no_grad():
            self.seen.logits.append(self.model.logits(state.outputs[0]))
        self.seen.loss_weights.append(state.batch["loss_weights"])

    def after_loss(self, state: Any, logger: Any) -> None:
        self.seen.token_losses.append(state.model.parts.token_losses)

    def after_train_batch(self, state: Any, logger: Any) -> None:
        for name, parameter in self.model.named_parameters():
            gradient = parameter.grad
            whole = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
            self.seen.gradients[name] = None if whole is None else whole.clone()

    def batch_end(self, state: Any, logger: Any) -> None:
        self.seen.losses = {name.rpartition("/")[2]: float(value) for name, value in state.total_loss_dict.items()}


def packs_of(data: str) -> list[Pack]:
    """Four packs of unequal length and weight: `uneven`, where one has no target and one a single one, and `silent`,
    where the last two, all that the second of two ranks has, have none."""
    packs = [
        random_pack(TINY_CONFIGS["qwen"], seed, tokens=64 - 5 * seed, images=(2, 0, 1, 1)[seed]) for seed in range(4)
    ]
    shares = {"uneven": (0.3, 0.0, 1.0, 5.0), "silent": (0.2, 3.0, 0.0, 0.0)}[data]
    for pack, share in zip(packs, shares, strict=True):
        pack["loss_weights"] *= share
    if data == "uneven":
        first = int(packs[2]["loss_weights"].nonzero()[0, 0])
        packs[2]["loss_weights"][first + 1 :] = 0
    return packs


def trees() -> list[TokenizedExample]:
    """Four trees with visual input, of two branches each, with targets and weights."""
    made = []
    for seed in range(4):
        tree = random_tree(TINY_CONFIGS["qwen"], seed=seed, images=seed % 2, frames=1, branches=(9 - seed, 4))
        rng = np.random.default_rng(seed)
        size = len(tree.input_ids)
        weights = (rng.random(size) + 0.1) * (tree.subsegment_ids != ROOT) * (rng.random(size) < 0.7)
        targets = rng.integers(0, TINY_CONFIGS["qwen"].decoder.vocab_size, size).astype(np.int32)
        made.append(replace(tree, target_ids=targets, loss_weights=weights.astype(np.float32)))
    return made


def as_packs(groups: Sequence[Sequence[TokenizedExample]]) -> list[Pack]:
    """One pack for each group."""
    return collate_packs([pack_examples(list(group), 9) for group in groups])["packs"]


def splits(ranks: int) -> dict[str, dict[str, int]]:
    """Ways to cut four packs on so many ranks, by name."""
    if ranks == 1:
        return {f"{4 // size} passes": {"packs_per_pass": size} for size in (1, 2, 4)}
    ways = {f"2 ranks, {2 // size} passes": {"packs_per_pass": size} for size in (1, 2)}
    return ways | {
        f"2 sharing ranks, {4 // size} passes": {"packs_per_pass": size, "context_parallel": 2} for size in (1, 4)
    }


def all_experiments(folder: Path) -> dict[str, Step]:
    """Of this rank, by name."""
    done: dict[str, Step] = {}

    def do(name: str, packs: Sequence[Pack], kind: str, **changes: Any) -> None:
        done[name] = one_step(folder / str(len(done)), packs, kind, **changes)

    for data, kind in KINDS.items():
        for way, changes in splits(dist.get_world_size()).items():
            do(f"{data}: {way}", packs_of(data), kind, dropout=DROPOUT, **changes)
    do("times a constant", packs_of("uneven"), "qwen", dropout=DROPOUT, factor=_FACTOR)
    four = trees()
    do("trees", as_packs([[tree] for tree in four]), "qwen")
    do("packed", as_packs([four[:2], four[2:]]), "qwen")
    do("unrolled", as_packs([[branch_alone(tree, number)] for tree in four for number in range(2)]), "qwen")
    do("untied, as released", packs_of("uneven"), "qwen", trainable=RELEASED)
    do("tied, as released", packs_of("uneven"), "qwen-tied", trainable=RELEASED_TIED)
    for compat in (False, True):
        dropout = DropoutConfig(residual=0.1, response_residual=0.0, official_compat=compat)
        do(f"dropout, compat {compat}", packs_of("uneven"), "qwen", dropout=dropout)
    return done
