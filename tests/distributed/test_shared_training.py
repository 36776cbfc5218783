"""Training on sequences that ranks share is training on one rank: through Composer, FSDP, real shards and real media.

Also from a checkpoint that another number of ranks left.  Dropout is on: its masks follow from the place of a token in
its pack.  Takes about 40 s on two cores.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from molmo2core.testing.context_ranks import (
    STEPS,
    STOPPED_AFTER,
    Trained,
    fail_on_one_rank,
    packs_of,
    stop_on_two_ranks,
    train_on_four_ranks,
    train_shared,
)
from molmo2core.testing.distributed import run_distributed
from molmo2core.testing.loading import GLOBAL_BATCH, write_loading_data
from molmo2core.testing.shared_sequence import eight_heads
from molmo2core.testing.tiny_model import random_model
from molmo2core.training.config import GroupSchedule, OptimizerConfig

RATE = GroupSchedule(learning_rate=1e-2, warmup_steps=1)
# A large epsilon makes AdamW nearly linear in the gradient, so that a wrong scale of gradients shows in the weights.
LINEAR = OptimizerConfig(vision_encoder=RATE, connector=RATE, decoder=RATE, eps=1.0, clip_norm=0.5)
WAYS = ("four share", "two and two share", "four go on", "one goes on")
LARGEST_DIFFERENCE = 3e-7
"""Of any weight, which move by up to 7e-4.  Measured: 1.2e-7, the last bit of weights near 1."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Trained]]:
    """(folder, {way: weights and metrics})"""
    folder, data = tmp_path_factory.mktemp("out"), tmp_path_factory.mktemp("data")
    write_loading_data(data)
    results = {"alone": train_shared(data, folder / "alone", LINEAR, ranks=1, context_parallel=1)}
    assert "asked to stop after step 2" in run_distributed(stop_on_two_ranks, 2, data, folder / "stopped", LINEAR)[0]
    shutil.copytree(folder / "stopped", folder / "one")
    results["one goes on"] = train_shared(data, folder / "one", LINEAR, ranks=1, context_parallel=1)
    on_four = run_distributed(train_on_four_ranks, 4, data, folder, folder / "stopped", LINEAR, timeout_seconds=300)
    return folder, results | on_four[0]


@pytest.mark.parametrize("way", WAYS)
def test_weights_are_those_of_one_rank(trained: tuple[Path, dict[str, Trained]], way: str) -> None:
    """Would catch a factor of the number of ranks in a gradient, a part of the model that only one rank trains, dropout
    that is drawn per rank, and an optimizer state that does not survive another number of ranks."""
    expected, found = (trained[1][name][0] for name in ("alone", way))
    assert expected is not None and found is not None and found.keys() == expected.keys()
    before = random_model(eight_heads(2), seed=1).state_dict()
    assert max(float((expected[name] - before[name]).abs().max()) for name in expected) > 5e-4
    worst = max((float((found[name] - expected[name]).abs().max()), name) for name in expected)
    print(way, worst)
    assert worst[0] <= LARGEST_DIFFERENCE, worst


@pytest.mark.parametrize("way", WAYS)
def test_losses_are_those_of_one_rank(trained: tuple[Path, dict[str, Trained]], way: str) -> None:
    """Step by step, what is counted with them too: would catch tokens counted by every rank of a group."""
    expected, found = (trained[1][name][1] for name in ("alone", way))
    assert [line["step"] for line in found] == list(range(1, STEPS + 1))
    for line, wanted in zip(found, expected, strict=True):
        assert line["loss"] == pytest.approx(wanted["loss"], rel=1e-5)
        assert line["gradient_norm"] == pytest.approx(wanted["gradient_norm"], rel=1e-3)
        for name in ("packs", "examples", "tokens", "crops"):
            assert line[name] == wanted[name], name


def test_the_next_batch_is_the_same_on_any_number_of_ranks(trained: tuple[Path, dict[str, Trained]]) -> None:
    """The official trainer cannot save with packing while sequences are shared (training_and_evaluation.md 3.7)."""
    folder = trained[0]
    steps = [(step, list(range((step - 1) * GLOBAL_BATCH, step * GLOBAL_BATCH))) for step in range(1, STEPS + 1)]
    assert packs_of(folder / "alone", 0, 0) == steps
    for name, ranks in (("stopped", 2), ("one", 1), ("resumed", 4)):
        for rank in range(ranks):
            noted = packs_of(folder / name, 0, rank)
            assert noted[-1] == steps[STOPPED_AFTER - 1 if name == "stopped" else STEPS - 1]
            assert set(map(str, noted)) <= set(map(str, steps))
    assert packs_of(folder / "one", 0, 0) == steps, "noted by rank 0 before the stop and after"
    assert [step for step, _ in packs_of(folder / "resumed", 0, 3)] == [3, 4]


def test_an_unexpected_error_of_one_rank_ends_training(tmp_path: Path) -> None:
    """Composer's Trainer.close waits for all ranks: the one with the error would, while the others wait for its pack,
    and the launcher, which ends all when one fails, would hear of nothing for half an hour."""
    write_loading_data(tmp_path)
    with pytest.raises(ValueError, match="pack 5 on rank 1"):
        run_distributed(fail_on_one_rank, 2, tmp_path, tmp_path / "out", LINEAR, timeout_seconds=60)
