"""What the printer writes the parsers read back; what the strict one accepts the printer writes; nothing crashes them.

Hypothesis looks for the odd case, and plain seeded draws make the number: 10^4 answers take about a second and 10^5
mutated ones a few, since nothing is shrunk or stored.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import groupby

from hypothesis import given, settings
from hypothesis import strategies as st

from molmo2core.annotations import MediaKind, Point, Track, TrackPosition
from molmo2core.preprocessing.points import (
    NONE,
    ParsedTag,
    ReplyForm,
    format_answer,
    format_points,
    format_tracks,
    parse_points,
    parse_tags,
    parse_tracks,
)
from molmo2core.preprocessing.points_strict import GrammarError, ParsedAnswer, parse_answer

KINDS: tuple[MediaKind, ...] = ("image", "images", "video")
FORMS: tuple[ReplyForm, ...] = ("points", "point_then_count", "count_then_point", "count")
SPECIAL_LABELS = [
    '"', "<", "\n", "&lt;", "</points>", '<points coords="1 1 100 100">', "&", "&#10;", ";", "\r", "&amp", "&amp;lt;",
    "a > b", "R&D", "dog's", "Größe", "猫", "🐈", "\u2028", "\x00", "  ", "There are none.", "</tracks", "&quot;",
    "&gt;", ">", "='\"", "alt=", ' coords="',
]  # fmt: skip
LABELS = st.one_of(st.text(), st.lists(st.sampled_from([*SPECIAL_LABELS, "a"]), max_size=6).map("".join))
FRACTIONS = st.floats(-0.5, 1.5)
TIMES = st.integers(0, 5000).map(lambda tenths: tenths / 10)


def clamped(fraction: float) -> float:
    return min(1000, max(0, round(1000 * fraction))) / 1000


def group_of(point: Point, kind: MediaKind) -> float:
    return {"image": 1.0, "images": float(point.image), "video": float(point.time or 0.0)}[kind]


def check_points(points: Sequence[Point], label: str, kind: MediaKind, images: Sequence[int], alt: str) -> None:
    """Every point comes back in its group, sorted, numbered 1..N, in the order asked for; label and alt too."""
    text = format_points(points, label, kind, images=images, alt=alt)
    order = {float(image): place for place, image in enumerate(images)}
    expected = sorted(
        ((order.get(group_of(p, kind), group_of(p, kind)), group_of(p, kind), clamped(p.x), clamped(p.y)))
        for p in points
    )
    for parsed in (parse_points(text), strictly(text)):
        assert [(p.index, p.x, p.y) for p in parsed] == [found[1:] for found in expected]
        assert [p.object_id for p in parsed] == list(range(1, len(points) + 1))
    assert [(tag.label, tag.alt) for tag in parse_tags(text)] == ([(label, alt)] if points else [])
    assert (text == NONE) == (not points)
    assert "\n" not in text and "\r" not in text


def strictly(text: str) -> list[object]:
    tag = parse_answer(text).tag
    return [] if tag is None else list(tag.points)


def check_tracks(positions: Sequence[Sequence[TrackPosition]], label: str) -> None:
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
    assert strictly(text) == parsed
    assert written_again(text, parse_answer(text)) == text


def written_again(text: str, answer: ParsedAnswer) -> str:
    """The text that the printer makes of what was parsed of `text`."""
    tag = answer.tag
    if tag is None:
        return str(answer.count) if answer.form == "count" else NONE
    kind: MediaKind = "video" if "." in text.partition(' coords="')[2].partition(" ")[0] else "images"
    if tag.name == "tracks":
        return format_tracks(tracks_of(tag), tag.label)
    points = [Point(x=p.x, y=p.y, image=int(p.index), time=p.index) for p in tag.points]
    images = [image for image, _ in groupby(point.image for point in points)] if kind == "images" else []
    if answer.form == "points":
        return format_points(points, tag.label, kind, images=images, alt=tag.alt)
    return format_answer(points, tag.label, kind, form=answer.form, images=images)


def tracks_of(tag: ParsedTag) -> list[Track]:
    positions: dict[int, list[TrackPosition]] = {}
    for p in tag.points:
        positions.setdefault(p.object_id, []).append(TrackPosition(time=p.index, x=p.x, y=p.y))
    return [Track(object_id=number, positions=tuple(found)) for number, found in positions.items()]


points_strategy = st.lists(st.builds(Point, x=FRACTIONS, y=FRACTIONS, image=st.integers(1, 20), time=TIMES))
POSITIONS = st.builds(TrackPosition, time=TIMES, x=FRACTIONS, y=FRACTIONS, visible=st.booleans())


@given(
    points=points_strategy,
    label=LABELS,
    kind=st.sampled_from(KINDS),
    images=st.permutations(range(1, 21)) | st.just(()),
    alt=LABELS,
)
def test_points(points: list[Point], label: str, kind: MediaKind, images: Sequence[int], alt: str) -> None:
    check_points(points, label, kind, images if kind == "images" else (), alt)


@given(
    positions=st.lists(st.lists(POSITIONS, max_size=6, unique_by=lambda p: p.time), max_size=5),
    label=LABELS,
)
def test_tracks(positions: list[list[TrackPosition]], label: str) -> None:
    check_tracks(positions, label)


@given(
    points=st.lists(st.builds(Point, x=FRACTIONS, y=FRACTIONS, image=st.integers(1, 9), time=TIMES), max_size=6),
    label=LABELS,
    kind=st.sampled_from(KINDS),
    form=st.sampled_from(FORMS),
)
def test_sentences(points: list[Point], label: str, kind: MediaKind, form: ReplyForm) -> None:
    """The number stated is the number of points, and the strict parser finds form, number and points again."""
    text = format_answer(points, label, kind, form=form)
    answer = parse_answer(text)
    assert answer.count == len(points)
    assert answer.form == (form if points or form == "count" else "points")
    assert written_again(text, answer) == text


@settings(max_examples=500)
@given(st.text(alphabet='<points tracks coords="0123 ;:,.\t\n/>&-', max_size=80))
def test_parsers_take_any_text(text: str) -> None:
    check_any_text(text)


def check_any_text(text: str) -> bool:
    """A model can say anything: what is found lies in the frame, and what is accepted is what would be printed."""
    for point in parse_points(text) + parse_tracks(text):
        assert 0 <= point.x <= 1 and 0 <= point.y <= 1 and point.index >= 0 and point.object_id >= 0
    try:
        answer = parse_answer(text)
    except GrammarError as refusal:
        assert 0 <= refusal.position <= len(text)
        return False
    assert written_again(text, answer) == text
    return True


def drawn_label(rng: random.Random) -> str:
    return "".join(rng.choice([*SPECIAL_LABELS, "cat", " ", "é"]) for _ in range(rng.randrange(5)))


def drawn_points(rng: random.Random, most: int = 12) -> list[Point]:
    def fraction() -> float:
        return rng.choice([rng.uniform(-0.1, 1.1), rng.randrange(0, 21) / 20, 0.0005 * rng.randrange(2001)])

    return [
        Point(x=fraction(), y=fraction(), image=rng.randrange(1, 8), time=rng.randrange(0, 400) / 10)
        for _ in range(rng.randrange(most))
    ]


def drawn_tracks(rng: random.Random) -> list[list[TrackPosition]]:
    return [
        [
            TrackPosition(time=tenths / 10, x=rng.random(), y=rng.random(), visible=rng.random() < 0.8)
            for tenths in sorted(rng.sample(range(100), rng.randrange(1, 6)))
        ]
        for _ in range(rng.randrange(5))
    ]


def test_ten_thousand_answers_come_back() -> None:
    """extract(format(points)) == rounded points, in the order printed."""
    rng = random.Random(0)
    shuffled = list(range(1, 8))
    for number in range(10_000):
        if number % 4 == 3:
            check_tracks(drawn_tracks(rng), drawn_label(rng))
            continue
        kind = KINDS[number % 4]
        rng.shuffle(shuffled)
        images = shuffled if kind == "images" and rng.random() < 0.5 else ()
        check_points(drawn_points(rng), drawn_label(rng), kind, images, drawn_label(rng) if number % 3 == 0 else "")


def valid_answers(rng: random.Random) -> Iterator[str]:
    while True:
        kind = rng.choice(KINDS)
        yield format_answer(drawn_points(rng, 5), drawn_label(rng), kind, form=rng.choice(FORMS))
        yield format_points(drawn_points(rng, 5), drawn_label(rng), kind, alt=drawn_label(rng))
        tracks = [Track(object_id=n, positions=tuple(p)) for n, p in enumerate(drawn_tracks(rng))]
        yield format_tracks(tracks, drawn_label(rng))
        yield f'<point x="{rng.uniform(0, 110):.1f}" y="{rng.uniform(0, 110):.1f}" alt="a">{drawn_label(rng)}</point>'


FRAGMENTS = [
    *SPECIAL_LABELS, "<points", "<tracks", "<point ", 'coords="', "alt=", "</points>", "/>", ";", "\t", " ", "  ", "\n",
    ":", ",", ".", "-", "0", "1", "000", "1000", "1001", "999999999999", "1e5", "0.5", "x=", "x1=", "y1=", "t1=", "٣",
    "\ud800", "There are ", "Counting the ", " shows a total of ", "1 1 100 200", '"', "'", "%", "nan", "inf",
]  # fmt: skip


def mutated(text: str, rng: random.Random) -> str:
    for _ in range(rng.randrange(1, 5)):
        start = rng.randrange(len(text) + 1)
        stop = min(len(text), start + rng.choice([0, 1, 1, 2, 5, 20]))
        what = rng.randrange(6)
        if what == 0:
            text = text[:start]  # cut short, as by a limit on tokens
        elif what == 1:
            text = text[:start] + text[stop:]
        elif what == 2:
            text = text[:stop] + text[start:]
        else:
            text = text[:start] + rng.choice(FRAGMENTS) + text[stop if what == 3 else start :]
    return text


def test_a_hundred_thousand_mutations_and_inventions() -> None:
    """No crash, nothing outside the frame; enough of them are still answers for the test to mean something."""
    rng = random.Random(1)
    answers, accepted, with_points = valid_answers(rng), 0, 0
    for number in range(100_000):
        if number % 5:
            text = mutated(next(answers), rng)
        else:
            text = "".join(rng.choice(FRAGMENTS) for _ in range(rng.randrange(30)))
        accepted += check_any_text(text)
        with_points += bool(parse_tags(text))
    assert accepted > 1000 and with_points > 30_000, (accepted, with_points)
