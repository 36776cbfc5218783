"""run_distributed: the helper under every distributed test must itself notice errors, deaths and hangs."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from molmo2core.errors import DataError, PlatformError
from molmo2core.testing.distributed import run_distributed


def sum_over_ranks(offset: float) -> tuple[int, torch.Tensor]:
    value = torch.tensor([dist.get_rank() + offset])
    dist.all_reduce(value)
    return dist.get_rank(), value


def fail_on_last_rank() -> None:
    if dist.get_rank() == dist.get_world_size() - 1:
        raise DataError("shard 3", found="a hole", expected="bytes")
    dist.barrier()


class Unpicklable(Exception):
    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} and {second}")


def fail_unpicklable() -> None:
    raise Unpicklable("salt", "pepper")


def die_on_rank_0() -> None:
    if dist.get_rank() == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def sleep_forever() -> None:
    time.sleep(600)


def test_results_come_in_order_of_rank_and_collectives_work() -> None:
    """Would catch ranks that do not share a group, or results in order of arrival."""
    results = run_distributed(sum_over_ranks, 2, 10.0)
    assert [rank for rank, _ in results] == [0, 1]
    assert all(torch.equal(total, torch.tensor([21.0])) for _, total in results)


def test_the_error_of_a_rank_arrives_with_its_type_and_rank_while_others_wait_in_a_collective() -> None:
    started = time.monotonic()
    with pytest.raises(DataError, match="shard 3: a hole") as caught:
        run_distributed(fail_on_last_rank, 2)
    assert "on rank 1 of 2" in caught.value.__notes__[0]
    assert time.monotonic() - started < 60, "rank 0 was waited for"


def test_an_error_that_cannot_be_unpickled_still_arrives() -> None:
    with pytest.raises(RuntimeError, match="Unpicklable: salt and pepper"):
        run_distributed(fail_unpicklable, 1)


def test_a_killed_rank_is_an_error_not_a_hang() -> None:
    with pytest.raises(PlatformError, match="rank 0 of 2: the process died"):
        run_distributed(die_on_rank_0, 2)


def test_a_hang_ends_at_the_timeout() -> None:
    with pytest.raises(PlatformError, match="no result in time"):
        run_distributed(sleep_forever, 1, timeout_seconds=6)
