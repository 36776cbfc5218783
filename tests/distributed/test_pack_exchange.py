"""Packs that one rank of a group loads arrive on all of them, each with the pixels that it encodes."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from molmo2core.parallel.pack_exchange import CROP_OWNERS, pack_hash
from molmo2core.parallel.visual_sharding import crop_owners, own_crops
from molmo2core.testing.distributed import run_distributed
from molmo2core.testing.loading import GEOMETRY, GLOBAL_BATCH, PACKS, open_loading_data, tiny_loader, write_loading_data
from molmo2core.testing.pack_exchange_ranks import Shared, faults, share_epochs

CASES = [(2, 0), (2, 2), (4, 0)]
"""Ranks that share a pack (of four), loader workers."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_loading_data(folder)
    return folder


@pytest.fixture(scope="module")
def shared(folder: Path) -> list[dict[tuple[int, int], tuple[Shared, int]]]:
    return run_distributed(share_epochs, 4, folder, CASES)


def expected(folder: Path, size: int, rank: int) -> dict[int, str]:
    """Pack number -> hash of what `rank` of a group must hold of it, from a loader that shares nothing."""
    found = {}
    for batch in itertools.islice(tiny_loader(open_loading_data(folder)), PACKS // GLOBAL_BATCH):
        for number, pack in zip(batch["pack_numbers"], batch["packs"], strict=True):
            owners = crop_owners(len(pack["crops"]), size)
            own = own_crops(pack["pooling"], owners, rank, GEOMETRY.num_patches)
            found[number] = pack_hash(pack | {"crops": pack["crops"][own], CROP_OWNERS: owners})
    return found


@pytest.mark.parametrize(("size", "workers"), CASES)
def test_all_ranks_hold_the_same_packs_and_their_own_pixels(
    folder: Path, shared: list[dict[tuple[int, int], tuple[Shared, int]]], size: int, workers: int
) -> None:
    """Would catch packs in another order or skipped when turns meet workers, pixels of another rank, and a group that
    gets another group's packs."""
    groups = 4 // size
    share = GLOBAL_BATCH // groups
    for rank in range(4):
        held, _ = shared[rank][size, workers]
        slots = range(rank // size * share, (rank // size + 1) * share)
        assert [number for number, _ in held] == [number for number in range(PACKS) if number % GLOBAL_BATCH in slots]
        wanted = expected(folder, size, rank % size)
        assert all(hashed == wanted[number] for number, hashed in held)


@pytest.mark.parametrize(("size", "workers"), [case for case in CASES if not case[1]])
def test_each_pack_is_loaded_once(
    shared: list[dict[tuple[int, int], tuple[Shared, int]]], size: int, workers: int
) -> None:
    """What the exchange is for: without it each rank would load all packs of its group."""
    loaded = [shared[rank][size, workers][1] for rank in range(4)]
    assert loaded == [PACKS // 4] * 4


def test_an_error_of_one_rank_is_everybodys(folder: Path) -> None:
    """Would catch ranks that wait for a pack that will never come; and shows that a flipped byte goes unnoticed unless
    it is looked for."""
    results = run_distributed(faults, 2, folder)
    assert all("DataError: row 7" in result["data"] for result in results)
    assert "PlatformError: pack 0 on rank 1" in results[1]["network"]
    assert [result["unverified"] for result in results] == ["no error"] * 2
