"""The gate passes only what was measured, learnt and beats the blind baseline."""

from __future__ import annotations

from math import inf, nan

import pytest

from molmo2core.evaluation.config import GateRule
from molmo2core.evaluation.gate import judge

RULES = (
    GateRule(metric="image_qa.colour/accuracy", minimum=0.5, margin_over_blind=0.2),
    GateRule(metric="image_pointing/f1", minimum=0.3),
)
GOOD = {"image_qa.colour/accuracy": 0.8, "image_pointing/f1": 0.4}
BLIND = {"image_qa.colour/accuracy": 0.3, "image_pointing/f1": 0.1}


def test_a_good_model_passes() -> None:
    verdict = judge(RULES, GOOD, BLIND, [10, 5])
    assert verdict.passed
    assert verdict.reasons == ()


def test_limits_belong_to_the_passing_side() -> None:
    assert judge((GateRule(metric="a/b", minimum=0.5, margin_over_blind=0.5),), {"a/b": 0.5}, {"a/b": 0.0}, [1]).passed


@pytest.mark.parametrize("steps", [[], [0], [0, 0, 0]])
def test_an_untrained_model_is_refused_for_that_reason(steps: list[int]) -> None:
    """Even with metrics that would pass: they cannot be right."""
    assert judge(RULES, GOOD, BLIND, steps).reasons == ("trained 0 steps: nothing was learnt",)


def test_a_gate_without_rules_passes_nothing() -> None:
    assert judge((), GOOD, BLIND, [10]).reasons == ("the gate has no rules: nothing was checked",)


@pytest.mark.parametrize(
    ("metrics", "blind", "words"),
    [
        ({"image_pointing/f1": 0.4}, BLIND, "image_qa.colour/accuracy was not measured"),
        (GOOD | {"image_pointing/f1": nan}, BLIND, "image_pointing/f1 is nan"),
        (GOOD | {"image_pointing/f1": inf}, BLIND, "image_pointing/f1 is inf"),
        (GOOD | {"image_pointing/f1": 0.29}, BLIND, "0.290, below the minimum 0.300"),
        (GOOD, BLIND | {"image_qa.colour/accuracy": 0.7}, "only +0.100 over the 0.700 with blanked images"),
        (GOOD, {}, "was not measured with blanked images"),
        (GOOD, {"image_qa.colour/accuracy": nan}, "with blanked images is nan"),
    ],
)
def test_each_refusal_says_why(metrics: dict[str, float], blind: dict[str, float], words: str) -> None:
    """Would catch comparisons that NaN slips through: `nan < minimum` is false."""
    (reason,) = judge(RULES, metrics, blind, [10]).reasons
    assert words in reason


def test_all_reasons_are_given() -> None:
    assert len(judge(RULES, {}, {}, [10]).reasons) == 2
