"""What the printer writes, the parser reads back, for any label and any finite coordinates."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from molmo2core.annotations import Point, Track, TrackPosition
from molmo2core.preprocessing.points import NONE, format_points, format_tracks, parse_points, parse_tags, parse_tracks

SPECIAL_LABELS = ['"', "<", "\n", "&lt;", "</points>", '<points coords="1 1 100 100">', "&", "&#10;", ";", "\r", "&amp"]
LABELS = st.one_of(st.text(), st.lists(st.sampled_from([*SPECIAL_LABELS, "a"]), max_size=6).map("".join))
FRACTIONS = st.floats(-0.5, 1.5)
TIMES = st.integers(0, 5000).map(lambda tenths: tenths / 10)


def clamped(fraction: float) -> float:
    return min(1000, max(0, round(1000 * fraction))) / 1000


@given(points=st.lists(st.builds(Point, x=FRACTIONS, y=FRACTIONS, image=st.integers(1, 20), time=TIMES)), label=LABELS)
def test_points(points: list[Point], label: str) -> None:
    """Every point comes back in its group, sorted, numbered 1..N; the label too."""
    for kind, group in (("image", lambda p: 1), ("images", lambda p: p.image), ("video", lambda p: p.time)):
        text = format_points(points, label, kind)  # type: ignore[arg-type]
        parsed = parse_points(text)
        expected = sorted((float(group(p)), clamped(p.x), clamped(p.y)) for p in points)
        assert [(p.index, p.x, p.y) for p in parsed] == expected
        assert [p.object_id for p in parsed] == list(range(1, len(points) + 1))
        assert [tag.label for tag in parse_tags(text)] == ([label] if points else [])
        assert (text == NONE) == (not points)


POSITIONS = st.builds(TrackPosition, time=TIMES, x=FRACTIONS, y=FRACTIONS, visible=st.booleans())


@given(
    positions=st.lists(st.lists(POSITIONS, max_size=6, unique_by=lambda p: p.time), max_size=5),
    label=LABELS,
)
def test_tracks(positions: list[list[TrackPosition]], label: str) -> None:
    """Every visible position comes back, and two positions share a number exactly if they are of one object."""
    tracks = tuple(Track(object_id=50 - n, positions=tuple(found)) for n, found in enumerate(positions))
    text = format_tracks(tracks, label)
    parsed = parse_tracks(text)
    expected = [
        {(p.time, clamped(p.x), clamped(p.y)) for p in track.positions if p.visible}
        for track in tracks
        if any(p.visible for p in track.positions)
    ]
    numbers = {p.object_id for p in parsed}
    found = [{(p.index, p.x, p.y) for p in parsed if p.object_id == number} for number in sorted(numbers)]
    assert sorted(map(sorted, found)) == sorted(map(sorted, expected))
    assert numbers == set(range(1, len(expected) + 1))
    assert [tag.label for tag in parse_tags(text)] == ([label] if expected else [])


@given(st.text(alphabet='<points tracks coords="0123 ;:,.\t\n/>&-', max_size=80))
def test_parsers_take_any_text(text: str) -> None:
    """A model can say anything; whatever is returned is inside the frame."""
    for point in parse_points(text) + parse_tracks(text):
        assert 0 <= point.x <= 1 and 0 <= point.y <= 1 and point.index >= 0
