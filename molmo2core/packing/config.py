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
    window: int = 32_768
    """Draws that are packed together and whose packs are shuffled.

    Larger windows fill better and are planned faster: of the lengths of stage 2, 2,048 draws at a time reach 99.6 % of
    the bound at 1.4 us a draw, 32,768 reach 99.8 % at 0.6 us (benchmarks/packing.py).  The price is locality: the packs
    of one window touch the shards of so many draws, besides those that a shuffle block spreads over anyway
    (packing.draws.SHUFFLE_BLOCK, 65,536)."""
