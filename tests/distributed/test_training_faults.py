"""Trainings that are killed, short of room, or gone on with by another number of ranks.

Quick, because ranks are forked from a server that has imported the trainer: an attempt costs half a second of CPU.
"""

from __future__ import annotations

import json
import random
import secrets
import shutil
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from molmo2core import storage
from molmo2core.errors import PlatformError
from molmo2core.testing.distributed import run_distributed
from molmo2core.testing.fault_runs import (
    Kill,
    Phase,
    Run,
    load_and_go_on,
    step_agreed_on,
    train_on_full_disk,
    train_or_die,
)
from molmo2core.testing.tiny_model import tiny_model
from molmo2core.testing.training import training_config
from molmo2core.testing.training_ranks import DROPOUT
from molmo2core.training.checkpoint_folders import checkpoint_name, saved_steps
from molmo2core.training.config import GroupSchedule, OptimizerConfig, TrainingConfig

PHASES: tuple[Phase, ...] = ("save", "step", "stop", "start")


def config(ranks: int, **changes: Any) -> TrainingConfig:
    return training_config(**{"num_processes": ranks, "save_interval_steps": 2, "dropout": DROPOUT} | changes)


def run(folder: Path, settings: TrainingConfig, kill: Kill | None = None) -> Run:
    """Of rank 0."""
    return run_distributed(train_or_die, settings.num_processes, folder, settings, kill)[0]


def assert_same(found: dict[str, torch.Tensor] | None, expected: dict[str, torch.Tensor] | None) -> None:
    assert found is not None and expected is not None and found.keys() == expected.keys()
    assert [name for name in expected if not found[name].equal(expected[name])] == []


@pytest.mark.parametrize(("ranks", "kills", "steps", "interval"), [(1, 20, 40, 2), (2, 3, 12, 4)])
def test_killed_at_random_moments_training_ends_with_the_same_weights(
    tmp_path: Path, ranks: int, kills: int, steps: int, interval: int
) -> None:
    """kill -9 while training starts, in steps, in saves, and in the save after a SIGTERM: bit for bit the undisturbed
    run's weights and losses.  With two ranks one of them is killed, as by the kernel when memory runs out, and the
    other ended with it.  Would catch a half checkpoint that is taken for whole, a good one lost, batches seen twice,
    and random state or moments that are not restored.
    """
    seed = secrets.randbits(32)
    print(f"seed of the moments: {seed}")
    draw = random.Random(seed)
    settings = config(ranks, steps=steps, save_interval_steps=interval)
    undisturbed = run(tmp_path / "undisturbed", settings)
    folder = tmp_path / "killed"
    moments: list[tuple[Phase, int]] = []
    in_save = 0
    for attempt in range(2 * kills):
        if len(moments) == kills:
            break
        phase = PHASES[attempt % len(PHASES)]
        seconds = draw.uniform(0, undisturbed.durations["save" if phase == "stop" else phase])
        number = draw.randint(1, 3) if phase in ("step", "stop") else 1
        kill = Kill(phase=phase, number=number, seconds=seconds, rank=draw.randrange(ranks))
        before = saved_steps(str(folder))
        with pytest.raises(PlatformError, match=r"the process died|asked to stop") as error:
            run(folder, settings, kill)
        after = saved_steps(str(folder))
        assert not before or max(after) >= max(before), (kill, before, after)
        in_save += (folder / ".saving").exists()
        if "the process died" in str(error.value):  # else its last save was done before the time was up
            moments.append((kill.phase, max(after, default=0)))
    print(f"killed in these phases, with these steps saved: {moments}; {in_save} within a save")
    assert len(moments) == kills and (in_save or kills < 20)
    found = run(folder, settings)
    assert_same(found.weights, undisturbed.weights)
    for name in ("step", "loss", "packs", "tokens"):
        assert [line[name] for line in found.lines] == [line[name] for line in undisturbed.lines], name
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == sorted(
        [f"ba{steps - interval}", f"ba{steps}"]
    )


