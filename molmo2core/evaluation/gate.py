"""The gate: may this model become champion?  Pure; every refusal says why in plain words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from molmo2core.evaluation.config import GateRule


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the gate decided."""

    reasons: tuple[str, ...]
    """Why it refused; empty when it passed."""

    @property
    def passed(self) -> bool:
        """Whether no reason speaks against it."""
        return not self.reasons


def judge(
    rules: Sequence[GateRule], metrics: Mapping[str, float], blind_metrics: Mapping[str, float], steps: Sequence[int]
) -> Verdict:
    """Check every rule.

    Args:
        rules: at least one; a gate without rules would pass anything, so it passes nothing.
        metrics: of the model.
        blind_metrics: of the same model with its images blanked.
        steps: training steps of each stage behind the model.
    """
    if sum(steps) == 0:
        return Verdict(reasons=("trained 0 steps: nothing was learnt",))
    if not rules:
        return Verdict(reasons=("the gate has no rules: nothing was checked",))
    found = (_refusal(rule, metrics, blind_metrics) for rule in rules)
    return Verdict(reasons=tuple(reason for reason in found if reason))


def _refusal(rule: GateRule, metrics: Mapping[str, float], blind_metrics: Mapping[str, float]) -> str:
    value = metrics.get(rule.metric)
    if value is None:
        return f"{rule.metric} was not measured: no evaluated example yields it"
    if not math.isfinite(value):
        return f"{rule.metric} is {value}, not a number"
    if value < rule.minimum:
        return f"{rule.metric} is {value:.3f}, below the minimum {rule.minimum:.3f}"
    if rule.margin_over_blind is None:
        return ""
    blind = blind_metrics.get(rule.metric)
    if blind is None:
        return f"{rule.metric} was not measured with blanked images"
    if not math.isfinite(blind):
        return f"{rule.metric} with blanked images is {blind}, not a number"
    if value - blind < rule.margin_over_blind:
        return (
            f"{rule.metric} is {value:.3f}, only {value - blind:+.3f} over the {blind:.3f} with blanked images; "
            f"{rule.margin_over_blind:+.3f} is demanded"
        )
    return ""
