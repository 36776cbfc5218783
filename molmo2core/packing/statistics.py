"""How full a plan's packs are and what was drawn for them, counted window by window."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from molmo2core.packing.entries import Ints
from molmo2core.packing.plan import PlannedPacks

QUANTILES = {"p5": 0.05, "p50": 0.5, "p95": 0.95}


class PlanTally:
    """Counts of packs by what they hold: exact quantiles of any number of packs in little memory."""

    def __init__(self) -> None:
        self.counts: dict[str, Ints] = {
            name: np.zeros(1, np.int64) for name in ("tokens", "crops", "examples", "branches")
        }
        """Quantity -> [largest + 1] packs that hold 0, 1, 2, ... of it.  Tokens and crops are upper bounds."""
        self.draws: Counter[str] = Counter()
        self._first: PlannedPacks | None = None

    def add(self, piece: PlannedPacks) -> None:
        """Count one window."""
        self._first = self._first or piece
        self.draws.update(piece.draws)
        plan = piece.plan
        branches = plan.entries["stop_branch"].astype(np.int64) - plan.entries["first_branch"]
        before = np.concatenate([[0], np.cumsum(branches)])
        for name, values in (
            ("tokens", piece.tokens),
            ("crops", piece.crops),
            ("examples", np.diff(plan.pack_offsets)),
            ("branches", np.diff(before[plan.pack_offsets])),
        ):
            self.counts[name] = _sum(self.counts[name], np.bincount(values))

    def statistics(self, proportions: Mapping[str, float]) -> dict[str, Any]:
        """Numbers for people, as they stand in `plan.json`.

        `bound_reached` is the least number of packs that the totals of tokens and crops allow, over the packs made.

        Args:
            proportions: wanted share of draws of each dataset.
        """
        if self._first is None:
            raise ValueError("no window was counted")
        packing, num_samples = self._first.plan.packing, self._first.num_samples
        budgets = {"tokens": packing.sequence_tokens, "crops": max(packing.crop_budget, 1)}
        totals = {name: int(counts @ np.arange(len(counts))) for name, counts in self.counts.items()}
        made = int(self.counts["tokens"].sum())
        packs, draws = max(made, 1), max(self.draws.total(), 1)
        least = max(math.ceil(totals[name] / budget) for name, budget in budgets.items())
        return {
            "packs": made,
            "examples": totals["examples"],
            "examples_per_pack": totals["examples"] / packs,
            "branches_per_pack": totals["branches"] / packs,
            "token_fill": totals["tokens"] / (packs * budgets["tokens"]),
            "crop_fill": totals["crops"] / (packs * budgets["crops"]),
            "bound_reached": least / packs,
            "per_pack": {
                name: {"mean": totals[name] / packs} | {q: _quantile(counts, at) for q, at in QUANTILES.items()}
                for name, counts in self.counts.items()
            },
            "draws": {
                name: {
                    "draws": count,
                    "share": count / draws,
                    "wanted": proportions[name],
                    "samples": num_samples.get(name, 0),
                    "epochs": count / max(num_samples.get(name, 0), 1),
                }
                for name, count in self.draws.items()
            },
            "num_left_out": len(self._first.left_out),
            "left_out": dict(Counter(item.dataset for item in self._first.left_out)),
        }


def _sum(first: Ints, second: Ints) -> Ints:
    total = np.zeros(max(len(first), len(second)), np.int64)
    total[: len(first)] += first
    total[: len(second)] += second
    return total


def _quantile(counts: Ints, at: float) -> int:
    """The smallest value that at least a share `at` of the packs does not exceed."""
    return int(np.searchsorted(np.cumsum(counts), at * counts.sum()))
