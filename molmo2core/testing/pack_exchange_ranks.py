"""What each rank of a test of handed-over packs does (importable, since ranks are spawned)."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from molmo2core.errors import DataError, Molmo2Error
from molmo2core.examples import Batch
from molmo2core.loading.dataset import LoadedPack, PackDataset
from molmo2core.parallel.mesh import host_context_group
from molmo2core.parallel.pack_exchange import PackExchange, pack_hash
from molmo2core.testing.loading import GLOBAL_BATCH, PACKS, open_loading_data, tiny_loader

Shared = list[tuple[int, str]]
"""Pack number and the hash of what this rank holds of it."""


def share_epochs(folder: Path, cases: list[tuple[int, int]]) -> dict[tuple[int, int], tuple[Shared, int]]:
    """(what this rank got, packs that it loaded itself) for each (ranks that share, loader workers)."""
    return {(size, workers): _share_epoch(folder, size, workers) for size, workers in cases}


def _share_epoch(folder: Path, size: int, workers: int) -> tuple[Shared, int]:
    rank = dist.get_rank()
    loaded: list[int] = []
    load = PackDataset.load

    def counting(dataset: PackDataset, index: int) -> LoadedPack:
        loaded.append(index)
        return load(dataset, index)

    loader = tiny_loader(
        open_loading_data(folder),
        data_parallel_rank=rank // size,
        data_parallel_size=dist.get_world_size() // size,
        num_workers=workers,
        sharing=PackExchange(host_context_group(size), verify=True),
    )
    found: Shared = []
    with mock.patch.object(PackDataset, "load", counting):
        for batch in itertools.islice(loader, PACKS // GLOBAL_BATCH):
            found += zip(batch["pack_numbers"], map(pack_hash, batch["packs"]), strict=True)
    return found, len(loaded)


def faults(folder: Path) -> dict[str, str]:
    """What each rank is told when one rank's data is bad, and when what arrives is not what was sent."""
    group = host_context_group(dist.get_world_size())
    exchange = PackExchange(group, verify=True)
    rank = dist.get_rank()
    batch = next(iter(tiny_loader(open_loading_data(folder)).dataset))  # of one pack
    assert not isinstance(batch, Molmo2Error)
    told = exchange(DataError("row 7", found="a broken medium") if rank == 1 else None, 1)
    results = {"data": f"{type(told).__name__}: {told}"}
    receive = dist.recv

    def flipping(tensor: torch.Tensor, *arguments: Any, **named: Any) -> Any:
        result = receive(tensor, *arguments, **named)
        tensor.view(-1)[0] ^= 1
        return result

    with mock.patch.object(dist, "recv", flipping):
        results["network"] = _error_of(exchange, batch if rank == 0 else None)
    results["unverified"] = _error_of(PackExchange(group), batch if rank == 0 else None)
    return results


def _error_of(exchange: PackExchange, found: Batch | None) -> str:
    try:
        exchange(found, 0)
    except Molmo2Error as error:
        return f"{type(error).__name__}: {error}"
    return "no error"
