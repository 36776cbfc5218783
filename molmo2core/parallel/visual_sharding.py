"""Visual tokens over the ranks that share a sequence: each is computed once, by one rank, and sent where it belongs.

Crops (a video's frames, an image's crops) are dealt out in contiguous, even ranges, so that one video of 384 frames
keeps eight ranks equally busy.  A visual token belongs to the rank of the first crop that its pool reaches into; a
rank encodes its own crops, and those of others that its pools reach into, which only windows over stitched image crops
do.  Features then travel in one exchange to the ranks whose part of the sequence holds their places, so that no rank
holds more of them than it computes or uses (training_and_evaluation.md 3.5 gathers all of them everywhere).

Who computes what follows from the pooling indices, which every rank knows: nothing is negotiated.

Shape legend: V visual tokens of the whole sequence, K patches per pool, R ranks, C crops, v and c one rank's own
tokens and crops, u visual tokens in its part of the sequence, W decoder width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from molmo2core.examples import PADDING
from molmo2core.model.molmo2 import VisualRoute, visual_mismatch


@dataclass(frozen=True, kw_only=True, eq=False)
class VisualShare:
    """What one rank computes, sends and receives."""

    crops: Tensor
    """int64 [c], ascending: the crops that it encodes."""
    pooling: Tensor
    """int64 [v, K]: its pools, with indices into the patches of those crops; in the order of the sequence."""
    route: VisualRoute


def crop_owners(num_crops: int, size: int) -> Tensor:
    """int64 [C]: the rank of each crop, in contiguous ranges that differ by one crop at most."""
    return torch.arange(num_crops) * size // max(num_crops, 1)


def own_crops(pooling: Tensor, owners: Tensor, rank: int, num_patches: int) -> Tensor:
    """int64 [c], ascending: crops that `rank` encodes; arguments as of visual_share."""
    own = pooling[_computed_by(pooling, owners, num_patches) == rank]
    return torch.unique(own[own != PADDING] // num_patches)


def visual_share(
    pooling: Tensor, owners: Tensor, places: tuple[int, ...], rank: int, *, num_patches: int
) -> VisualShare:
    """The share of `rank`.

    Args:
        pooling: int64 [V, K] indices into the patches of all crops, PADDING where a window is cut.
        owners: int64 [C], the rank of each crop.
        places: visual tokens in each rank's part of the sequence, V in all.
        num_patches: of a crop.

    Raises:
        DataError: `places` are not V in all.
    """
    if sum(places) != len(pooling):
        raise visual_mismatch(sum(places), len(pooling))
    size = len(places)
    computed_by = _computed_by(pooling, owners, num_patches)
    used_by = torch.arange(size).repeat_interleave(torch.tensor(places))
    own = pooling[computed_by == rank]
    crops = own_crops(pooling, owners, rank, num_patches)
    place_of_crop = torch.zeros(len(owners), dtype=torch.int64)
    place_of_crop[crops] = torch.arange(len(crops))
    moved = place_of_crop[own.clamp(min=0) // num_patches] * num_patches + own.clamp(min=0) % num_patches
    sources = computed_by[used_by == rank]
    return VisualShare(
        crops=crops,
        pooling=torch.where(own == PADDING, PADDING, moved),
        route=VisualRoute(
            sent=_counts(used_by[computed_by == rank], size),
            received=_counts(sources, size),
            # Tokens arrive by source rank, and from each in the order of the sequence.
            order=sources.argsort(stable=True).argsort(),
        ),
    )


def exchange_visual(features: Tensor, route: VisualRoute, *, group: dist.ProcessGroup) -> Tensor:
    """Visual tokens of this rank's part of the sequence, [u, W].  Called by all ranks of `group`, gradients come back.

    Args:
        features: [at least v, W]; rows after the first v are sent nowhere and get a gradient of 0.
    """
    arrived: Tensor = _Exchange.apply(features, route.sent, route.received, group)  # type: ignore[no-untyped-call]
    return arrived[route.order]


class _Exchange(torch.autograd.Function):
    """Rows to other ranks; backward is the way back."""

    @staticmethod
    def forward(
        ctx: Any, features: Tensor, sent: tuple[int, ...], received: tuple[int, ...], group: dist.ProcessGroup
    ) -> Tensor:
        ctx.sent, ctx.received, ctx.group, ctx.rows = sent, received, group, features.shape[0]
        return _exchange(features[: sum(sent)], sent, received, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        returned = _exchange(gradients[0], ctx.received, ctx.sent, ctx.group)
        unsent = returned.new_zeros(ctx.rows - returned.shape[0], returned.shape[1])
        return torch.cat([returned, unsent]), None, None, None


def _exchange(rows: Tensor, sent: tuple[int, ...], received: tuple[int, ...], group: dist.ProcessGroup) -> Tensor:
    arrived = rows.new_empty(sum(received), rows.shape[1])
    dist.all_to_all_single(arrived, rows.contiguous(), list(received), list(sent), group=group)
    return arrived


def _computed_by(pooling: Tensor, owners: Tensor, num_patches: int) -> Tensor:
    """int64 [V]: the rank of the first crop that each pool reaches into."""
    first = torch.where(pooling == PADDING, torch.iinfo(pooling.dtype).max, pooling).amin(dim=1)
    return owners[first // num_patches]


def _counts(ranks: Tensor, size: int) -> tuple[int, ...]:
    return tuple(torch.bincount(ranks, minlength=size).tolist())
