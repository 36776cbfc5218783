"""Frozen parts and adapters under FSDP2: two gloo ranks train as one process does, and go on together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader

from molmo2core.testing.distributed import run_distributed
from molmo2core.testing.tiny_model import tiny_model
from molmo2core.testing.trained_parts_ranks import WAYS, train_every_way
from molmo2core.training.trainable import part_of_parameter


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any], Path]:
    """(one process, rank 0 of two, the folder of the two)"""
    folder = tmp_path_factory.mktemp("parts")
    alone = train_every_way(folder / "alone", 1)
    return alone, run_distributed(train_every_way, 2, folder / "two", 2, timeout_seconds=300)[0], folder / "two"


def moved(weights: dict[str, torch.Tensor]) -> dict[str, float]:
    return {name: (weights[name] - value).abs().max().item() for name, value in tiny_model().state_dict().items()}


@pytest.mark.parametrize("way", WAYS)
def test_two_ranks_train_as_one_process(trained: Any, way: str) -> None:
    """Would catch gradients that are not reduced because their unit is partly frozen, frozen parameters that move, and
    adapters that are merged from one rank's share or drawn on one rank alone.

    Tolerance: float32 sums in another order; measured 3e-8 to 1.2e-7 on weights that move by 3e-4 to 3e-3.
    """
    (weights, lines), (found, found_lines) = (results[way] for results in trained[:2])
    assert found.keys() == weights.keys() == tiny_model().state_dict().keys()
    worst = max(((found[name] - weights[name]).abs().max().item(), name) for name in weights)
    assert worst[0] <= 3e-7, worst
    assert max(moved(found).values()) > 1e-4
    for line, expected in zip(found_lines, lines, strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert line["gradient_norm"] == pytest.approx(expected["gradient_norm"], rel=1e-4)


@pytest.mark.parametrize("way", WAYS)
def test_exactly_what_is_trained_moves(trained: Any, way: str) -> None:
    """Adapted matrices move by their adapters alone, biases and norms beside them not at all."""
    for results in trained[:2]:
        for name, distance in moved(results[way][0]).items():
            part = part_of_parameter(name)
            adapted = way == "low_rank" and part in ("decoder", "vision_encoder") and name.endswith(".weight")
            adapted = adapted and "norm" not in name and "patch_embedding" not in name
            if not (adapted or getattr(WAYS[way]["trainable"], part)):
                assert distance == 0, name
            elif not name.endswith("key.bias"):  # adds the same to all scores of a query: its gradient is 0
                assert distance > 0, name


def test_adapters_go_on_bit_for_bit(trained: Any) -> None:
    """After a stop, from a file and from shards.  Would catch adapters or their optimizer state that are not saved."""
    for results in trained[:2]:
        assert "asked to stop after step 2 of 4" in results["stopped"]
        (weights, lines), (resumed, resumed_lines) = results["low_rank"], results["resumed"]
        assert [line["loss"] for line in resumed_lines] == [line["loss"] for line in lines]
        assert all(torch.equal(resumed[name], value) for name, value in weights.items())


def test_another_scale_is_not_gone_on_with(trained: Any) -> None:
    """A and B have the same shapes whatever `alpha` is: the model would change from one step to the next."""
    for results in trained[:2]:
        assert results["other_scale"].startswith("RecipeError: training.resume_from")
        assert '"alpha": 8.0' in results["other_scale"] and '"alpha": 4.0' in results["other_scale"]


@pytest.mark.parametrize("way", WAYS)
def test_checkpoints_hold_optimizer_state_of_trained_parameters_only(trained: Any, way: str) -> None:
    """AdamW's two moments are twice the model: those of frozen parameters must not be saved."""
    saved = trained[2] / way / "ba4" / "shards"
    names = FileSystemReader(saved).read_metadata().state_dict_metadata
    with_state = {name.split(".exp_avg")[0].split(".model.")[-1] for name in names if name.endswith(".exp_avg")}
    parts = {part_of_parameter(name) for name in with_state if "low_rank" not in name}
    assert parts == {part for part in vars(WAYS[way]["trainable"]) if getattr(WAYS[way]["trainable"], part)}
    adapters = {name for name in names if "low_rank" in name and "optim" not in name}
    assert bool(adapters) == (way == "low_rank") == any("low_rank" in name for name in with_state)
