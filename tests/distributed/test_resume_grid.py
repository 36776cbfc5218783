"""After any step, on any number of ranks and workers, training goes on with exactly the batches that it would have had.

Batches are compared by a hash over every tensor of every pack.  The grid runs in one process, a loader per rank; again
with a process for each rank, all of them killed; and chosen cells with Composer's own checkpoints on real gloo ranks.
The first takes 4 s, the second 8 s and up to 5 s of waiting, Composer 33 s on two cores, most of it imports.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from molmo2core.errors import PlatformError
from molmo2core.testing.distributed import run_distributed
from molmo2core.testing.loading import (
    GLOBAL_BATCH,
    PACKS,
    LoadingData,
    hash_epoch,
    open_loading_data,
    pack_hashes,
    tiny_loader,
    write_loading_data,
)
from molmo2core.testing.loading_ranks import hashes_in, train_hashed
from molmo2core.testing.training import training_config

STEPS = PACKS // GLOBAL_BATCH


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_loading_data(folder)
    return folder


@pytest.fixture(scope="module")
def data(folder: Path) -> LoadingData:
    return open_loading_data(folder)


@pytest.fixture(scope="module")
def undisturbed(data: LoadingData) -> list[list[str]]:
    """[step][slot], one rank, no worker."""
    hashes = hash_epoch(data, ranks=1, workers=0)
    assert len({pack for step in hashes for pack in step}) == PACKS, "all packs differ, so that every mix-up shows"
    return hashes


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_saved_after_every_step(data: LoadingData, undisturbed: list[list[str]], ranks: int, workers: int) -> None:
    """Saved by another number of ranks, after every step and before the first: the state is the same for all.  Catches
    a position that is a batch off, that workers do not get, or that only the same topology understands."""
    for step in range(STEPS):
        states = [
            tiny_loader(data, data_parallel_size=size).dataset.state_dict(step * GLOBAL_BATCH, True)
            for size in (1, 2, 4)
        ]
        assert states[0] == states[1] == states[2]
        found = hash_epoch(data, ranks=ranks, workers=workers, state=states[0])
        assert found == undisturbed[step:]


class Rank:
    """A process with one rank's loader, led step by step."""

    def __init__(self, data: LoadingData, out: Path, rank: int, ranks: int, workers: int) -> None:
        context = multiprocessing.get_context("fork")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=self.run, args=(data, out, rank, ranks, workers, theirs))
        self.process.start()

    @staticmethod
    def run(data: LoadingData, out: Path, rank: int, ranks: int, workers: int, pipe: Connection) -> None:
        """Send what each step is given; save when told so."""
        loader = tiny_loader(data, data_parallel_rank=rank, data_parallel_size=ranks, num_workers=workers)
        if (out / "state.json").exists():
            loader.dataset.load_state_dict(json.loads((out / "state.json").read_text()))
        first = loader.dataset.state_dict(0, False)["packs"] // GLOBAL_BATCH
        for step, batch in enumerate(itertools.islice(loader, STEPS - first), first + 1):
            pipe.send((step, pack_hashes(batch)))
            pipe.recv()
            if rank == 0:
                (out / "new").write_text(json.dumps(loader.dataset.state_dict(GLOBAL_BATCH * step, True)))
                os.replace(out / "new", out / "state.json")
            pipe.send("saved")

    def step(self) -> tuple[int, list[str]]:
        """Number of the step and the hashes of this rank's packs."""
        assert self.pipe.poll(60)
        found: tuple[int, list[str]] = self.pipe.recv()
        return found

    def save(self) -> None:
        self.pipe.send("save")
        assert self.pipe.poll(60) and self.pipe.recv() == "saved"

    def kill(self) -> list[int]:
        """Kill -9 this process; its workers, which nobody tells."""
        assert self.process.pid
        workers = children_of(self.process.pid)
        self.process.kill()
        self.process.join()
        assert self.process.exitcode == -signal.SIGKILL
        return workers


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def run_steps(ranks: list[Rank], last: int) -> dict[int, list[str]]:
    """Hashes of all slots of each step up to `last`, after which nothing is saved."""
    found: dict[int, list[str]] = {}
    step = 0
    while step < last:
        given = [rank.step() for rank in ranks]
        ((step),) = {number for number, _ in given}
        found[step] = [pack for _, packs in given for pack in packs]
        if step < last:
            for rank in ranks:
                rank.save()
    return found


@pytest.fixture(scope="module")
def orphans() -> Iterator[list[int]]:
    """Workers whose ranks were killed.  Nobody tells them; torch lets them look for their parent every 5 s."""
    pids: list[int] = []
    yield pids
    deadline = time.monotonic() + 30
    while any(map(is_alive, pids)):
        assert time.monotonic() < deadline, "workers outlive their rank"
        time.sleep(0.05)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_killed_in_every_step(
    data: LoadingData, undisturbed: list[list[str]], orphans: list[int], tmp_path: Path, ranks: int, workers: int
) -> None:
    """All ranks are killed -9 between a step and its save; as many or others, with or without workers, go on from the
    file.  Catches state that lives in a process or a worker, and workers that outlive their rank.

    Processes are forked, which takes milliseconds; those of Composer below are fresh interpreters."""
    expected = {step: undisturbed[step - 1] for step in range(1, STEPS + 1)}
    successors = set()
    for killed_in in expected:
        out = tmp_path / str(killed_in)
        out.mkdir()
        killed = [Rank(data, out, rank, ranks, workers) for rank in range(ranks)]
        assert run_steps(killed, killed_in) == {step: expected[step] for step in range(1, killed_in + 1)}
        left = [pid for rank in killed for pid in rank.kill()]
        assert len(left) == ranks * workers
        others, their_workers = (1, 2, 4)[killed_in % 3], 2 * (killed_in % 2)
        successors.add((others, their_workers))
        going_on = [Rank(data, out, rank, others, their_workers) for rank in range(others)]
        assert run_steps(going_on, STEPS) == {step: expected[step] for step in range(killed_in, STEPS + 1)}
        orphans += [*left, *(pid for rank in going_on for pid in rank.kill())]
    assert len(successors) == 6, "each number of ranks with and without workers"


def is_alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    return False


@pytest.fixture(scope="module")
def killed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two gloo ranks that save at every step; one is killed -9 in step 4."""
    out = tmp_path_factory.mktemp("killed")
    with pytest.raises(PlatformError, match="the process died"):
        run_distributed(train_hashed, 2, folder, out, config(2), None, 4)
    assert sorted(path.name for path in out.glob("*ba*")) == ["ba2", "ba3"]
    return out


def config(ranks: int) -> Any:
    return training_config(
        steps=STEPS, global_batch_packs=GLOBAL_BATCH, num_processes=ranks, save_interval_steps=1, loader_workers=1
    )


def test_composer_on_two_ranks_had_these_batches(killed: Path, undisturbed: list[list[str]]) -> None:
    assert hashes_in(killed, range(2)) == {step: undisturbed[step - 1] for step in (1, 2, 3, 4)}


@pytest.mark.parametrize("ranks", [1, 4])
def test_composer_goes_on_on_other_ranks(
    folder: Path, killed: Path, undisturbed: list[list[str]], tmp_path: Path, ranks: int
) -> None:
    """From the sharded checkpoint of two ranks.  Catches dataset state that sharded checkpoints drop, and samples
    counted per rank."""
    run_distributed(train_hashed, ranks, folder, tmp_path, config(ranks), killed)
    assert hashes_in(tmp_path, range(ranks)) == {step: undisturbed[step - 1] for step in (4, 5, 6)}
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
