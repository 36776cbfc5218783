"""Tracking scores on hand-computed cases: switches, misses, absence, invisible positions, times."""

from __future__ import annotations

from math import sqrt

import pytest

from molmo2core.annotations import Track, TrackPosition
from molmo2core.evaluation.metrics.tracking import score_tracks

SIZE = (100, 100)
LEFT, RIGHT = 0.2, 0.8


def track(number: int, *places: tuple[float, float], radius: float = 0.05) -> Track:
    """A track from (time, x) pairs, at half height."""
    positions = tuple(TrackPosition(time=time, x=x, y=0.5) for time, x in places)
    return Track(object_id=number, positions=positions, radius=radius)


TRUTH = [track(1, (0.0, LEFT), (0.5, LEFT)), track(2, (0.0, RIGHT), (0.5, RIGHT))]


def test_perfect_tracks_score_1_whatever_the_objects_are_called() -> None:
    predicted = [track(9, (0.0, RIGHT), (0.5, RIGHT)), track(4, (0.0, LEFT), (0.5, LEFT))]
    scores = score_tracks(predicted, TRUTH, SIZE)
    assert (scores.f1, scores.detection, scores.association, scores.hota) == (1.0, 1.0, 1.0, 1.0)


def test_swapped_identities_cost_association_only() -> None:
    """Would catch a HOTA that forgets ids.  Each hit's tracks share 1 of 1 + 1 + 1 positions: AssA 1/3."""
    predicted = [track(1, (0.0, LEFT), (0.5, RIGHT)), track(2, (0.0, RIGHT), (0.5, LEFT))]
    scores = score_tracks(predicted, TRUTH, SIZE)
    assert scores.f1 == 1.0
    assert scores.detection == 1.0
    assert scores.association == pytest.approx(1 / 3)
    assert scores.hota == pytest.approx(sqrt(1 / 3))


def test_a_missed_object_and_a_false_one() -> None:
    """One object tracked, the other missed, a false one added: per time 1 hit of 2 and 2, DetA 2/(2+2+2)."""
    predicted = [track(1, (0.0, LEFT), (0.5, LEFT)), track(2, (0.0, 0.5), (0.5, 0.5))]
    scores = score_tracks(predicted, TRUTH, SIZE)
    assert (scores.precision, scores.recall, scores.f1) == (0.5, 0.5, 0.5)
    assert scores.detection == pytest.approx(1 / 3)
    assert scores.association == 1.0


def test_absent_objects_are_not_missed() -> None:
    """Would catch the published code's fault of counting objects that have left the frame (4.5)."""
    truth = [track(1, (0.0, LEFT), (0.5, LEFT)), track(2, (0.0, RIGHT))]
    predicted = [track(1, (0.0, LEFT), (0.5, LEFT)), track(2, (0.0, RIGHT))]
    assert score_tracks(predicted, truth, SIZE).f1 == 1.0


def test_invisible_positions_do_not_exist() -> None:
    hidden = TrackPosition(time=0.5, x=RIGHT, y=0.5, visible=False)
    truth = [Track(object_id=1, positions=(TrackPosition(time=0.0, x=RIGHT, y=0.5), hidden))]
    assert score_tracks([track(1, (0.0, RIGHT))], truth, SIZE).f1 == 1.0
    assert score_tracks([track(1, (0.0, RIGHT), (0.5, RIGHT))], truth, SIZE).f1 == 0.5  # a false alarm at 0.5 s


@pytest.mark.parametrize(
    ("predicted", "truth", "score"),
    [([], [], 1.0), (TRUTH, [], 0.0), ([], TRUTH, 0.0), ([track(1)], [track(1)], 1.0)],
)
def test_empty_sets(predicted: list[Track], truth: list[Track], score: float) -> None:
    scores = score_tracks(predicted, truth, SIZE)
    assert {scores.f1, scores.precision, scores.recall, scores.detection, scores.hota} == {score}


def test_rounded_times_are_the_same_time() -> None:
    """Text has one decimal: 1/3 s is written 0.3."""
    truth = [track(1, (0.0, LEFT), (1 / 3, LEFT), (2 / 3, LEFT))]
    assert score_tracks([track(1, (0.0, LEFT), (0.3, LEFT), (0.7, LEFT))], truth, SIZE).hota == 1.0


def test_many_near_times_are_no_second_chance() -> None:
    """Would catch snapping every near time to the true one: of three guesses about 1.0 s, two are false alarms."""
    scores = score_tracks([track(1, (0.9, LEFT), (1.0, RIGHT), (1.1, LEFT))], [track(1, (1.0, RIGHT))], SIZE)
    assert scores.f1 == pytest.approx(1 / 3)
    assert scores.detection == pytest.approx(1 / 3)


def test_hota_matches_whole_tracks_not_frames() -> None:
    """At 0.0 s both predictions are near object 1; the one that follows it later must be its match."""
    truth = [track(1, (0.0, LEFT), (0.5, LEFT), (1.0, LEFT))]
    stray, follower = track(1, (0.0, LEFT)), track(2, (0.0, LEFT + 0.01), (0.5, LEFT), (1.0, LEFT))
    assert score_tracks([stray, follower], truth, SIZE).association == 1.0
