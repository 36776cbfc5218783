"""Which loss weight a target token gets (DECISIONS D4; data.md 4)."""

from __future__ import annotations

from typing import Literal

Weighting = Literal["none", "described", "released_code"]
"""`none`: 1 per target (stage 1).  `described` and `released_code`: the two tables of DECISIONS D4."""