def test_checkpoints_go_on_on_any_number_of_ranks(tmp_path: Path) -> None:
    """1 -> 2 -> 4 -> 2 -> 1, by way of the files of one rank and the shards of several.

    What is loaded is bit for bit what was saved; two steps further on it is what one rank gets.  Would catch a form
    that the other number of ranks cannot read, moments that are lost (steps of AdamW would be far off), and a form that
    is handed on, so that eight ranks would for ever save in one piece.  Tolerance: sums over ranks round differently;
    measured 1.2e-7, the weights move by more than 1e-4.
    """
    rate = GroupSchedule(learning_rate=1e-2, warmup_steps=1)
    # A large epsilon makes AdamW nearly linear in the gradient; rates must not depend on the last step.
    optimizer = OptimizerConfig(vision_encoder=rate, connector=rate, decoder=rate, eps=1.0, final_fraction=1.0)
    changes: dict[str, Any] = {"optimizer": optimizer, "dropout": training_config().dropout, "checkpoints_kept": 9}
    alone = run(tmp_path / "alone", config(1, steps=10, **changes))
    folder = tmp_path / "moved"
    shutil.copytree(tmp_path / "alone", folder)
    for step in (4, 6, 8, 10):
        shutil.rmtree(folder / checkpoint_name(step))
    before = None
    for ranks, step in ((2, 4), (4, 6), (2, 8), (1, 10)):
        settings = config(ranks, steps=10, **changes)
        loaded, trained = run_distributed(load_and_go_on, ranks, folder, settings, step)[0]
        if before is not None:
            assert_same(loaded, before)
        before = trained
        forms = sorted(path.name for path in (folder / checkpoint_name(step)).iterdir())
        assert forms == ["_SUCCESS.json", "records", "state.pt" if ranks == 1 else "shards"]
        assert len(list((folder / checkpoint_name(step)).glob("shards/*.distcp"))) == (ranks if ranks > 1 else 0)
    weights = cast(dict[str, torch.Tensor], alone.weights)
    difference = max((before[name] - value).abs().max().item() for name, value in weights.items())
    moved = max((weights[name] - value).abs().max().item() for name, value in tiny_model().state_dict().items())
    assert difference < 1e-6 and moved > 1e-4, (difference, moved)
    assert not (folder / ".converted").exists()


def test_a_disk_that_is_full_for_a_while_costs_checkpoints_only(tmp_path: Path) -> None:
    """On one of two ranks files cannot grow.  Would catch a rank that waits for ever for one that could not write, a
    half-written checkpoint in place of the last good one, and an end of training for what somebody may mend."""
    settings = config(2, steps=10)
    results = run_distributed(train_on_full_disk, 2, tmp_path / "mended", settings, 4, 8)
    assert [error for _, error in results] == ["", ""]
    lines = [json.loads(line) for line in (tmp_path / "mended" / "saves.jsonl").read_text().splitlines()]
    assert [(line["step"], bool(line["problem"])) for line in lines] == [
        (2, False), (4, False), (6, True), (8, True), (10, False)
    ]  # fmt: skip
    for _, error in run_distributed(train_on_full_disk, 2, tmp_path / "full", settings, 4, 10):
        assert "cannot write a checkpoint, 3 times in a row" in error
        assert "free space for 3 checkpoints and run it again: it goes on from step 4" in error
    assert sorted(path.name for path in (tmp_path / "full").glob("*ba*")) == ["ba2", "ba4"]
    assert not (tmp_path / "full" / ".saving").exists()
    assert storage.damage(tmp_path / "full" / "ba4") == ""
    assert_same(run(tmp_path / "full", settings).weights, results[0][0])


def test_nodes_go_on_from_a_checkpoint_that_all_have(tmp_path: Path) -> None:
    """One node has missed the newest, and another's is damaged.  Would catch ranks that start at different steps, or
    wait for each other for ever."""
    for rank, steps in enumerate(((2, 4, 6, 8), (2, 4, 6))):
        for step in steps:
            folder = tmp_path / f"node-{rank}" / checkpoint_name(step)
            folder.mkdir(parents=True)
            (folder / "state.pt").write_text(str(step))
            storage.seal_folder(folder, {"state.pt": storage.file_facts(folder / "state.pt")}, {})
    (tmp_path / "node-0" / "ba6" / "state.pt").write_text("?")
    (tmp_path / "node-1" / ".saving").mkdir()
    results = run_distributed(step_agreed_on, 2, tmp_path)
    assert [found for found, _ in results] == [tmp_path / f"node-{rank}" / "ba4" for rank in range(2)]
    assert [len(left) for _, left in results] == [4, 3]
    for step in (2, 4):
        shutil.rmtree(tmp_path / "node-1" / checkpoint_name(step))
    assert [found for found, _ in run_distributed(step_agreed_on, 2, tmp_path)] == [None, None]
