"""Several examples in one sequence."""

from __future__ import annotations

import numpy as np
import pytest

from molmo2core.examples import DOCUMENT, PADDING, ROOT, PackedExample, TokenizedExample
from molmo2core.packing.concat import pack_examples


def example(uid: str, *, crops: int, pool: int, branches: int = 2, patches: int = 9) -> TokenizedExample:
    """A tree of 3 root tokens and 2 tokens per branch; one pooling row per crop."""
    length = 3 + 2 * branches
    pooling = np.arange(crops * pool, dtype=np.int32).reshape(crops, pool) % max(crops * patches, 1)
    if crops:
        pooling[0, -1] = PADDING
    return TokenizedExample(
        uid=uid,
        input_ids=np.arange(length, dtype=np.int32),
        target_ids=np.arange(1, length + 1, dtype=np.int32),
        loss_weights=np.linspace(0, 1, length, dtype=np.float32),
        position_ids=np.array([0, 1, 2] + [3, 4] * branches, np.int32),
        subsegment_ids=np.array([ROOT] * 3 + [b for b in range(branches) for _ in (0, 1)], np.int32),
        is_visual=np.array([False, True, False] + [False] * 2 * branches),
        crops=np.full((crops, patches, 12), len(uid), np.uint8),
        pooling=pooling,
        tasks=("image_qa",) * branches,
    )


def test_documents_and_patches_move_and_positions_stay() -> None:
    """Catches pooling rows that point into another example's crops, and ids that let examples see each other."""
    parts = [example("a", crops=2, pool=4), example("text", crops=0, pool=4), example("b", crops=1, pool=9, branches=3)]
    before = [part.pooling.copy() for part in parts]
    pack = pack_examples(parts, max_pool=9)
    assert pack.uids == ("a", "text", "b")
    assert len(pack.input_ids) == 7 + 7 + 9
    assert pack.crops.shape == (3, 9, 12)
    assert pack.pooling.shape == (3, 9)
    assert pack.pooling[0].tolist() == [0, 1, 2, PADDING] + [PADDING] * 5
    assert pack.pooling[1].tolist() == [4, 5, 6, 7] + [PADDING] * 5
    assert pack.pooling[2].tolist() == [18, 19, 20, 21, 22, 23, 24, 25, PADDING], "b's patches start after 2 crops"
    assert pack.subsegment_ids[:3].tolist() == [ROOT] * 3
    assert pack.subsegment_ids[7:10].tolist() == [ROOT + DOCUMENT] * 3
    assert pack.subsegment_ids[-1] == 2 + 2 * DOCUMENT
    assert pack.position_ids[14:17].tolist() == [0, 1, 2]
    assert pack.tasks == (("image_qa",) * 2, ("image_qa",) * 2, ("image_qa",) * 3)
    for part, pooling in zip(parts, before, strict=True):
        assert np.array_equal(part.pooling, pooling), "examples are never edited in place"


def test_dtypes_survive() -> None:
    """Catches an int64 or float64 that doubles what workers send."""
    pack = pack_examples([example("a", crops=1, pool=4), example("b", crops=0, pool=4)], max_pool=4)
    single = example("a", crops=1, pool=4)
    for name in PackedExample.__dataclass_fields__:
        if isinstance(getattr(single, name, None), np.ndarray):
            assert getattr(pack, name).dtype == getattr(single, name).dtype, name


def test_text_alone_has_no_crops() -> None:
    """Catches an invented crop: the trainer adds its own where ranks must agree."""
    pack = pack_examples([example("a", crops=0, pool=4)], max_pool=9)
    assert pack.crops.shape[0] == 0
    assert pack.pooling.shape == (0, 9)


def test_impossible_parts_are_refused() -> None:
    """Catches silent corruption when preprocessing and model disagree."""
    with pytest.raises(ValueError, match="at least one"):
        pack_examples([], max_pool=4)
    with pytest.raises(ValueError, match="max_pool 4"):
        pack_examples([example("a", crops=1, pool=9)], max_pool=4)
    outside = example("a", crops=1, pool=4)
    outside.pooling[0, 0] = 9
    with pytest.raises(ValueError, match="over 9 patches"):
        pack_examples([outside], max_pool=4)
