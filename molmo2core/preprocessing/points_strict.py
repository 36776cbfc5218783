"""The grammar of points.py, read strictly: accepted is what its printer writes, all else is refused with a reason."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from molmo2core.errors import DataError, Molmo2Error
from molmo2core.preprocessing.points import NONE, SCALE, ParsedPoint, ParsedTag, ReplyForm, escape, unescape

Fault = Literal["sentence", "tag", "coords", "index", "triple", "number", "order", "label", "count", "end"]
"""What is wrong with an answer.

sentence    it begins like none of the sentences, or a count is not written as a number
tag         the tag or its `alt` is not written as it should be, or not closed
coords      an empty group, a character or space that does not belong there, no closing quote
index       no image number (1, 2, ...) or time (one decimal), or both kinds in one tag
triple      not number, x, y; a coordinate without three digits or above 1000
number      points not numbered 1, 2, ... through; objects of tracks not numbered by first appearance
order       times not ascending, an image twice, points not sorted by x then y
label       text that the printer would have escaped
count       the number stated is not the number of points
end         text behind the answer
"""

_OPENING = re.compile(r'<(?P<name>points|tracks)(?: alt="(?P<alt>[^"<>\n\r]++)")?+ coords="')
_COORDS = re.compile(r'(?P<coords>[^"<>]*+)">')
_LABEL = re.compile(r"(?P<label>[^<\n\r]*+)")
_GROUP = re.compile(r"(?P<index>[^ ]++)(?P<triples>(?: [^ ]++ [^ ]++ [^ ]++)++)")
_TRIPLE = re.compile(r" (?P<id>[1-9][0-9]{0,8}+) (?P<x>[0-9]{3}|1000) (?P<y>[0-9]{3}|1000)(?= |\Z)")
_IMAGE = re.compile(r"[1-9][0-9]{0,14}")
_TIME = re.compile(r"(?:0|[1-9][0-9]{0,14})\.[0-9]")
_COUNT = re.compile(r"0|[1-9][0-9]{0,14}")
_COUNT_FIRST = re.compile(r"There are (?P<count>[1-9][0-9]{0,14}+) ")
_POINTS_FIRST = "Counting the "
_STATED = re.compile(r" shows a total of (?P<count>[1-9][0-9]{0,14}+)\.")


class GrammarError(DataError):
    """An answer that the printer would not have written."""

    def __init__(self, reason: Fault, position: int, text: str) -> None:
        self.reason, self.position, self.text = reason, position, text
        shown = text[position : position + 40]
        super().__init__(
            f"answer, character {position}", found=f"{reason}: {shown!r}", expected="what points.py prints"
        )

    def __reduce__(self) -> tuple[Callable[..., Molmo2Error], tuple[object, ...]]:
        return GrammarError, (self.reason, self.position, self.text)


@dataclass(frozen=True, kw_only=True)
class ParsedAnswer:
    """A whole answer."""

    form: ReplyForm
    count: int
    """The number stated; without one, how many points or positions there are."""
    tag: ParsedTag | None
    """None for `There are none.` and for a number alone."""


def parse_answer(text: str) -> ParsedAnswer:
    """The answer that `text` is.

    Raises:
        GrammarError: the printer would not have written it; `reason` and `position` say why and where.
    """
    if text == NONE:
        return ParsedAnswer(form="points", count=0, tag=None)
    if _COUNT.fullmatch(text):
        return ParsedAnswer(form="count", count=int(text), tag=None)
    counted = _COUNT_FIRST.match(text)
    form: ReplyForm = "count_then_point" if counted else "points"
    start = counted.end() if counted else 0
    if text.startswith(_POINTS_FIRST):
        form, start = "point_then_count", len(_POINTS_FIRST)
    if not text.startswith("<", start):
        raise GrammarError("sentence", start, text)
    tag, end = _tag(text, start, numbered=form != "points")
    stated = counted
    if form == "point_then_count":
        stated = _STATED.match(text, end)
        if stated is None:
            raise GrammarError("sentence", end, text)
        end = stated.end()
    elif form == "count_then_point":
        if not text.startswith(".", end):
            raise GrammarError("sentence", end, text)
        end += 1
    if end != len(text):
        raise GrammarError("end", end, text)
    if stated is not None and int(stated["count"]) != len(tag.points):
        raise GrammarError("count", stated.start("count"), text)
    return ParsedAnswer(form=form, count=len(tag.points), tag=tag)


def _tag(text: str, start: int, *, numbered: bool) -> tuple[ParsedTag, int]:
    """The tag that begins at `start`, and where it ends.  Only points stand in a sentence that counts."""
    opening = _OPENING.match(text, start)
    if opening is None or (numbered and opening["name"] != "points"):
        raise GrammarError("tag", start, text)
    alt = unescape(opening["alt"] or "", in_alt=True)
    if opening["alt"] and (numbered or opening["name"] == "tracks" or escape(alt, in_alt=True) != opening["alt"]):
        raise GrammarError("tag", start, text)
    inner = _COORDS.match(text, opening.end())
    if inner is None:
        raise GrammarError("coords", opening.end(), text)
    points = _points(text, inner.start(), inner["coords"], is_track=opening["name"] == "tracks")
    written = _LABEL.match(text, inner.end())
    assert written is not None  # it matches the empty text too
    label = unescape(written["label"])
    if escape(label) != written["label"]:
        raise GrammarError("label", inner.end(), text)
    closing = f"</{opening['name']}>"
    if not text.startswith(closing, written.end()):
        raise GrammarError("tag", written.end(), text)
    name: Literal["points", "tracks"] = "tracks" if opening["name"] == "tracks" else "points"
    return ParsedTag(name=name, label=label, points=points, alt=alt), written.end() + len(closing)


def _points(text: str, start: int, coords: str, *, is_track: bool) -> tuple[ParsedPoint, ...]:
    """All triples of all groups, checked for form, numbering and order.

    Args:
        text: the whole answer, for messages.
        start: where `coords` begins in it.
        coords: what stands between the quotes.
        is_track: numbers are those of objects.
    """
    points: list[ParsedPoint] = []
    seen: set[float] = set()
    last_time, num_objects = -1.0, 0
    kind = _TIME if is_track or "." in coords.partition(" ")[0] else _IMAGE
    for written in coords.split(";"):
        group = _GROUP.fullmatch(written)
        if group is None:
            raise GrammarError("coords", start, text)
        index = float(group["index"]) if kind.fullmatch(group["index"]) else None
        if index is None:
            raise GrammarError("index", start, text)
        if index in seen or (kind is _TIME and index < last_time):
            raise GrammarError("order", start, text)
        seen.add(index)
        last_time = index
        position, before, last_new = group.start("triples"), 0, (0, 0)
        while position < len(written):
            triple = _TRIPLE.match(written, position)
            if triple is None:
                raise GrammarError("triple", start + position, text)
            number, x, y = int(triple["id"]), int(triple["x"]), int(triple["y"])
            if number <= before and is_track:
                raise GrammarError("order", start + position, text)
            if number > num_objects + 1 or (number <= num_objects and not is_track):
                raise GrammarError("number", start + position, text)
            if number > num_objects:
                if (x, y) < last_new:
                    raise GrammarError("number" if is_track else "order", start + position, text)
                num_objects, last_new = number, (x, y)
            points.append(ParsedPoint(index=index, object_id=number, x=x / SCALE, y=y / SCALE))
            before, position = number, triple.end()
        start += len(written) + 1
    return tuple(points)
