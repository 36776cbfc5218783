"""Streams and rates of one training stage."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class MixtureGroup:
    """Datasets that share one rate; within the group each is drawn in proportion to the root of its size."""

    rate: float
    """Share of all draws, relative to the other groups' rates."""
    datasets: tuple[str, ...]
