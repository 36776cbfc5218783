"""After any step, on any number of ranks and workers, training goes on with exactly the batches that it would have had.

Batches are compared by a hash over every tensor of every pack.  The grid of all steps runs in one process, a loader per
rank; chosen cells with processes that are really killed, and with Composer's own checkpoints on real gloo ranks.
The grid takes 3 s, the killed loaders 7 s, Composer 33 s on two cores, most of it imports of twelve processes.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
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


RANK = """
import json, os, sys
from pathlib import Path
from molmo2core.testing.loading import open_loading_data, pack_hashes, tiny_loader

folder, out, rank, ranks, workers = Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:])
packs = tiny_loader(open_loading_data(folder), data_parallel_rank=rank, data_parallel_size=ranks, num_workers=workers)
state = out / "state.json"
if state.exists():
    packs.dataset.load_state_dict(json.loads(state.read_text()))
first = packs.dataset.state_dict(0, False)["packs"] // 4
print("ready", flush=True)
for step, batch in enumerate(packs, first):
    print(json.dumps([step, pack_hashes(batch)]), flush=True)
    if sys.stdin.readline() != "save\\n":  # the parent asks for the next step, or kills
        break
    if rank == 0:
        out.joinpath("new").write_text(json.dumps(packs.dataset.state_dict(4 * (step + 1), True)))
        os.replace(out / "new", state)
    print("saved", flush=True)
"""


class Rank:
    """One process with a loader, led step by step."""

    def __init__(self, folder: Path, out: Path, rank: int, ranks: int, workers: int) -> None:
        arguments = [str(folder), str(out), str(rank), str(ranks), str(workers)]
        self.process = subprocess.Popen(
            [sys.executable, "-c", RANK, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def read(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def step(self) -> list[str]:
        return json.loads(self.read())[1]

    def save(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("save\n")
        self.process.stdin.flush()
        assert self.read() == "saved\n"

    def kill(self) -> None:
        workers = children_of(self.process.pid)
        for pid in (self.process.pid, *workers):
            os.kill(pid, signal.SIGKILL)
        self.process.communicate()


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_killed_processes_go_on_as_others(folder: Path, undisturbed: list[list[str]], tmp_path: Path) -> None:
    """Two ranks with two workers each are killed -9 between a step and its save, then one rank, then two without
    workers finish the epoch.  Catches state that lives in a process, a worker or in shared memory."""
    found: dict[int, list[str]] = {}
    for ranks, workers, until in ((2, 2, 3), (1, 1, 5), (2, 0, STEPS)):
        processes = [Rank(folder, tmp_path, rank, ranks, workers) for rank in range(ranks)]
        assert [process.read() for process in processes] == ["ready\n"] * ranks
        state = tmp_path / "state.json"
        first = json.loads(state.read_text())["packs"] // GLOBAL_BATCH if state.exists() else 0
        for step in range(first, until):
            hashes = [pack for process in processes for pack in process.step()]
            assert found.setdefault(step, hashes) == hashes, "done again after the kill: the same"
            if step < until - 1:
                for process in processes:
                    process.save()
        for process in processes:
            process.kill()
    assert [found[step] for step in range(STEPS)] == undisturbed


@pytest.fixture(scope="module")
def killed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two gloo ranks that save at every step; one is killed -9 in step 4."""
    out = tmp_path_factory.mktemp("killed")
    with pytest.raises(PlatformError, match="the process died"):
        run_distributed(train_hashed, 2, folder, out, config(2), None, 4)
    assert sorted(path.name for path in out.glob("*ba*")) == ["ep0-ba2", "ep0-ba3"]
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
    assert [line["step"] for line in lines] == [4, 5, 6]
