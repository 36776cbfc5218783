"""What every stage hands back for people: time, reuse, numbers, a summary."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class StageReport:
    """Result of one stage's run."""

    stage: str
    """`validate_data`, `build_shards.<dataset>`, `plan_packs.<stage>`, `train.<stage>`, ..."""
    seconds: float
    reused: bool
    """Whether a committed output of the same content was found and nothing was computed."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Scalars for dsl.Metrics and the closing table."""
    lines: tuple[str, ...] = ()
    """Things a person should read (paths, counts), one per line."""

    def to_json(self) -> dict[str, Any]:
        """As a JSON object (Reference.report)."""
        return dataclasses.asdict(self)

    def finite_metrics(self) -> dict[str, float]:
        """The metrics that JSON, and so dsl.Metrics, can carry."""
        return {name: value for name, value in self.metrics.items() if math.isfinite(value)}
