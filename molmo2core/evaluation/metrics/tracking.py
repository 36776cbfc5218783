"""Tracking: per-time F1 and HOTA with the similarity "within the radius" (training_and_evaluation.md 4.5).

The similarity is 0 or 1, so HOTA is the same at each of its thresholds and one is computed.  Objects are compared by
their ids, never by the order in which they are listed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import linear_sum_assignment

from molmo2core.annotations import Track
from molmo2core.evaluation.metrics.matching import TIME_TOLERANCE_SECONDS, agreement, count_hits, within

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class TrackingScores:
    """Scores of one video, each between 0 and 1."""

    precision: float
    """Mean over times, as recall and f1."""
    recall: float
    f1: float
    detection: float
    """DetA: hits over hits, misses and false alarms."""
    association: float
    """AssA: mean over hits of how much the two tracks overlap."""
    hota: float
    """Geometric mean of the two."""


@dataclass(frozen=True, kw_only=True)
class _Moment:
    """Predictions and truth at one time."""

    predicted_ids: Integers
    true_ids: Integers
    distances: Floats
    """[N, M] pixels."""
    radii: Floats
    """[M] pixels."""

    @property
    def similar(self) -> npt.NDArray[np.bool_]:
        """[N, M] whether a prediction is within a true object's radius."""
        return within(self.distances, self.radii)


def score_tracks(predicted: Sequence[Track], truth: Sequence[Track], size: tuple[int, int]) -> TrackingScores:
    """Scores of the tracks of one answer; positions that are not visible count as absent.

    Per time, over the union of predicted and true times: predictions and truth are matched by least total distance;
    precision, recall and F1 are averaged over times.  Nothing true and nothing predicted scores 1.

    Args:
        predicted: tracks of the answer.
        truth: tracks of the annotation.
        size: displayed (width, height) of the frames in pixels.
    """
    moments = _moments(predicted, truth, size)
    if not moments:
        return TrackingScores(precision=1.0, recall=1.0, f1=1.0, detection=1.0, association=1.0, hota=1.0)
    scores = []
    for moment in moments:
        hits = count_hits(moment.distances, moment.radii, np.ones_like(moment.similar))
        scores.append(agreement(hits, len(moment.predicted_ids), len(moment.true_ids)))
    detection, association = _detection_association(moments)
    return TrackingScores(
        precision=float(np.mean([score.precision for score in scores])),
        recall=float(np.mean([score.recall for score in scores])),
        f1=float(np.mean([score.f1 for score in scores])),
        detection=detection,
        association=association,
        hota=float(np.sqrt(detection * association)),
    )


def _moments(predicted: Sequence[Track], truth: Sequence[Track], size: tuple[int, int]) -> list[_Moment]:
    guesses, objects = _by_time(predicted), _by_time(truth)
    aligned = _align_times(sorted(guesses), sorted(objects))
    guesses = {aligned[time]: positions for time, positions in guesses.items()}
    radius = {track.object_id: track.radius * min(size) for track in truth}
    moments = []
    for time in sorted(guesses.keys() | objects.keys()):
        there, here = guesses.get(time, {}), objects.get(time, {})
        offsets = _fractions(there)[:, None] - _fractions(here)[None]
        moments.append(
            _Moment(
                predicted_ids=np.array(list(there), dtype=np.int64),
                true_ids=np.array(list(here), dtype=np.int64),
                distances=np.linalg.norm(offsets * np.array(size, dtype=np.float64), axis=-1),
                radii=np.array([radius[object_id] for object_id in here], dtype=np.float64),
            )
        )
    return moments


def _by_time(tracks: Sequence[Track]) -> dict[float, dict[int, tuple[float, float]]]:
    """Time -> object id -> position; a second position of an object at one time is ignored."""
    found: dict[float, dict[int, tuple[float, float]]] = {}
    for track in tracks:
        for position in track.positions:
            if position.visible:
                found.setdefault(position.time, {}).setdefault(track.object_id, (position.x, position.y))
    return found


def _align_times(predicted: Sequence[float], true: Sequence[float]) -> dict[float, float]:
    """Each predicted time's true time, one to one, nearest first; without one within the tolerance, itself.

    One to one, so that writing an object at many near times earns false alarms, not second chances.
    """
    aligned = {time: time for time in predicted}
    pairs = sorted((abs(guess - time), guess, time) for guess in predicted for time in true)
    free_guesses, free_times = set(predicted), set(true)
    for gap, guess, time in pairs:
        if gap > TIME_TOLERANCE_SECONDS + 1e-9:
            break
        if guess in free_guesses and time in free_times:
            aligned[guess] = time
            free_guesses.remove(guess)
            free_times.remove(time)
    return aligned


def _fractions(positions: dict[int, tuple[float, float]]) -> Floats:
    return np.array(list(positions.values()), dtype=np.float64).reshape(-1, 2)


def _detection_association(moments: Sequence[_Moment]) -> tuple[float, float]:
    """DetA and AssA of HOTA (Luiten et al., IJCV 2021), similarity 0 or 1.

    Matching at each time prefers pairs whose whole tracks agree, then counts, over all hits, how much of the two
    tracks are hits of each other.
    """
    predicted_ids = sorted({int(i) for moment in moments for i in moment.predicted_ids})
    true_ids = sorted({int(i) for moment in moments for i in moment.true_ids})
    if not predicted_ids or not true_ids:
        return 0.0, 0.0
    row_of = {object_id: row for row, object_id in enumerate(predicted_ids)}
    column_of = {object_id: column for column, object_id in enumerate(true_ids)}
    indexed = [
        (
            np.array([row_of[int(i)] for i in moment.predicted_ids], dtype=np.int64),
            np.array([column_of[int(i)] for i in moment.true_ids], dtype=np.int64),
            moment.similar.astype(np.float64),
        )
        for moment in moments
    ]
    num_predicted, num_true = np.zeros(len(predicted_ids)), np.zeros(len(true_ids))
    potential = np.zeros((len(predicted_ids), len(true_ids)))
    for rows, columns, similar in indexed:
        num_predicted[rows] += 1
        num_true[columns] += 1
        shared = similar.sum(axis=1, keepdims=True) + similar.sum(axis=0, keepdims=True) - similar
        potential[np.ix_(rows, columns)] += np.divide(similar, shared, out=np.zeros_like(similar), where=shared > 0)
    alignment = potential / (num_predicted[:, None] + num_true[None] - potential)
    hits = np.zeros_like(potential)
    for rows, columns, similar in indexed:
        chosen_rows, chosen_columns = linear_sum_assignment(alignment[np.ix_(rows, columns)] * similar, maximize=True)
        good = similar[chosen_rows, chosen_columns] > 0
        hits[rows[chosen_rows[good]], columns[chosen_columns[good]]] += 1
    num_hits = hits.sum()
    if num_hits == 0:
        return 0.0, 0.0
    overlap = hits / (num_predicted[:, None] + num_true[None] - hits)
    detection = num_hits / (num_predicted.sum() + num_true.sum() - num_hits)
    return float(detection), float((hits * overlap).sum() / num_hits)
