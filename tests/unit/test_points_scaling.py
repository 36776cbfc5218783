"""Long and hostile answers take time linear in their length: no regular expression tries again what it has read.

Four times the text may take four times as long; a quadratic parser takes sixteen times.  The bound of eight lies
between.  Times are the least of several runs of process time, so that a busy machine does not decide.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable

import numpy as np
import pytest

from molmo2core.annotations import Point, Track, TrackPosition
from molmo2core.evaluation.metrics.counting import stated_count
from molmo2core.preprocessing.points import format_points, format_tracks, parse_tags
from molmo2core.preprocessing.points_strict import GrammarError, parse_answer

SHORT, LONG = 50_000, 200_000
HEAD = '<points coords="'
HOSTILE: dict[str, Callable[[int], str]] = {
    "openings": lambda n: "<points" * (n // 7),
    "openings with spaces": lambda n: "<        points " * (n // 16),
    "angles": lambda n: "<" * n,
    "attributes": lambda n: "<points" + ' coords="' * (n // 9),
    "attributes without quotes": lambda n: "<points" + " coords=" * (n // 8),
    "words like coords": lambda n: "<points " + "coord" * (n // 5),
    "spaces in an attribute": lambda n: "<points coords" + " " * n + "=",
    "alts": lambda n: "<points " + 'alt="' * (n // 5),
    "spaces": lambda n: HEAD + "1 1" + " " * n,
    "spaces before numbers": lambda n: HEAD + ("1 1 100" + " " * 200 + "x") * (n // 208),
    "digits": lambda n: HEAD + "9" * n,
    "digits with dots": lambda n: HEAD + "9." * (n // 2),
    "separators": lambda n: HEAD + ";" * n,
    "groups": lambda n: HEAD + "1 1 100 200;" * (n // 12) + '">a</points>',
    "points in one group": lambda n: HEAD + "1" + " 1 100 200" * (n // 10) + '">a</points>',
    "tags cut short": lambda n: (HEAD + "1 1 100 200") * (n // 27),
    "tags without an end": lambda n: (HEAD + '1 1 100 200">') * (n // 29),
    "ends": lambda n: HEAD + '1 1 100 200">' + "</points" * (n // 8),
    "entities": lambda n: HEAD + '1 1 100 200">' + "&lt;&amp;" * (n // 9) + "</points>",
    "ampersands": lambda n: HEAD + '1 1 100 200">' + "&" * n + "</points>",
    "legacy": lambda n: "<points " + 'x1="1.0" y1="2.0" ' * (n // 18) + ">a</points>",
    "legacy numbers": lambda n: "<points " + " ".join(f'x{k}="1"' for k in range(n // 10)),
    "legacy spaces": lambda n: "<points x1" + " " * n,
    "sentences": lambda n: "There are 1 " * (n // 12),
    "totals": lambda n: "total number " * (n // 13),
    "a sentence of digits": lambda n: "There are " + "1" * n + " <",
}


def answered(points: int) -> str:
    rng = np.random.default_rng(0)
    return format_points([Point(x=x, y=y) for x, y in rng.random((points, 2)).tolist()], "leaf", "image")


def seconds(work: Callable[[], object]) -> float:
    """Least process time of several runs."""
    best = float("inf")
    for _ in range(5):
        started = time.process_time()
        work()
        best = min(best, time.process_time() - started)
    return best


def read(text: str) -> None:
    parse_tags(text)
    stated_count(text)
    with contextlib.suppress(GrammarError):
        parse_answer(text)


def grows_linearly(make: Callable[[int], Callable[[], object]], short: int, long: int) -> bool:
    """Whether `long` takes less than twice what it would at a constant rate; timing is tried again once."""
    for _ in range(2):
        few, many = seconds(make(short)), seconds(make(long))
        if many < 2 * (long / short) * few + 0.002:
            return True
    return False


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_answers_are_read_in_linear_time(name: str) -> None:
    def make(length: int) -> Callable[[], object]:
        text = HOSTILE[name](length)
        assert 0.8 * length < len(text) < 1.2 * length + 60
        return lambda: read(text)

    assert grows_linearly(make, SHORT, LONG)


def test_a_quadratic_reader_would_be_found() -> None:
    """Keeps the measurement honest."""
    assert not grows_linearly(lambda length: lambda: re.search("a*b", "a" * length), 2000, 8000)


def test_ten_thousand_points_are_printed_and_read_in_linear_time() -> None:
    """Pointing at 10^4 things is one answer of 129,000 characters."""

    def printed(points: int) -> Callable[[], object]:
        return lambda: answered(points)

    def read_back(points: int) -> Callable[[], object]:
        text = answered(points)
        assert len(parse_tags(text)[0].points) == points == parse_answer(text).count
        return lambda: read(text)

    def tracked(positions: int) -> Callable[[], object]:
        tracks = [
            Track(object_id=n, positions=tuple(TrackPosition(time=k, x=0.5, y=n / 10) for k in range(positions // 10)))
            for n in range(10)
        ]
        return lambda: parse_answer(format_tracks(tracks, "ant"))

    for make in (printed, read_back, tracked):
        assert grows_linearly(make, 2_500, 10_000)
