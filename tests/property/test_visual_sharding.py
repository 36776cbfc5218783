"""Visual tokens that are dealt out to ranks come back whole: simulated for all ranks in one process."""

from __future__ import annotations

from itertools import accumulate, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from molmo2core.errors import DataError
from molmo2core.examples import PADDING
from molmo2core.parallel.visual_sharding import VisualShare, crop_owners, visual_share

PATCHES = 4


@st.composite
def batches(draw: st.DrawFn) -> tuple[torch.Tensor, int, tuple[int, ...]]:
    """(pooling [V, 3] of pools that may straddle crops, crops, visual places of each rank's part of the sequence)"""
    num_crops, size = draw(st.integers(1, 9)), draw(st.integers(1, 5))
    index = st.integers(0, num_crops * PATCHES - 1)
    # The first patch of a pool is always there; others may be cut off.
    pool = st.tuples(index, st.one_of(st.just(PADDING), index), st.one_of(st.just(PADDING), index))
    rows = draw(st.lists(pool.map(lambda p: draw_order(p, num_crops)), min_size=0, max_size=12))
    cuts = sorted(draw(st.lists(st.integers(0, len(rows)), min_size=size - 1, max_size=size - 1)))
    edges = [0, *cuts, len(rows)]
    places = tuple(stop - start for start, stop in pairwise(edges))
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, 3), num_crops, places


def draw_order(pool: tuple[int, int, int], num_crops: int) -> tuple[int, int, int]:
    """The valid patch may stand anywhere in its row."""
    return pool[1:] + pool[:1] if num_crops % 2 else pool


def shares_of(pooling: torch.Tensor, num_crops: int, places: tuple[int, ...]) -> list[VisualShare]:
    owners = crop_owners(num_crops, len(places))
    return [visual_share(pooling, owners, places, rank, num_patches=PATCHES) for rank in range(len(places))]


@given(batches())
def test_every_token_is_computed_once_and_arrives_at_its_place(
    batch: tuple[torch.Tensor, int, tuple[int, ...]],
) -> None:
    """Would catch a token computed twice or by nobody, pools that point into another rank's crops, and tokens that
    arrive in the order of ranks instead of that of the sequence.  A 'feature' is the patches that its pool names."""
    pooling, num_crops, places = batch
    shares = shares_of(pooling, num_crops, places)
    features = []
    for share in shares:
        crop, patch = share.pooling.clamp(min=0) // PATCHES, share.pooling.clamp(min=0) % PATCHES
        named = share.crops[crop] * PATCHES + patch if len(share.crops) else share.pooling
        features.append(torch.where(share.pooling == PADDING, PADDING, named))
    assert sum(len(feature) for feature in features) == len(pooling)
    starts = [[0, *accumulate(share.route.sent)] for share in shares]
    for rank, (share, start) in enumerate(zip(shares, [0, *accumulate(places)][:-1], strict=True)):
        arrived = [features[source][starts[source][rank] : starts[source][rank + 1]] for source in range(len(shares))]
        assert tuple(len(rows) for rows in arrived) == share.route.received
        found = torch.cat(arrived)[share.route.order]
        assert torch.equal(found, pooling[start : start + places[rank]])


@given(st.integers(1, 400), st.integers(1, 16))
def test_crops_are_dealt_out_evenly_and_in_order(num_crops: int, size: int) -> None:
    """One video is many crops: dealing out examples instead would leave all ranks but one idle."""
    owners = crop_owners(num_crops, size)
    counts = torch.bincount(owners, minlength=size)
    assert torch.equal(owners, owners.sort().values)
    assert counts.max() - counts.min() <= 1


def test_frames_are_encoded_by_one_rank_only() -> None:
    """The pools of a video stay inside their frames: no frame is encoded twice."""
    frames, pools = 384, 81
    pooling = (torch.arange(frames)[:, None] * 729 + torch.arange(pools) * 9).reshape(-1, 1)
    places = (frames * pools // 8,) * 8
    shares = [visual_share(pooling, crop_owners(frames, 8), places, rank, num_patches=729) for rank in range(8)]
    assert [len(share.crops) for share in shares] == [48] * 8
    stay = [share.route.sent[rank] for rank, share in enumerate(shares)]
    assert stay == list(places), "nothing has to travel"


@pytest.mark.parametrize("places", [(1, 1), (2, 2)])
def test_places_without_features_are_a_data_error(places: tuple[int, ...]) -> None:
    """A single rank finds out when it adds features to places; ranks that share, before anything is exchanged."""
    pooling = torch.tensor([[0, 1], [5, 6], [7, PADDING]])
    with pytest.raises(DataError, match=f"{sum(places)} <im_patch> tokens; expected 3"):
        visual_share(pooling, crop_owners(2, 2), places, 0, num_patches=PATCHES)
