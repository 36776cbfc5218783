"""The text in which the model points, counts and tracks: grammar html-v2, printer and tolerant parser (data.md 6).

    answer  There are none.                                     nothing to point at
            TAG                                                 `points`, and tracks
            Counting the TAG shows a total of N.                `point_then_count`
            There are N TAG.                                    `count_then_point`
            N                                                   `count`, also 0
    TAG     <points coords="1 1 030 500 2 911 800">red circle</points>          image: index 1, number, x, y
            <points coords="3 1 030 500;1 2 911 800">red circle</points>        images: index = image number
            <points coords="0.5 1 030 500;2.0 2 911 800">red circle</points>    video: index = seconds
            <tracks coords="0.0 1 030 500 2 911 800;0.5 1 040 500">circle</tracks>

x and y are thousandths of width and height, three digits (four for 1000).  Points are sorted by x, then y, after
rounding and numbered through all groups; in tracks the number is the object's.  A label may hold any text; only what
would break the tag or its line is escaped.  `alt="..."` may stand before `coords`.

points_strict.py accepts exactly what the printer writes.  The parser here takes what models say: truncated tags,
stray spaces, tabs between groups (html-v1), and Molmo 1's `<point x="61.5" y="40.4" alt="a">a</point>` and
`<points x1= y1= x2= y2= ..>` in percent.  It takes time linear in the text.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from molmo2core.annotations import CountForm, MediaKind, Point, Track
from molmo2core.errors import DataError

NONE = "There are none."
"""The answer when nothing is there to point at or to follow."""

ReplyForm = Literal["points"] | CountForm
"""The sentence around a `<points>`."""

SCALE = 1000
"""Written coordinates per width or height."""
_PERCENT = 100.0

# Quantifiers are possessive (`*+`) or bounded, so that no text makes them try again what they have read.
_OPENING = re.compile(r"<[ \t]{0,8}(?P<name>points|tracks|point)(?![A-Za-z0-9_])(?P<attributes>[^<>]*+)>?")
_LABEL = re.compile(r"(?P<label>[^<]*+)</(?P<name>points|tracks|point)\b")
_COORDS = re.compile(r"""\bcoords[ ]{0,8}=[ ]{0,8}["']?(?P<value>[^"']*+)""")
_ALT = re.compile(r"""\balt[ ]{0,8}=[ ]{0,8}"(?P<value>[^"]*+)""")
_GROUP = re.compile(
    r"(?:^|[\t\n:,;])\s*+(?P<index>[0-9]{1,15}+(?:\.[0-9]{1,6}+)?+)(?=[\s:,;]|$)(?P<triples>[^\t\n:,;]*+)"
)
_TRIPLE = re.compile(r"(?<!\S)(?P<id>[0-9]{1,9}+)\s++(?P<x>[0-9]{3,4}+)\s++(?P<y>[0-9]{3,4}+)(?!\S)")
_PERCENTAGE = re.compile(
    r"""(?<!\S)(?P<axis>[txy])(?P<id>[0-9]{0,6}+)[ ]{0,8}=[ ]{0,8}["']?"""
    r"(?P<value>[0-9]{1,9}+(?:\.[0-9]{1,6}+)?+)"
)

_CODES = {"<": "&lt;", "\n": "&#10;", "\r": "&#13;", ">": "&gt;", '"': "&quot;"}
_CHARACTERS = {code: character for character, code in _CODES.items()} | {"&amp;": "&"}
_MUST_ESCAPE = re.compile(r"[<\n\r]|&(?=(?:lt|amp|#10|#13);)")
_MUST_ESCAPE_IN_ALT = re.compile(r"[<\n\r>\"]|&(?=(?:lt|amp|#10|#13|gt|quot);)")
_ENTITY = re.compile(r"&(?:lt|amp|#10|#13);")
_ENTITY_IN_ALT = re.compile(r"&(?:lt|amp|#10|#13|gt|quot);")


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
    alt: str = ""


def format_answer(
    points: Sequence[Point], label: str, kind: MediaKind, *, form: ReplyForm = "points", images: Sequence[int] = ()
) -> str:
    """What the model says about `points`: the tag, in the sentence of `form`; arguments as in `format_points`."""
    if form == "count":
        return str(len(points))
    tag = format_points(points, label, kind, images=images)
    if tag == NONE or form == "points":
        return tag
    if form == "point_then_count":
        return f"Counting the {tag} shows a total of {len(points)}."
    return f"There are {len(points)} {tag}."


def format_points(
    points: Sequence[Point], label: str, kind: MediaKind, *, images: Sequence[int] = (), alt: str = ""
) -> str:
    """`<points ...>`: groups by image or time ascending, in a group by x then y after rounding, numbered throughout.

    Args:
        points: any number; none gives NONE.
        label: any text.
        kind: of the medium: settles what groups are.
        images: for an image set, the images in the order in which they were asked for, each once; default ascending.
        alt: any text; written only if there is some.

    Raises:
        DataError: a coordinate or time is not finite.
    """
    if not points:
        return NONE
    groups: dict[float, list[tuple[int, int]]] = {}
    for point in points:
        groups.setdefault(_group_of(point, kind), []).append((_thousandths(point.x), _thousandths(point.y)))
    asked = {image: position for position, image in enumerate(images)}
    written, number = [], 0
    for group in sorted(groups, key=lambda group: asked.get(int(group), group)):
        triples = []
        for x, y in sorted(groups[group]):
            number += 1
            triples.append((number, x, y))
        written.append((f"{group:.1f}" if kind == "video" else f"{group:.0f}", triples))
    return _tag("points", written, label, alt)


def format_tracks(tracks: Sequence[Track], label: str) -> str:
    """`<tracks ...>`: groups by time; objects are numbered 1, 2, ... by first appearance, there by x then y.

    Invisible positions are left out.  Two positions of one object that print the same time are one: the first.

    Raises:
        DataError: a coordinate or time is not finite.
    """
    groups: dict[float, dict[int, tuple[int, int]]] = {}
    for track in tracks:
        for position in track.positions:
            if position.visible:
                at_time = groups.setdefault(_tenths(position.time), {})
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
    """The `<points>`, `<tracks>` and legacy `<point>` of an answer that hold coordinates at all, in order."""
    tags = []
    for opening in _OPENING.finditer(text):
        attributes = opening["attributes"]
        if alt := _ALT.search(attributes):
            attributes = f"{attributes[: alt.start()]} {attributes[alt.end() :]}"  # it may spell out `coords=`
        if coords := _COORDS.search(attributes):
            points = tuple(_parsed_points(coords["value"]))
        elif legacy := _percentages(attributes):
            points = tuple(_legacy_points(legacy))
        else:
            continue
        closed = _LABEL.match(text, opening.end())
        tags.append(
            ParsedTag(
                name="tracks" if opening["name"] == "tracks" else "points",
                label=unescape(closed["label"]) if closed and closed["name"] == opening["name"] else "",
                points=points,
                alt=unescape(alt["value"], in_alt=True) if alt else "",
            )
        )
    return tags


def escape(text: str, *, in_alt: bool = False) -> str:
    """`text` as it is written in a label or an `alt`: only what would break the tag, its line or unescaping changes."""
    return (_MUST_ESCAPE_IN_ALT if in_alt else _MUST_ESCAPE).sub(lambda found: _CODES.get(found[0], "&amp;"), text)


def unescape(text: str, *, in_alt: bool = False) -> str:
    """Inverse of `escape`."""
    return (_ENTITY_IN_ALT if in_alt else _ENTITY).sub(lambda found: _CHARACTERS[found[0]], text)


def _parsed_points(coords: str) -> Iterator[ParsedPoint]:
    for group in _GROUP.finditer(coords):
        index = float(group["index"])
        for triple in _TRIPLE.finditer(group["triples"]):
            x, y = int(triple["x"]), int(triple["y"])
            if x <= SCALE and y <= SCALE:
                yield ParsedPoint(index=index, object_id=int(triple["id"]), x=x / SCALE, y=y / SCALE)


def _percentages(attributes: str) -> dict[tuple[int, str], float]:
    """Values of `x1="61.5"` and the like by number (1 without one) and axis; the first of each counts."""
    found: dict[tuple[int, str], float] = {}
    for match in _PERCENTAGE.finditer(attributes):
        found.setdefault((int(match["id"] or 1), match["axis"]), float(match["value"]))
    return found


def _legacy_points(percentages: Mapping[tuple[int, str], float]) -> Iterator[ParsedPoint]:
    for (number, axis), x in percentages.items():
        y = percentages.get((number, "y"))
        if axis == "x" and y is not None and max(x, y) <= _PERCENT:
            time = percentages.get((number, "t"), 1.0)
            yield ParsedPoint(index=time, object_id=number, x=x / _PERCENT, y=y / _PERCENT)


def _group_of(point: Point, kind: MediaKind) -> float:
    """What a point's group is sorted and, printed, named by."""
    if kind == "video":
        return _tenths(point.time or 0.0)
    return point.image if kind == "images" else 1


def _tenths(seconds: float) -> float:
    """The time as printed; never before the start (`-0.0` could not be read back)."""
    return max(0.0, float(f"{_finite(seconds):.1f}"))


def _thousandths(fraction: float) -> int:
    return min(SCALE, max(0, round(SCALE * _finite(fraction))))


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise DataError("annotation", found=f"the number {value}", expected="finite coordinates and times")
    return value


def _tag(name: str, groups: Iterable[tuple[str, list[tuple[int, int, int]]]], label: str, alt: str = "") -> str:
    coords = ";".join(
        " ".join([index, *(f"{number} {x:03d} {y:03d}" for number, x, y in triples)]) for index, triples in groups
    )
    attributes = f' alt="{escape(alt, in_alt=True)}"' if alt else ""
    return f'<{name}{attributes} coords="{coords}">{escape(label)}</{name}>'
