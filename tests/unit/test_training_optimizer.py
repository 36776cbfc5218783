"""Learning rates of each group and step."""

from __future__ import annotations

import pytest

from molmo2core.testing.tiny_model import tiny_model
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
