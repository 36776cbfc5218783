"""What is evaluated, and what the gate demands."""

from __future__ import annotations

from dataclasses import dataclass, field

from molmo2core.examples import Split
from molmo2core.preprocessing.config import PreprocessingConfig


@dataclass(frozen=True, kw_only=True)
class GateRule:
    """One demand on one metric.  A missing or non-finite metric fails the rule."""

    metric: str
    """`<task>/<measure>`, e.g. `image_pointing/f1`, or `image_qa.colour/accuracy` for one category."""
    minimum: float = 0.0
    margin_over_blind: float | None = None
    """How far the metric must exceed the same model's with its images blanked."""


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Greedy generation on a held-out split, beside the blind baseline."""

    split: Split = "test"
    max_examples_per_dataset: int = 64
    batch_size: int = 16
    max_new_tokens: int = 192
    preprocessing: PreprocessingConfig = field(
        default_factory=lambda: PreprocessingConfig(max_crops=24, max_images=20, max_frames=384)
    )
    gate: tuple[GateRule, ...]
    drawn_examples: int = 24
    """Examples drawn in the HTML report."""
