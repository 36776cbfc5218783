"""Pointing on images, image sets and videos (training_and_evaluation.md 4.4, with discs in place of masks)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from molmo2core.annotations import Point
from molmo2core.evaluation.metrics.matching import TIME_TOLERANCE_SECONDS, Agreement, agreement, count_hits


def score_points(predicted: Sequence[Point], truth: Sequence[Point], sizes: Sequence[tuple[int, int]]) -> Agreement:
    """Precision, recall and F1 of the points of one answer.

    A pair can match only on the same image and, in a video, within `TIME_TOLERANCE_SECONDS`.  A matched prediction
    hits when it lies within the true point's radius, a fraction of the shorter side of that image or frame.

    Args:
        predicted: any points, also on images that do not exist.
        truth: the annotation's points.
        sizes: displayed (width, height) in pixels of each image, or of the video's frames.
    """
    if not predicted or not truth:
        return agreement(0, len(predicted), len(truth))
    scale = np.array([sizes[point.image - 1] for point in truth], dtype=np.float64)  # [M, 2]
    offsets = _fractions(predicted)[:, None] - _fractions(truth)[None]
    distances = np.linalg.norm(offsets * scale, axis=-1)  # [N, M]; other images are not allowed to match
    radii = np.array([point.radius for point in truth]) * scale.min(axis=1)
    allowed = np.array([[_may_match(guess, point) for point in truth] for guess in predicted])
    return agreement(count_hits(distances, radii, allowed), len(predicted), len(truth))


def _fractions(points: Sequence[Point]) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    return np.array([(point.x, point.y) for point in points], dtype=np.float64)


def _may_match(guess: Point, point: Point) -> bool:
    if guess.image != point.image:
        return False
    if point.time is None or guess.time is None:
        return point.time is None and guess.time is None
    return abs(guess.time - point.time) <= TIME_TOLERANCE_SECONDS + 1e-9
