"""How Composer cuts and counts a rank's batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from composer import DataSpec
from composer.devices import Device, DeviceCPU
from torch.utils.data import DataLoader

from molmo2core.examples import Batch
from molmo2core.model.molmo2 import Molmo2
from molmo2core.training.config import TrainingConfig
from molmo2core.training.microbatch import MicrobatchMaker, NoCopy

MERGED_TOKENS = 8192
"""On a CPU, packs are merged into passes of at most this many tokens."""


def data_spec(
    loader: DataLoader[Batch],
    model: Molmo2,
    config: TrainingConfig,
    context_rank: int,
    *,
    seed: int,
    sequence_tokens: int,
) -> DataSpec:
    """How Composer splits and counts a rank's batch.

    Args:
        seed: of dropout.
        sequence_tokens: the longest pack, to which compiled blocks want every one padded.
    """
    maker = replace(
        microbatch_maker(model, config, context_rank),
        seed=seed,
        tokens_per_pack=sequence_tokens if config.compile else 0,
    )
    counts = int(context_rank == 0)  # of ranks that share packs, one counts them

    def num_tokens(batch: Mapping[str, Any]) -> dict[str, int | float]:
        return {"total": counts * batch.get("num_tokens", 0), "loss_generating": batch["loss_weight"]}

    return DataSpec(
        loader,
        split_batch=maker.split,
        microbatch_transforms=NoCopy,
        get_num_samples_in_batch=lambda batch: counts * len(batch["packs"]),
        get_num_tokens_in_batch=num_tokens,
    )


def microbatch_maker(model: Molmo2, config: TrainingConfig, context_rank: int) -> MicrobatchMaker:
    """With the stage's dropout."""
    return MicrobatchMaker(
        im_patch_id=model.im_patch_id,
        dropout=config.dropout,
        context_rank=context_rank,
        context_size=config.context_parallel,
    )


def packs_per_microbatch(config: TrainingConfig, device: Device, sequence_tokens: int) -> int:
    """One on a GPU; on a CPU as many of this rank's packs as MERGED_TOKENS hold, the same on all ranks."""
    if not isinstance(device, DeviceCPU):
        return 1
    packs = config.global_batch_packs // config.data_parallel
    return max(1, min(packs, MERGED_TOKENS // sequence_tokens))
