"""How much each target token counts in the loss (DECISIONS D4; data.md 4)."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

from molmo2core.annotations import WEIGHT_FAMILY_OF_TASK, WeightFamily
from molmo2core.message_tree.config import Weighting

_FIXED: dict[Weighting, dict[WeightFamily, float]] = {
    "none": {},
    "described": {"video_caption": 0.1, "image_caption": 0.2, "pointing": 0.2},
    "released_code": {"video_caption": 0.1, "pointing": 0.2},
}


def branch_weights(weighting: Weighting, tasks: Sequence[str], num_targets: Sequence[int]) -> list[float]:
    """Weight of each target token of each branch of one tree.

    `described`: 4 / sqrt(n) unless the family's weight is fixed.  `released_code`: 2 / sqrt(n * branches), where n
    counts the last EOS only if the tree has a single branch, as the published code does (data.md 4.1).

    Args:
        weighting: the named table.
        tasks: task of each branch.
        num_targets: n, targets of each branch, all EOS included.
    """
    fixed, num_branches = _FIXED[weighting], len(tasks)

    def weight(task: str, n: int) -> float:
        family = WEIGHT_FAMILY_OF_TASK[task]
        if weighting == "none":
            return 1.0
        if family in fixed:
            return fixed[family]
        if weighting == "described":
            return 4 / sqrt(n)
        return 2 / sqrt(num_branches * (n if num_branches == 1 else max(1, n - 1)))

    return [weight(task, n) for task, n in zip(tasks, num_targets, strict=True)]
