"""Bytes that one rank of a group holds in a training step, counted (importable, since ranks are spawned)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from molmo2core.examples import PADDING
from molmo2core.model.config import ModelConfig
from molmo2core.parallel.blocks import checkpoint_activations
from molmo2core.parallel.context_parallel import apply_context_parallel
from molmo2core.parallel.mesh import host_context_group
from molmo2core.testing.memory import LiveBytes
from molmo2core.testing.shared_sequence import DROPOUT
from molmo2core.testing.tiny_model import random_model
from molmo2core.testing.training import Pack, random_pack
from molmo2core.training.composer_model import TrainedMolmo2
from molmo2core.training.config import CheckpointedActivations
from molmo2core.training.memory_estimate import PackShape
from molmo2core.training.microbatch import MicrobatchMaker

RECOMPUTED = CheckpointedActivations(vision_encoder=1, connector=True, decoder=1)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One measurement, on groups of `ranks` ranks."""

    ranks: int
    tokens: int
    crops: int
    recomputed: bool
    mixed: bool = False
    """Under bfloat16 autocast."""


@dataclass(frozen=True, kw_only=True)
class Held:
    """Bytes of all tensors that a step made, but for weights."""

    kept: int
    """At the end of the forward pass, pack included."""
    peak: int
    """At most, gradients of weights included."""


def video_pack(config: ModelConfig, *, tokens: int, crops: int) -> Pack:
    """A long video with questions, and a text: four visual tokens a frame, whose pools stay in their frame."""
    pack = random_pack(config, 1, tokens=tokens, images=crops)
    first = torch.arange(crops).repeat_interleave(4)[:, None] * config.geometry.num_patches
    own = first + pack["pooling"].clamp(min=0) % config.geometry.num_patches
    return pack | {"pooling": torch.where(pack["pooling"] == PADDING, PADDING, own)}


def shape_of(case: Case) -> PackShape:
    """Of `video_pack`."""
    return PackShape(tokens=case.tokens, crops=case.crops, visual_tokens=4 * case.crops)


def held_by_ranks(config: ModelConfig, cases: Sequence[Case]) -> list[Held]:
    """For each case, of this rank if it is one of the first group, else nothing."""
    groups = {case.ranks: host_context_group(case.ranks) for case in cases}  # made by all ranks
    nothing = Held(kept=0, peak=0)
    return [
        held_in_step(config, case, groups[case.ranks]) if dist.get_rank() < case.ranks else nothing for case in cases
    ]


def held_in_step(config: ModelConfig, case: Case, group: dist.ProcessGroup) -> Held:
    """One forward and backward pass of this rank's share."""
    model = random_model(config, seed=3).train()
    if case.ranks > 1:
        apply_context_parallel(model, group)
    if case.recomputed:
        checkpoint_activations(model, vision_encoder=1, connector=True, decoder=1)
    maker = MicrobatchMaker(
        im_patch_id=model.im_patch_id, dropout=DROPOUT, context_rank=group.rank(), context_size=case.ranks
    )
    pack, trained = video_pack(config, tokens=case.tokens, crops=case.crops), TrainedMolmo2(model, z_coefficient=1e-4)
    with torch.autocast("cpu", torch.bfloat16, enabled=case.mixed), LiveBytes() as live:
        batch = dict(maker.make([pack]))
        loss = trained.loss(trained.forward(batch), batch)["total"]
        kept = live.now
        loss.backward()
    return Held(kept=kept, peak=live.peak)
