"""Packs become a Batch of tensors; batches of one pack become the batch of a rank."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from molmo2core.examples import Batch, Deviation, PackedExample

_TENSORS = {
    "input_ids": torch.int64,
    "target_ids": torch.int64,
    "position_ids": torch.int64,
    "subsegment_ids": torch.int64,
    "pooling": torch.int64,
    "loss_weights": torch.float32,
    "is_visual": torch.bool,
    "crops": torch.uint8,
}
TOKEN_BYTES = sum(
    torch.empty(0, dtype=dtype).element_size() for name, dtype in _TENSORS.items() if name not in ("pooling", "crops")
)
"""Of one token in a batch."""
INDEX_BYTES = torch.empty(0, dtype=_TENSORS["pooling"]).element_size()
"""Of one index of a pooling row."""


def collate_packs(
    packs: Sequence[PackedExample],
    *,
    numbers: Sequence[int] = (),
    datasets: Sequence[tuple[str, ...]] = (),
    deviations: Sequence[Deviation] = (),
) -> Batch:
    """Tensors of each pack, unpadded, and the sums that training needs as Python numbers.

    A pack without media keeps C = 0 crops and V = 0 visual tokens: the trainer adds what its ranks need to agree.

    Args:
        packs: of one rank and step, or some of them.
        numbers: place of each pack in its plan.
        datasets: of every example, by pack.
        deviations: from the plan.
    """
    return Batch(
        packs=[
            {
                name: torch.from_numpy(np.ascontiguousarray(getattr(pack, name))).to(dtype)
                for name, dtype in _TENSORS.items()
            }
            for pack in packs
        ],
        pack_numbers=list(numbers),
        uids=[pack.uids for pack in packs],
        datasets=list(datasets),
        tasks=[pack.tasks for pack in packs],
        loss_weight=float(sum(pack.loss_weights.sum(dtype=np.float64) for pack in packs)),
        num_tokens=sum(len(pack.input_ids) for pack in packs),
        num_examples=sum(len(pack.uids) for pack in packs),
        num_crops=sum(len(pack.crops) for pack in packs),
        deviations=list(deviations),
        data_wait_seconds=0.0,
        loader_idle_seconds=0.0,
    )


def join_batches(parts: Sequence[Batch]) -> Batch:
    """One batch with the packs of all `parts`, in order."""
    return Batch(
        packs=[pack for part in parts for pack in part["packs"]],
        pack_numbers=[number for part in parts for number in part["pack_numbers"]],
        uids=[uids for part in parts for uids in part["uids"]],
        datasets=[datasets for part in parts for datasets in part["datasets"]],
        tasks=[tasks for part in parts for tasks in part["tasks"]],
        loss_weight=sum(part["loss_weight"] for part in parts),
        num_tokens=sum(part["num_tokens"] for part in parts),
        num_examples=sum(part["num_examples"] for part in parts),
        num_crops=sum(part["num_crops"] for part in parts),
        deviations=[deviation for part in parts for deviation in part["deviations"]],
        data_wait_seconds=sum(part["data_wait_seconds"] for part in parts),
        loader_idle_seconds=sum(part["loader_idle_seconds"] for part in parts),
    )
