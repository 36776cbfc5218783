"""Where runs are tracked and models registered."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """MLflow."""

    uri: str = ""
    """Tracking server; empty: `MLFLOW_TRACKING_URI` if set, else sqlite in `<workspace>/mlflow`."""
    experiment: str = "molmo2"
    model_name: str = "molmo2"
    """Registered model that versions are added to."""
