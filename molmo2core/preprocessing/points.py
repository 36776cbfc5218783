"""The text in which the model points and tracks: grammar html-v2, printer and parser (data.md 6).

    <points coords="1 1 030 500 2 911 800">red circle</points>          image: index 1, object number, x, y
    <points coords="1 1 030 500;3 2 911 800">red circle</points>        images: index = image number
    <points coords="0.5 1 030 500;2.0 2 911 800">red circle</points>    video: index = seconds
    <tracks coords="0.0 1 030 500 2 911 800;0.5 1 040 500">circle</tracks>

x and y are thousandths of width and height, three digits (four for 1000).  `There are none.` stands for every empty
case.  A label may hold any text; only what would break the tag or its line is escaped.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from molmo2core.annotations import MediaKind, Point, Track

NONE = "There are none."
"""The answer when nothing is there to point at."""

_SCALE = 1000

_TAG = re.compile(
    r'<(?P<name>points|tracks)[^\n<>]*? coords="(?P<coords>[0-9\t:;, .]*)"\s*/?>'
    r"(?:(?P<label>[^<]*)</(?P=name)>)?"
)
_GROUP = re.compile(r"(?:^|[\t:,;])\s*(?P<index>\d+(?:\.\d+)?)(?P<triples>[^\t:,;]*)")
_TRIPLE = re.compile(r"(?<!\S)(?P<id>\d+)\s+(?P<x>\d{3,4})\s+(?P<y>\d{3,4})(?!\S)")

_ESCAPED = {"<": "&lt;", "\n": "&#10;", "\r": "&#13;"}
_MUST_ESCAPE = re.compile(r"<|\n|\r|&(?=(?:lt|amp|#10|#13);)")
_WRITTEN = {**{code: character for character, code in _ESCAPED.items()}, "&amp;": "&"}
_ENTITY = re.compile("|".join(_WRITTEN))


@dataclass(frozen=True, kw_only=True)
class ParsedPoint:
    """One triple of an answer."""

    index: float
    """1-based image number, or seconds."""
    object_id: int
    x: float
    """Fraction of the width, 0..1."""
    y: float
    """Fraction of the height, 0..1."""


@dataclass(frozen=True, kw_only=True)
class ParsedTag:
    """One `<points>` or `<tracks>` of an answer."""

    name: Literal["points", "tracks"]
    label: str
    """Empty if the tag is not closed."""
    points: tuple[ParsedPoint, ...]


def format_points(points: Sequence[Point], label: str, kind: MediaKind) -> str:
    """`<points ...>`: groups by image or time ascending, in a group by x then y after rounding, numbered throughout."""
    if not points:
        return NONE
    groups: dict[float, list[tuple[int, int]]] = {}
    for point in points:
        groups.setdefault(_group_of(point, kind), []).append((_thousandths(point.x), _thousandths(point.y)))
    written, number = [], 0
    for group in sorted(groups):
        triples = []
        for x, y in sorted(groups[group]):
            number += 1
            triples.append((number, x, y))
        written.append((_index_text(group, kind), triples))
    return _tag("points", written, label)


def format_tracks(tracks: Sequence[Track], label: str) -> str:
    """`<tracks ...>`: groups by time; objects are numbered 1, 2, ... by first appearance, there by x then y.

    Invisible positions are left out.  Two positions of one object that print the same time are one: the first.
    """
    groups: dict[float, dict[int, tuple[int, int]]] = {}
    for track in tracks:
        for position in track.positions:
            if position.visible:
                at_time = groups.setdefault(float(f"{position.time:.1f}"), {})
                at_time.setdefault(track.object_id, (_thousandths(position.x), _thousandths(position.y)))
    if not groups:
        return NONE
    numbers: dict[int, int] = {}
    for time in sorted(groups):
        for object_id in sorted(groups[time], key=lambda key: (groups[time][key], key)):
            numbers.setdefault(object_id, len(numbers) + 1)
    written = [
        (f"{time:.1f}", sorted((numbers[object_id], x, y) for object_id, (x, y) in groups[time].items()))
        for time in sorted(groups)
    ]
    return _tag("tracks", written, label)


def parse_points(text: str) -> list[ParsedPoint]:
    """All points of all `<points>` of an answer; malformed triples and points outside the frame are left out."""
    return [point for tag in parse_tags(text) if tag.name == "points" for point in tag.points]


def parse_tracks(text: str) -> list[ParsedPoint]:
    """All positions of all `<tracks>` of an answer, `index` in seconds; as tolerant as `parse_points`."""
    return [point for tag in parse_tags(text) if tag.name == "tracks" for point in tag.points]


def parse_tags(text: str) -> list[ParsedTag]:
    """The `<points>` and `<tracks>` of an answer with their labels, in order."""
    return [
        ParsedTag(
            name="points" if match["name"] == "points" else "tracks",
            label=_ENTITY.sub(lambda entity: _WRITTEN[entity[0]], match["label"] or ""),
            points=tuple(_parsed_points(match["coords"])),
        )
        for match in _TAG.finditer(text)
    ]


def _parsed_points(coords: str) -> Iterable[ParsedPoint]:
    for group in _GROUP.finditer(coords):
        for triple in _TRIPLE.finditer(group["triples"]):
            x, y = int(triple["x"]), int(triple["y"])
            if x <= _SCALE and y <= _SCALE:
                yield ParsedPoint(index=float(group["index"]), object_id=int(triple["id"]), x=x / _SCALE, y=y / _SCALE)


def _group_of(point: Point, kind: MediaKind) -> float:
    """What a point's group is sorted and, printed, named by."""
    if kind == "video":
        return float(f"{point.time or 0.0:.1f}")
    return point.image if kind == "images" else 1


def _index_text(group: float, kind: MediaKind) -> str:
    return f"{group:.1f}" if kind == "video" else f"{group:.0f}"


def _thousandths(fraction: float) -> int:
    return min(_SCALE, max(0, round(_SCALE * fraction)))


def _tag(name: str, groups: Iterable[tuple[str, list[tuple[int, int, int]]]], label: str) -> str:
    coords = ";".join(
        " ".join([index, *(f"{number} {x:03d} {y:03d}" for number, x, y in triples)]) for index, triples in groups
    )
    written = _MUST_ESCAPE.sub(lambda match: _ESCAPED.get(match[0], "&amp;"), label)
    return f'<{name} coords="{coords}">{written}</{name}>'
