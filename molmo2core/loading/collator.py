"""The packs of one rank become a Batch of tensors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from molmo2core.errors import Molmo2Error
from molmo2core.examples import Batch, PackedExample

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


def collate_packs(elements: Sequence[PackedExample | Molmo2Error]) -> Batch | Molmo2Error:
    """Tensors of each pack, unpadded, and the sums that training needs as Python numbers.

    A pack without media keeps C = 0 crops and V = 0 visual tokens: the trainer adds what its ranks need to agree.
    An error among the elements is the result.
    """
    packs: list[PackedExample] = []
    for element in elements:
        if isinstance(element, Molmo2Error):
            return element
        packs.append(element)
    return Batch(
        packs=[
            {
                name: torch.from_numpy(np.ascontiguousarray(getattr(pack, name))).to(dtype)
                for name, dtype in _TENSORS.items()
            }
            for pack in packs
        ],
        uids=[pack.uids for pack in packs],
        loss_weight=float(sum(pack.loss_weights.sum(dtype=np.float64) for pack in packs)),
        num_tokens=sum(len(pack.input_ids) for pack in packs),
        num_examples=sum(len(pack.uids) for pack in packs),
    )
