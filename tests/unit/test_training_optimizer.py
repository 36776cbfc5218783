"""Learning rates and clipping of each group and step."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from composer.core import Event

from molmo2core.model.molmo2 import group_of_parameter
from molmo2core.testing.tiny_model import tiny_model
from molmo2core.training.callbacks.group_clipping import GroupClipping
from molmo2core.training.callbacks.group_learning_rates import GroupLearningRates
from molmo2core.training.config import GroupSchedule, OptimizerConfig
from molmo2core.training.optimizer import build_optimizer, learning_rate

SFT = {"steps": 30_000, "final_fraction": 0.1}
DECODER = GroupSchedule(learning_rate=1e-5, warmup_steps=200)


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (1, 5e-8),  # training_and_evaluation.md 8.5: not 0, which Composer's schedulers would use twice
        (100, 5e-6),
        (200, 1e-5),
        (15_100, 5.5e-6),  # half of the cosine, which starts at the end of this group's warm-up
        (30_000, 1e-6),
    ],
)
def test_table_of_the_released_recipe(step: int, expected: float) -> None:
    assert learning_rate(DECODER, step=step, **SFT) == pytest.approx(expected, rel=1e-9)


def test_each_group_has_its_own_warm_up() -> None:
    """Pre-training warms the connector up in 200 steps and the rest in 2000."""
    connector = GroupSchedule(learning_rate=2e-4, warmup_steps=200)
    vision = GroupSchedule(learning_rate=6e-6, warmup_steps=2000)
    assert learning_rate(connector, step=200, steps=32_000, final_fraction=0.1) == 2e-4
    assert learning_rate(vision, step=200, steps=32_000, final_fraction=0.1) == pytest.approx(6e-7)


@pytest.mark.parametrize("warmup", [0, 3, 5])
def test_a_run_shorter_than_its_warm_up_has_finite_rates(warmup: int) -> None:
    schedule = GroupSchedule(learning_rate=1.0, warmup_steps=warmup)
    rates = [learning_rate(schedule, step=step, steps=3, final_fraction=0.1) for step in (1, 2, 3)]
    assert all(0 < rate <= 1 for rate in rates)


def test_every_parameter_is_in_one_group() -> None:
    """New tokens learn with the connector, not with the decoder."""
    model = tiny_model()
    optimizer = build_optimizer(model, OptimizerConfig(vision_encoder=DECODER, connector=DECODER, decoder=DECODER))
    groups = {group["name"]: {id(p) for p in group["params"]} for group in optimizer.param_groups}
    assert sum(len(ids) for ids in groups.values()) == len(list(model.parameters()))
    assert set.union(*groups.values()) == {id(p) for p in model.parameters()}
    assert id(model.decoder.embedding.new) in groups["connector"]
    assert id(model.decoder.embedding.base) in groups["decoder"]


def state_of(optimizer: torch.optim.Optimizer, batches_done: int = 0) -> Any:
    """As much of Composer's state as the two callbacks look at."""
    timestamp = SimpleNamespace(batch=SimpleNamespace(value=batches_done))
    return SimpleNamespace(optimizers=[optimizer], timestamp=timestamp)


@pytest.mark.parametrize(
    ("batches_done", "expected"),
    [(0, (2.5e-8, 2.5e-8, 5e-8)), (199, (5e-6, 5e-6, 1e-5)), (29_999, (5e-7, 5e-7, 1e-6))],
)
def test_rates_of_the_second_stage(batches_done: int, expected: tuple[float, ...]) -> None:
    """training_and_evaluation.md 8.5, set for the update that follows.  Would catch a step counted from 0, and a group
    that gets another's rate."""
    slow = GroupSchedule(learning_rate=5e-6, warmup_steps=200)
    config = OptimizerConfig(vision_encoder=slow, connector=slow, decoder=DECODER)
    optimizer = build_optimizer(tiny_model(), config)
    GroupLearningRates(config, steps=30_000).batch_start(state_of(optimizer, batches_done), None)
    assert [group["name"] for group in optimizer.param_groups] == ["vision_encoder", "connector", "decoder"]
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(expected, rel=1e-12)


def with_gradients(seed: int, sizes: dict[str, float]) -> torch.optim.Optimizer:
    """Groups of three parameters of different shapes, whose gradients are about so large; the last has none."""
    generator = torch.Generator().manual_seed(seed)
    groups = []
    for name, size in sizes.items():
        parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((3, 4), (5,), (2, 2))]
        for parameter in parameters[:2]:
            parameter.grad = size * torch.randn(parameter.shape, generator=generator)
        groups.append({"params": parameters, "name": name})
    return torch.optim.AdamW(groups)


def test_each_group_is_clipped_by_its_own_norm() -> None:
    """As torch.nn.utils.clip_grad_norm_ on each group alone: one is large, one is within the bound and stays."""
    ours, plain = (with_gradients(0, {"large": 30.0, "small": 0.01}) for _ in range(2))
    clipping = GroupClipping(1.0)
    clipping.apply(Event.AFTER_TRAIN_BATCH, state_of(ours), None)
    for group in plain.param_groups:
        norm = torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
        assert clipping.norms[group["name"]] == float(norm)
    for group, expected in zip(ours.param_groups, plain.param_groups, strict=True):
        for parameter, other in zip(group["params"], expected["params"], strict=True):
            assert (parameter.grad is None and other.grad is None) or parameter.grad.equal(other.grad)
    small = with_gradients(0, {"large": 30.0, "small": 0.01}).param_groups[1]["params"][0].grad
    assert ours.param_groups[1]["params"][0].grad.equal(small)


def test_a_group_without_gradients_has_no_norm() -> None:
    """Frozen after a step in which it had one: the old norm must not stand in the metrics again."""
    optimizer = with_gradients(0, {"trained": 1.0, "frozen": 1.0})
    clipping = GroupClipping(1.0)
    clipping.apply(Event.AFTER_TRAIN_BATCH, state_of(optimizer), None)
    assert set(clipping.norms) == {"trained", "frozen"}
    for parameter in optimizer.param_groups[1]["params"]:
        parameter.grad = None
    clipping.apply(Event.AFTER_TRAIN_BATCH, state_of(optimizer), None)
    assert set(clipping.norms) == {"trained"}


@pytest.mark.parametrize("frozen", ["vision_encoder", "connector", "decoder"])
def test_a_frozen_group_is_no_group(frozen: str) -> None:
    """Clipping and rates go on with the others.  (On Composer: tests/distributed/test_trained_parts_ranks.py.)"""
    model = tiny_model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(group_of_parameter(name) != frozen)
    config = OptimizerConfig(vision_encoder=DECODER, connector=DECODER, decoder=DECODER)
    optimizer = build_optimizer(model, config)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    clipping = GroupClipping(1.0)
    clipping.apply(Event.AFTER_TRAIN_BATCH, state_of(optimizer), None)
    GroupLearningRates(config, steps=10).batch_start(state_of(optimizer), None)
    assert set(clipping.norms) == {"vision_encoder", "connector", "decoder"} - {frozen}
    assert all(group["lr"] > 0 for group in optimizer.param_groups)
