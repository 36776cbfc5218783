"""A pack's examples become one sequence (data.md 3.3, with copies instead of edits in place)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from molmo2core.examples import DOCUMENT, PADDING, IntArray, PackedExample, TokenizedExample


def pack_examples(examples: Sequence[TokenizedExample], max_pool: int) -> PackedExample:
    """Concatenate `examples` in order.

    The e-th example's subsegment ids move by e * DOCUMENT, its pooling indices by the patches before it; pooling
    rows are filled with PADDING up to `max_pool` patches.  Position ids stay: every example starts at 0.

    Args:
        examples: at least one.
        max_pool: K of the result, the widest pooling window of the model.

    Raises:
        ValueError: no examples, a pooling row is wider than `max_pool` or points past its own patches, or a
            subsegment id reaches the next document.
    """
    if not examples:
        raise ValueError("a pack needs at least one example")
    pooling: list[IntArray] = []
    subsegment_ids: list[IntArray] = []
    patches_before = 0
    for document, example in enumerate(examples):
        num_crops, patches_per_crop, _ = example.crops.shape
        num_patches = num_crops * patches_per_crop
        rows, width = example.pooling.shape
        if width > max_pool or (rows and example.pooling.max() >= num_patches):
            raise ValueError(
                f"{example.uid}: pooling {example.pooling.shape} over {num_patches} patches; max_pool {max_pool}"
            )
        if example.subsegment_ids.max() >= DOCUMENT:
            raise ValueError(f"{example.uid}: subsegment id {example.subsegment_ids.max()} >= {DOCUMENT}")
        shifted = np.full((rows, max_pool), PADDING, np.int32)
        shifted[:, :width] = np.where(example.pooling == PADDING, PADDING, example.pooling + patches_before)
        pooling.append(shifted)
        subsegment_ids.append((example.subsegment_ids + document * DOCUMENT).astype(np.int32))
        patches_before += num_patches
    with_crops = [example.crops for example in examples if len(example.crops)]
    return PackedExample(
        uids=tuple(example.uid for example in examples),
        input_ids=np.concatenate([example.input_ids for example in examples]),
        target_ids=np.concatenate([example.target_ids for example in examples]),
        loss_weights=np.concatenate([example.loss_weights for example in examples]),
        position_ids=np.concatenate([example.position_ids for example in examples]),
        subsegment_ids=np.concatenate(subsegment_ids),
        is_visual=np.concatenate([example.is_visual for example in examples]),
        crops=np.concatenate(with_crops) if with_crops else examples[0].crops,
        pooling=np.concatenate(pooling),
        tasks=tuple(example.tasks for example in examples),
    )
