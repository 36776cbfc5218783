"""Each pack is loaded by one of the ranks that share it, and handed to the others.

Decoding a video of 384 frames takes seconds; eight ranks that share its sequence would each do it, or, worse, would
each wait for all eight to have done it.  Instead the ranks of a group take turns: the first loads the first pack, the
second the second, ..., each with its own workers, ahead of training.  Before a step packs go round: all per-token
arrays to all ranks, pixels only to those ranks that encode them (visual_sharding.py).  This happens between processes
in host memory, over gloo, whatever the device.

Measured in benchmarks/context_parallel.py.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor

from molmo2core.errors import Molmo2Error, PlatformError
from molmo2core.examples import Batch
from molmo2core.parallel.visual_sharding import crop_owners, own_crops

CROP_OWNERS = "crop_owners"
"""Tensor of a pack that was handed over: int64 [crops of the whole pack], the rank of each; `crops` are then those that
this rank encodes."""
Pack = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class _Letter:
    """What goes to all ranks of the group."""

    batch: Batch | Molmo2Error
    """Without pixels."""
    crop_shapes: tuple[tuple[int, ...], ...] = ()
    """Of all crops of each pack."""
    hashes: tuple[tuple[str, ...], ...] = ()
    """[pack][rank] of what each rank must hold in the end; empty: not checked."""


class PackExchange:
    """Called by all ranks of `group` in the same order.

    Args:
        group: of ranks that share sequences, for tensors on the CPU.
        verify: whether each rank compares a hash of what it holds with that of the rank that loaded it.
    """

    def __init__(self, group: dist.ProcessGroup, *, verify: bool = False) -> None:
        self.group, self.verify = group, verify
        self.rank, self.size = group.rank(), group.size()

    def __call__(self, found: Batch | Molmo2Error | None, source: int) -> Batch | Molmo2Error:
        """This rank's share of the batch that rank `source` of the group found; an error there is an error everywhere.

        Args:
            found: on `source`, what it loaded; else None.

        Raises:
            PlatformError: with `verify`, what arrived is not what was sent.
        """
        letters: list[_Letter | None] = [self._letter(found) if found is not None else None]
        dist.broadcast_object_list(letters, src=dist.get_global_rank(self.group, source), group=self.group)
        letter = cast(_Letter, letters[0])
        if isinstance(letter.batch, Molmo2Error):
            return letter.batch
        batch = letter.batch
        packs = []
        for number, (pack, shape) in enumerate(zip(batch["packs"], letter.crop_shapes, strict=True)):
            owners = crop_owners(shape[0], self.size)
            whole = cast(Batch, found)["packs"][number]["crops"] if found is not None else None
            crops = self._share_crops(pack["pooling"], owners, shape, whole, source)
            packs.append(pack | {"crops": crops, CROP_OWNERS: owners})
            if letter.hashes and pack_hash(packs[-1]) != letter.hashes[number][self.rank]:
                raise PlatformError(
                    f"pack {batch['pack_numbers'][number]} on rank {dist.get_rank()}",
                    found="other tokens or pixels than the rank holds that loaded it",
                    expected="the same on all ranks of the group",
                    mend="check the network and the memory of these machines",
                )
        return Batch(**(batch | {"packs": packs}))

    def _letter(self, found: Batch | Molmo2Error) -> _Letter:
        if isinstance(found, Molmo2Error):
            return _Letter(batch=found)
        without = [{name: value for name, value in pack.items() if name != "crops"} for pack in found["packs"]]
        return _Letter(
            batch=Batch(**(found | {"packs": without})),
            crop_shapes=tuple(tuple(pack["crops"].shape) for pack in found["packs"]),
            hashes=tuple(self._hashes(pack) for pack in found["packs"]) if self.verify else (),
        )

    def _hashes(self, pack: Pack) -> tuple[str, ...]:
        owners = crop_owners(len(pack["crops"]), self.size)
        chosen = (own_crops(pack["pooling"], owners, rank, pack["crops"].shape[1]) for rank in range(self.size))
        return tuple(pack_hash(pack | {"crops": pack["crops"][crops], CROP_OWNERS: owners}) for crops in chosen)

    def _share_crops(
        self, pooling: Tensor, owners: Tensor, shape: tuple[int, ...], whole: Tensor | None, source: int
    ) -> Tensor:
        """Crops that this rank encodes; `whole`, all of them, is there on `source`."""
        own = own_crops(pooling, owners, self.rank, shape[1])
        if whole is None:
            received = torch.empty(len(own), *shape[1:], dtype=torch.uint8)
            if len(own):
                dist.recv(received, dist.get_global_rank(self.group, source), group=self.group)
            return received
        sent = []  # kept until they have arrived
        for rank in range(self.size):
            crops = own_crops(pooling, owners, rank, shape[1])
            if rank != self.rank and len(crops):
                part = whole[crops]
                sent.append((dist.isend(part, dist.get_global_rank(self.group, rank), group=self.group), part))
        for work, _ in sent:
            if work is not None:
                work.wait()
        return whole[own]


def pack_hash(pack: Pack) -> str:
    """Of all tensors of a pack, by name."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(pack):
        digest.update(f"{name} {tuple(pack[name].shape)}".encode())
        digest.update(pack[name].contiguous().numpy().tobytes())
    return digest.hexdigest()
