"""Pointing scores: who may match whom, what a hit is, the empty cases."""

from __future__ import annotations

import pytest

from molmo2core.annotations import Point
from molmo2core.evaluation.metrics.pointing import score_points

WIDE = [(200, 100)]


def at(x: float, y: float, **facts: float | int) -> Point:
    return Point(x=x, y=y, **facts)  # type: ignore[arg-type]


def test_the_radius_is_a_fraction_of_the_shorter_side_in_pixels() -> None:
    """Would catch distances in fractions: 0.02 of the width are 4 pixels here, 0.02 of the height are 2."""
    truth = [at(0.5, 0.5, radius=0.05)]  # 5 pixels
    assert score_points([at(0.52, 0.5)], truth, WIDE).f1 == 1.0  # 4 pixels to the right
    assert score_points([at(0.53, 0.5)], truth, WIDE).f1 == 0.0  # 6 pixels to the right
    assert score_points([at(0.5, 0.549)], truth, WIDE).f1 == 1.0  # 4.9 pixels down
    assert score_points([at(0.5, 0.551)], truth, WIDE).f1 == 0.0


def test_one_prediction_hits_one_object() -> None:
    """Would catch nearest-neighbour matching: both true points are within reach of the one prediction."""
    truth = [at(0.5, 0.5, radius=0.2), at(0.52, 0.5, radius=0.2)]
    scores = score_points([at(0.51, 0.5)], truth, WIDE)
    assert (scores.precision, scores.recall, scores.f1) == (1.0, 0.5, pytest.approx(2 / 3))


def test_matching_takes_the_least_total_distance() -> None:
    """Would catch greedy matching: the first prediction is near both, the second only near the first true point."""
    truth = [at(0.50, 0.5, radius=0.05), at(0.54, 0.5, radius=0.05)]
    predicted = [at(0.515, 0.5), at(0.49, 0.5)]
    # greedy in the order of predictions: 0.515 -> 0.50, then 0.49 -> 0.54 misses.  Least total: 0.515 -> 0.54 hits.
    assert score_points(predicted, truth, [(100, 100)]).f1 == 1.0


@pytest.mark.parametrize(
    ("predicted", "truth", "scores"),
    [
        ([], [], (1.0, 1.0, 1.0)),
        ([at(0.5, 0.5)], [], (0.0, 0.0, 0.0)),
        ([], [at(0.5, 0.5)], (0.0, 0.0, 0.0)),
        ([at(0.5, 0.5), at(0.9, 0.9)], [at(0.5, 0.5)], (0.5, 1.0, pytest.approx(2 / 3))),
    ],
)
def test_empty_sets_and_surplus(predicted: list[Point], truth: list[Point], scores: tuple[float, ...]) -> None:
    found = score_points(predicted, truth, WIDE)
    assert (found.precision, found.recall, found.f1) == scores


def test_points_on_another_image_never_match() -> None:
    sizes = [(100, 100), (50, 50)]
    truth = [at(0.5, 0.5, image=2)]
    assert score_points([at(0.5, 0.5, image=2)], truth, sizes).f1 == 1.0
    assert score_points([at(0.5, 0.5, image=1)], truth, sizes).f1 == 0.0
    assert score_points([at(0.5, 0.5, image=7)], truth, sizes).f1 == 0.0  # an image that does not exist


def test_each_image_has_its_own_scale() -> None:
    """Would catch using the first image's size for all: 0.04 of 50 pixels is 2, within 0.05 of 50 = 2.5."""
    sizes = [(1000, 1000), (50, 200)]
    truth = [at(0.5, 0.5, image=2, radius=0.05)]
    assert score_points([at(0.54, 0.5, image=2)], truth, sizes).f1 == 1.0
    assert score_points([at(0.5, 0.52, image=2)], truth, sizes).f1 == 0.0  # 4 pixels of 200


def test_a_video_point_must_be_at_its_time() -> None:
    truth = [at(0.5, 0.5, time=2.0)]
    assert score_points([at(0.5, 0.5, time=2.25)], truth, WIDE).f1 == 1.0
    assert score_points([at(0.5, 0.5, time=1.75)], truth, WIDE).f1 == 1.0
    assert score_points([at(0.5, 0.5, time=2.26)], truth, WIDE).f1 == 0.0
    assert score_points([at(0.5, 0.5)], truth, WIDE).f1 == 0.0  # a point without a time


def test_a_distant_time_does_not_steal_a_match() -> None:
    """Would catch a matching that ignores times: by place alone the pairs would cross."""
    truth = [at(0.5, 0.5, time=0.0), at(0.52, 0.5, time=5.0)]
    predicted = [at(0.52, 0.5, time=0.0), at(0.5, 0.5, time=5.0)]
    assert score_points(predicted, truth, WIDE).f1 == 1.0
