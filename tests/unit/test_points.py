"""The pointing grammar against data.md 6."""

from __future__ import annotations

import pytest

from molmo2core.annotations import Point, Track, TrackPosition
from molmo2core.preprocessing.points import (
    NONE,
    ParsedPoint,
    format_points,
    format_tracks,
    parse_points,
    parse_tags,
    parse_tracks,
)


def test_single_image() -> None:
    points = (Point(x=0.911, y=0.8), Point(x=0.9, y=0.4))
    assert format_points(points, "cats", "image") == '<points coords="1 1 900 400 2 911 800">cats</points>'


def test_images_number_points_through() -> None:
    points = (Point(x=0.2, y=0.2, image=3), Point(x=0.1, y=0.1, image=1), Point(x=0.0, y=0.3, image=3))
    assert format_points(points, "cat", "images") == ('<points coords="1 1 100 100;3 2 000 300 3 200 200">cat</points>')


def test_video_points_are_grouped_by_time() -> None:
    points = (Point(x=0.9, y=0.4, time=10.0), Point(x=0.911, y=0.8, time=0.5))
    assert format_points(points, "goal", "video") == '<points coords="0.5 1 911 800;10.0 2 900 400">goal</points>'


def test_sorted_after_rounding() -> None:
    """0.1004 and 0.1001 are one column after rounding, so y decides."""
    points = (Point(x=0.1001, y=0.9), Point(x=0.1004, y=0.1))
    assert format_points(points, "a", "image") == '<points coords="1 1 100 100 2 100 900">a</points>'


def test_half_rounds_to_even_and_both_axes_are_clamped() -> None:
    """The released formatter leaves y unclamped, which makes its own output unparsable (data.md 6.2)."""
    points = (Point(x=0.0005, y=0.0015), Point(x=1.2, y=-0.1), Point(x=-3.0, y=1.0))
    text = format_points(points, "a", "image")
    assert text == '<points coords="1 1 000 002 2 000 1000 3 1000 000">a</points>'
    assert len(parse_points(text)) == 3


def test_tracks_number_objects_by_first_appearance() -> None:
    tracks = (
        Track(object_id=7, positions=(TrackPosition(time=0.0, x=0.5, y=0.5), TrackPosition(time=0.5, x=0.1, y=0.1))),
        Track(object_id=3, positions=(TrackPosition(time=0.0, x=0.2, y=0.9), TrackPosition(time=0.5, x=0.9, y=0.9))),
        Track(object_id=1, positions=(TrackPosition(time=0.5, x=0.0, y=0.0),)),
    )
    assert format_tracks(tracks, "dog") == (
        '<tracks coords="0.0 1 200 900 2 500 500;0.5 1 900 900 2 100 100 3 000 000">dog</tracks>'
    )


def test_invisible_positions_are_left_out() -> None:
    hidden = TrackPosition(time=0.5, x=0.1, y=0.1, visible=False)
    seen = TrackPosition(time=1.0, x=0.1, y=0.1)
    assert format_tracks((Track(object_id=1, positions=(hidden, seen)),), "d") == (
        '<tracks coords="1.0 1 100 100">d</tracks>'
    )


@pytest.mark.parametrize(
    "text",
    [
        format_points((), "cat", "image"),
        format_points((), "cat", "images"),
        format_points((), "cat", "video"),
        format_tracks((), "cat"),
        format_tracks((Track(object_id=1, positions=()),), "cat"),
        format_tracks((Track(object_id=1, positions=(TrackPosition(time=0, x=0, y=0, visible=False),)),), "cat"),
    ],
)
def test_one_sentence_for_every_empty_case(text: str) -> None:
    """The published code has three, one of them the empty string (data.md 6.5)."""
    assert text == NONE == "There are none."
    assert parse_tags(text) == []


@pytest.mark.parametrize("label", ["dog", "R&D", 'a "b"', "dog's", "&lt;", "<points", "a\nb", "a</points>", "&amp;lt;"])
def test_labels_come_back(label: str) -> None:
    text = format_points((Point(x=0, y=1),), label, "image")
    assert [tag.label for tag in parse_tags(text)] == [label]
    assert "\n" not in text


def test_usual_labels_are_written_as_they_are() -> None:
    """The released models saw labels unescaped, so only what breaks the grammar is escaped."""
    label = 'a "b" & c\'s > d'
    assert label in format_points((Point(x=0, y=1),), label, "image")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('<points coords="1 1 100 200; 2 2 300 400">a</points>', [(1, 1, 0.1, 0.2), (2, 2, 0.3, 0.4)]),
        ('<points coords="1 1 100 200">a', [(1, 1, 0.1, 0.2)]),
        ('<points coords="1 1 100 200"/>', [(1, 1, 0.1, 0.2)]),
        ('<points alt="b" coords="1.0 1 100 200">a</points>', [(1, 1, 0.1, 0.2)]),
        ('<points coords="1 1 100 200\t2 2 300 400">a</points>', [(1, 1, 0.1, 0.2), (2, 2, 0.3, 0.4)]),
        ('<points coords="1 1 1001 200 2 100 1000">a</points>', [(1, 2, 0.1, 1.0)]),
        ('<points coords="1 1 10 20 2 100 200">a</points>', [(1, 2, 0.1, 0.2)]),
        ('<points coords="1 1 100 200 2 30">a</points>', [(1, 1, 0.1, 0.2)]),
        ('x <points coords="1 1 100 200">a</points> y <points coords="1 1 300 400">b</points>',
         [(1, 1, 0.1, 0.2), (1, 1, 0.3, 0.4)]),
        ('<points coords="">a</points>', []),
        ('<points coords="1 1 -10 200">a</points>', []),
        ("<points coords=", []),
        ('<tracks coords="1 1 100 200">a</tracks>', []),
        ("", []),
    ],
)  # fmt: skip
def test_parser_keeps_what_is_well_formed(text: str, expected: list[tuple[float, int, float, float]]) -> None:
    """A model's slips cost the malformed triple, never the rest of the answer (data.md 10.4)."""
    assert parse_points(text) == [ParsedPoint(index=i, object_id=n, x=x, y=y) for i, n, x, y in expected]


def test_tracks_are_no_points() -> None:
    text = '<tracks coords="0.0 1 010 020 2 010 030;5.0 1 100 100">dog</tracks>'
    assert parse_points(text) == []
    assert [(p.index, p.object_id) for p in parse_tracks(text)] == [(0.0, 1), (0.0, 2), (5.0, 1)]
