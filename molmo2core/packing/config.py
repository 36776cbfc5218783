"""The two budgets of a packed sequence."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class PackingConfig:
    """Packing under two budgets (data.md 3; DECISIONS D2)."""

    sequence_tokens: int
    """Tokens of a packed sequence at most."""
    crop_budget: int
    """Crops and frames of a packed sequence at most."""
    window: int = 2048
    """Draws that are packed together; larger fills better and reads more shards at a time."""
