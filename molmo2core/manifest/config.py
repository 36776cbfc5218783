"""Which data a recipe trains on, and how much of it may be bad."""

from __future__ import annotations

from dataclasses import dataclass

from molmo2core.examples import Split
from molmo2core.sources.config import ShapesConfig


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Delivered manifests."""

    manifests: dict[str, str]
    """Dataset name -> JSONL file; relative to the workspace, absolute, or `s3://`."""
    shapes: ShapesConfig | None = None
    """Render the synthetic corpus into `<workspace>/corpus` first; the manifests then lie there."""
    max_quarantined_fraction: float = 0.05
    """More bad rows than this, in any dataset, fail the run."""
    required_splits: tuple[Split, ...] = ("train", "test")
    """Splits that must have at least one good row over all datasets; `train` also in each dataset."""
    allowed_licenses: tuple[str, ...] = ()
    """Licences that rows may carry; empty allows any."""
    forbidden_generators: tuple[str, ...] = ("gpt", "claude", "gemini")
    """A row whose `generator` contains one of these is refused: no distillation from closed models."""
