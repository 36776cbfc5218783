"""Invariants of the metrics over random predictions and truths."""

from __future__ import annotations

from itertools import permutations
from math import dist

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from molmo2core.annotations import Point, Track, TrackPosition
from molmo2core.evaluation.metrics.pointing import score_points
from molmo2core.evaluation.metrics.qa import edit_distance, select_option, word_f1
from molmo2core.evaluation.metrics.tracking import score_tracks

SIZES = [(120, 80), (60, 90)]
TIMES = (0.0, 0.5, 1.0)

fractions = st.integers(0, 20).map(lambda n: n / 20)
image_points = st.builds(Point, x=fractions, y=fractions, image=st.integers(1, 2), radius=st.sampled_from([0.02, 0.2]))
tracks = st.lists(
    st.builds(
        lambda places: tuple(TrackPosition(time=t, x=x, y=y) for t, (x, y) in sorted(places.items())),
        st.dictionaries(st.sampled_from(TIMES), st.tuples(fractions, fractions)),
    ),
    max_size=3,
).map(lambda found: [Track(object_id=n, positions=places, radius=0.1) for n, places in enumerate(found, start=1)])


def brute_force_hits(predicted: list[Point], truth: list[Point]) -> set[int]:
    """Hit counts of every one-to-one matching with most allowed pairs and, of these, the least total distance."""
    small, large = (predicted, truth) if len(predicted) <= len(truth) else (truth, predicted)
    best: dict[tuple[int, float], set[int]] = {}
    for chosen in permutations(range(len(large)), len(small)):
        allowed, total, hits = 0, 0.0, 0
        for i, j in enumerate(chosen):
            guess, point = (small[i], large[j]) if small is predicted else (large[j], small[i])
            if guess.image != point.image:
                continue
            width, height = SIZES[point.image - 1]
            distance = dist((guess.x * width, guess.y * height), (point.x * width, point.y * height))
            allowed, total = allowed + 1, total + distance
            hits += distance <= point.radius * min(width, height) + 1e-6
        best.setdefault((-allowed, round(total, 6)), set()).add(hits)
    return best[min(best)]


@given(st.lists(image_points, min_size=1, max_size=4), st.lists(image_points, min_size=1, max_size=4))
@settings(max_examples=150, deadline=None)
def test_pointing_is_the_best_matching_of_all(predicted: list[Point], truth: list[Point]) -> None:
    """Would catch any fault of the assignment (costs, shapes, masks): every matching is tried instead."""
    scores = score_points(predicted, truth, SIZES)
    assert round(scores.precision * len(predicted)) in brute_force_hits(predicted, truth)
    assert scores.precision * len(predicted) == pytest.approx(scores.recall * len(truth))


@given(st.lists(image_points, max_size=5), st.lists(image_points, max_size=5))
@settings(max_examples=60, deadline=None)
def test_pointing_lies_between_precision_and_recall_and_truth_is_perfect(
    predicted: list[Point], truth: list[Point]
) -> None:
    scores = score_points(predicted, truth, SIZES)
    low, high = sorted((scores.precision, scores.recall))
    assert low - 1e-9 <= scores.f1 <= high + 1e-9
    assert score_points(truth, truth, SIZES).f1 == 1.0


@given(tracks, tracks, st.permutations([11, 12, 13]))
@settings(max_examples=100, deadline=None)
def test_tracking_scores(predicted: list[Track], truth: list[Track], names: list[int]) -> None:
    """Scores lie in [0, 1], truth is perfect, and predicted objects may be called and listed in any way."""
    scores = score_tracks(predicted, truth, SIZES[0])
    for value in (scores.precision, scores.recall, scores.f1, scores.detection, scores.association, scores.hota):
        assert 0 <= value <= 1 + 1e-9
    perfect = score_tracks(truth, truth, SIZES[0])
    assert perfect.detection == pytest.approx(1.0)
    assert perfect.f1 == 1.0
    renamed = [Track(object_id=name, positions=track.positions) for name, track in zip(names, predicted, strict=False)][
        ::-1
    ]
    again = score_tracks(renamed, truth, SIZES[0])
    assert again.detection == pytest.approx(scores.detection)


words = st.text("ab c", max_size=8)


@given(words, words, words)
@settings(max_examples=100, deadline=None)
def test_edit_distance_is_a_metric(a: str, b: str, c: str) -> None:
    assert edit_distance(a, b) == edit_distance(b, a)
    assert (edit_distance(a, b) == 0) == (a == b)
    assert edit_distance(a, c) <= edit_distance(a, b) + edit_distance(b, c)


@given(st.lists(st.text("abcd", min_size=1, max_size=5), min_size=2, max_size=6, unique=True), st.data())
@settings(max_examples=100, deadline=None)
def test_the_trained_answer_selects_its_option(options: list[str], data: st.DataObject) -> None:
    """Whatever the options look like, `B. text` means the second one."""
    number = data.draw(st.integers(0, len(options) - 1))
    assert select_option(f"{chr(ord('A') + number)}. {options[number]}", options) == number


@given(words, words)
@settings(max_examples=60, deadline=None)
def test_word_f1_is_symmetric_and_1_only_for_the_same_words(a: str, b: str) -> None:
    assert word_f1(a, b) == pytest.approx(word_f1(b, a))
    assert (word_f1(a, b) == 1.0) == (sorted(a.split()) == sorted(b.split()))
