"""The pointing grammar against data.md 6."""

from __future__ import annotations

import pytest

from molmo2core.annotations import Point, Track, TrackPosition
from molmo2core.errors import DataError
from molmo2core.preprocessing.points import (
    NONE,
    ParsedPoint,
    ReplyForm,
    format_answer,
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


def test_images_follow_the_order_of_the_question() -> None:
    """`image_3, image_1` is answered in that order, numbers running on (data.md 6.1)."""
    points = (Point(x=0.2, y=0.2, image=3), Point(x=0.1, y=0.1, image=1), Point(x=0.0, y=0.3, image=3))
    assert format_points(points, "cat", "images", images=(3, 1)) == (
        '<points coords="3 1 000 300 2 200 200;1 3 100 100">cat</points>'
    )


def test_alt_stands_before_coords() -> None:
    text = format_points((Point(x=0.5, y=0.5),), "this", "image", alt='a "b" > <c>')
    assert text == '<points alt="a &quot;b&quot; &gt; &lt;c&gt;" coords="1 1 500 500">this</points>'
    (tag,) = parse_tags(text)
    assert (tag.alt, tag.label) == ('a "b" > <c>', "this")


@pytest.mark.parametrize(
    ("form", "text"),
    [
        ("points", '<points coords="1 1 100 200 2 300 400">cat</points>'),
        ("point_then_count", 'Counting the <points coords="1 1 100 200 2 300 400">cat</points> shows a total of 2.'),
        ("count_then_point", 'There are 2 <points coords="1 1 100 200 2 300 400">cat</points>.'),
        ("count", "2"),
    ],
)
def test_sentences(form: ReplyForm, text: str) -> None:
    """To the letter (data.md 6.1): evaluators of the released models read them."""
    points = (Point(x=0.3, y=0.4), Point(x=0.1, y=0.2))
    assert format_answer(points, "cat", "image", form=form) == text
    assert format_answer((), "cat", "image", form=form) == ("0" if form == "count" else NONE)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_is_a_data_error(value: float) -> None:
    with pytest.raises(DataError, match="finite"):
        format_points((Point(x=value, y=0.5),), "a", "image")
    with pytest.raises(DataError, match="finite"):
        format_points((Point(x=0.5, y=0.5, time=value),), "a", "video")
    with pytest.raises(DataError, match="finite"):
        format_tracks((Track(object_id=1, positions=(TrackPosition(time=0, x=0, y=value),)),), "a")


def test_times_before_the_start_are_the_start() -> None:
    """`-0.0` and `-0.1` could not be read back."""
    points = (Point(x=0.1, y=0.2, time=-0.04), Point(x=0.3, y=0.4, time=-2.0))
    assert format_points(points, "a", "video") == '<points coords="0.0 1 100 200 2 300 400">a</points>'


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
        ('<points coords="1 1 -10 200 2 100 200;2 3 300 400">a</points>', [(1, 2, 0.1, 0.2), (2, 3, 0.3, 0.4)]),
        ('<points coords="1 1 100 200 2 300 40', [(1, 1, 0.1, 0.2)]),
        ('<points coords="1 1 100 200;', [(1, 1, 0.1, 0.2)]),
        ('<points coords="1 1 100 200 2 300 400', [(1, 1, 0.1, 0.2), (1, 2, 0.3, 0.4)]),
        ('<points coords="1 1 100 200>a</points>', [(1, 1, 0.1, 0.2)]),
        ('<points coords="1 1 100 200<points coords="2 1 300 400">', [(1, 1, 0.1, 0.2), (2, 1, 0.3, 0.4)]),
        ("< points  coords = '  1  1  100  200  ' >a</points>", [(1, 1, 0.1, 0.2)]),
        ('<points coords="1 1 100 200" alt="b">a</points>', [(1, 1, 0.1, 0.2)]),
        ('<points alt="coords=7" coords="1 1 100 200">a</points>', [(1, 1, 0.1, 0.2)]),
        ('<points coords="1 1 100 200.5 2 300 400">a</points>', [(1, 2, 0.3, 0.4)]),
        ('<points coords="x 1 100 200;2 2 300 400">a</points>', [(2, 2, 0.3, 0.4)]),
        ('<points coords="' + "9" * 5000 + ' 1 100 200;1 ' + "9" * 5000 + ' 100 200">', []),
        ('<points coords="\u0661 1 100 200">a</points>', []),
        ('<pointset coords="1 1 100 200">a</pointset>', []),
        ("<points coords=", []),
        ('<tracks coords="1 1 100 200">a</tracks>', []),
        ("", []),
    ],
)  # fmt: skip
def test_parser_keeps_what_is_well_formed(text: str, expected: list[tuple[float, int, float, float]]) -> None:
    """A model's slips cost the malformed triple, never the rest of the answer (data.md 10.4)."""
    assert parse_points(text) == [ParsedPoint(index=i, object_id=n, x=x, y=y) for i, n, x, y in expected]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('<point x="61.5" y="40.4" alt="a cat">cat</point>', [(1, 1, 0.615, 0.404)]),
        ('<points x1="10.0" y1="20.5" x2="0" y2="100" alt="cats">cats</points>',
         [(1, 1, 0.1, 0.205), (1, 2, 0.0, 1.0)]),
        ('<points t1="0.5" x1="10.0" y1="20.0" t2="2.5" x2="30.0" y2="40.0">a</points>',
         [(0.5, 1, 0.1, 0.2), (2.5, 2, 0.3, 0.4)]),
        ('<points x1="10.0" y1="20.0" x2="30.0">a</points>', [(1, 1, 0.1, 0.2)]),
        ('<points x1="10.0" y1="20.0" x2="300.0" y2="5.0">a</points>', [(1, 1, 0.1, 0.2)]),
        ('<points x1="10.0" y1="20.0" x2="30.0" y2="4', [(1, 1, 0.1, 0.2), (1, 2, 0.3, 0.04)]),
        ('<point x="61.5">cat</point>', []),
        ("<point>cat</point>", []),
    ],
)  # fmt: skip
def test_molmo_1_is_read(text: str, expected: list[tuple[float, int, float, float]]) -> None:
    """Percent with a decimal (data.md 6.7); never written."""
    found = [(p.index, p.object_id, round(p.x, 6), round(p.y, 6)) for p in parse_points(text)]
    assert found == expected
    assert [tag.label for tag in parse_tags(text)] in ([], ["cat"], ["cats"], ["a"], [""])


def test_labels_of_molmo_1() -> None:
    (tag,) = parse_tags('<point x="61.5" y="40.4" alt="a cat">cat</point>')
    assert (tag.name, tag.label, tag.alt) == ("points", "cat", "a cat")


def test_tracks_are_no_points() -> None:
    text = '<tracks coords="0.0 1 010 020 2 010 030;5.0 1 100 100">dog</tracks>'
    assert parse_points(text) == []
    assert [(p.index, p.object_id) for p in parse_tracks(text)] == [(0.0, 1), (0.0, 2), (5.0, 1)]
