"""Two gloo ranks train as one process does, share sequences, stop together and go on together."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from molmo2core.testing import training_ranks as ranks
from molmo2core.testing.distributed import run_distributed
from molmo2core.testing.tiny_model import tiny_model
from molmo2core.testing.training import training_config
from molmo2core.training.config import GroupSchedule, OptimizerConfig

RATE = GroupSchedule(learning_rate=1e-2, warmup_steps=1)
# A large epsilon makes AdamW nearly linear in the gradient, so that a wrong scale of gradients shows in the weights.
LINEAR = OptimizerConfig(vision_encoder=RATE, connector=RATE, decoder=RATE, eps=1.0, clip_norm=0.5)
CHANGES: dict[str, Any] = {"steps": 3, "optimizer": LINEAR}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    worst = max(((found[name] - expected[name]).abs().max().item(), name) for name in expected)
    assert worst[0] <= tolerance, worst


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, list[dict[str, Any]]]:
    """(one process, [rank 0 and 1 of two in every way])"""
    folder = tmp_path_factory.mktemp("ranks")
    alone = ranks.train_tiny(folder / "alone", training_config(**CHANGES))
    return alone, run_distributed(ranks.train_in_every_way, 2, folder, CHANGES, timeout_seconds=300)


@pytest.mark.parametrize("way", ["fsdp", "context_parallel"])
def test_two_ranks_train_as_one_process(trained: Any, way: str) -> None:
    """Would catch losses averaged per rank instead of per weight, gradients times the ranks, tokens counted twice,
    targets lost at the border of two ranks, and a pack without images that stops the other rank.

    Tolerances: float32 sums in another order; measured 3e-8 on weights that move by 3e-4, and
    1e-6 relative on norms.
    """
    (weights, metrics), results = trained
    found, lines = results[0][way]
    assert results[1][way][0] is None
    moved = max((weights[name] - value).abs().max().item() for name, value in tiny_model().state_dict().items())
    assert moved > 1e-4  # far above the tolerance: an untrained model would not pass
    assert_equal(found, weights, 3e-7)
    for line, expected in zip(lines, metrics, strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert line["z"] == pytest.approx(expected["z"], rel=1e-4)
        assert line["gradient_norm"] == pytest.approx(expected["gradient_norm"], rel=1e-4)
        for name in ("step", "packs", "examples", "tokens", "learning_rate"):
            assert line[name] == expected[name], name


def test_torch_2_7_sums_gradients_on_gloo(trained: Any) -> None:
    """The fault behind `average_gradients_on_gloo`: the day this fails, the guard can go."""
    (_, metrics), results = trained
    if not torch.__version__.startswith("2.7."):
        pytest.skip("a fault of torch 2.7")
    norms = results[0]["unguarded"][1][0]["gradient_norm"]
    assert norms == pytest.approx({name: 2 * norm for name, norm in metrics[0]["gradient_norm"].items()}, rel=1e-4)


def test_composer_ignores_a_parallelism_dict(trained: Any) -> None:
    """The fault behind `check_fsdp2`: a dict gives DDP without a word."""
    _, results = trained
    assert all("not sharded with FSDP2" in result["dict_config"] for result in results)


def test_a_signal_on_one_rank_stops_both_with_a_checkpoint(trained: Any) -> None:
    """Would catch a rank that stops alone and leaves the other in a collective, or a stop without a checkpoint."""
    _, results = trained
    assert all("asked to stop after step 2 of 4" in result["stopped"] for result in results)
    assert "ba2" in results[0]["saved"]


def test_a_resumed_run_is_bit_identical(trained: Any) -> None:
    """With dropout and sharded checkpoints.  Would catch a random state, an optimizer state or a data position that is
    not restored on each rank."""
    _, results = trained
    weights, metrics = results[0]["undisturbed"]
    resumed, lines = results[0]["resumed"]
    assert len(lines) == 4
    for name in ("step", "loss", "packs", "tokens"):
        assert [line[name] for line in lines] == [line[name] for line in metrics], name
    assert_equal(resumed, weights, 0.0)


def test_not_a_number_on_one_rank_stops_both_without_a_checkpoint(trained: Any) -> None:
    """Composer's monitor raises on one rank and leaves the other waiting until its timeout."""
    _, results = trained
    for result in results:
        assert "RecipeError" in result["nan"] and "nan" in result["nan"]
        assert result["nan_saved"] == []


def test_all_ranks_refuse_a_step_together_and_name_the_examples_of_the_rank_that_has_them(trained: Any) -> None:
    """Would catch an error that names rank 0's packs, since its gradient is as bad as rank 1's."""
    _, results = trained
    named = "loss nan on rank 1, pack 6, 7: images/tree-6, texts/text-6, images/tree-7, texts/text-7"
    for result in results:
        assert named in result["bad_pack"] and "training step 2" in result["bad_pack"]
        assert [part["rank"] for part in result["refused"]["microbatches"]] == [0, 1]
        assert [part["rank"] for part in result["refused"]["suspects"]] == [1]


def test_metrics_of_all_ranks_are_those_of_one(trained: Any) -> None:
    """Losses by task, operations, fill and counts under FSDP and in shared sequences, against a single process.  Would
    catch rank 0's own numbers, means of means, packs that both sharers count, and targets that none does.

    Tolerance: float32 losses that sum in another order.
    """
    (_, metrics), results = trained
    for way in ("fsdp", "context_parallel"):
        for line, expected in zip(results[0][way][1], metrics, strict=True):
            assert line["loss_by_task"] == pytest.approx(expected["loss_by_task"], rel=1e-5), way
            for name in ("flops", "fill", "drawn", "packs", "tokens", "examples", "crops", "replaced", "spikes"):
                assert line[name] == expected[name], (way, name)
