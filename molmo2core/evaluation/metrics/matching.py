"""One-to-one matching of predicted and true positions, and the three numbers that follow from it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import linear_sum_assignment

TIME_TOLERANCE_SECONDS = 0.25
"""Half the spacing of frames at 2 per second: a time may be off by rounding, never by a whole frame."""

_ROUNDING = 1e-6  # pixels; far below the resolution of written points, far above that of floats
_NEVER = 1e9  # pixels; so the assignment first makes as many allowed pairs as it can, then the shortest ones


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How well a set of predictions agrees with the truth."""

    precision: float
    recall: float
    f1: float


def count_hits(
    distances: npt.NDArray[np.float64], radii: npt.NDArray[np.float64], allowed: npt.NDArray[np.bool_]
) -> int:
    """Hits after the matching of least total distance (training_and_evaluation.md 4.4).

    As in the published evaluation the matching is found first and each pair tested afterwards.

    Args:
        distances: [N, M] pixels from each prediction to each true position.
        radii: [M] pixels; within it a matched prediction is a hit.
        allowed: [N, M] pairs that may match at all (same image, same time).
    """
    rows, columns = linear_sum_assignment(np.where(allowed, distances, _NEVER))
    hits = allowed & within(distances, radii)
    return int(hits[rows, columns].sum())


def within(distances: npt.NDArray[np.float64], radii: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
    """[N, M] whether each prediction lies in the disc of each true position [M], its edge included."""
    return distances <= radii + _ROUNDING


def agreement(num_hits: int, num_predicted: int, num_true: int) -> Agreement:
    """Precision, recall and F1.  Nothing true: all 1 if nothing is predicted, else all 0."""
    if num_true == 0:
        score = float(num_predicted == 0)
        return Agreement(precision=score, recall=score, f1=score)
    if num_hits == 0:
        return Agreement(precision=0.0, recall=0.0, f1=0.0)
    precision, recall = num_hits / num_predicted, num_hits / num_true
    return Agreement(precision=precision, recall=recall, f1=2 * precision * recall / (precision + recall))
