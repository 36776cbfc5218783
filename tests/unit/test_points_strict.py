"""What is accepted strictly, and each reason for which an answer is refused."""

from __future__ import annotations

import pickle
from typing import get_args

import pytest

from molmo2core.errors import DataError
from molmo2core.preprocessing.points_strict import Fault, GrammarError, parse_answer

POINTS = '<points coords="1 1 100 200 2 300 400">cat</points>'

REFUSED: list[tuple[str, Fault, int]] = [
    ("", "sentence", 0),
    ("There are none", "sentence", 0),
    ("there are none.", "sentence", 0),
    ("03", "sentence", 0),
    ("-1", "sentence", 0),
    ("3.", "sentence", 0),
    ("Counting cats", "sentence", 0),
    (f"There are two {POINTS}.", "sentence", 0),
    (f"There are 2 {POINTS}", "sentence", 12 + len(POINTS)),
    (f"Counting the {POINTS} shows 2.", "sentence", 13 + len(POINTS)),
    (f"Counting the {POINTS} shows a total of two.", "sentence", 13 + len(POINTS)),
    ("<point coords=", "tag", 0),
    ("<points>", "tag", 0),
    ("< points coords='", "tag", 0),
    ('<points  coords="1 1 100 200">a</points>', "tag", 0),
    ('<points alt="" coords="1 1 100 200">a</points>', "tag", 0),
    ('<points alt="&lt;&#34;&amp;b" coords="1 1 100 200">a</points>', "tag", 0),
    ('<tracks alt="a" coords="0.0 1 100 200">a</tracks>', "tag", 0),
    ('There are 1 <points alt="a" coords="1 1 100 200">a</points>.', "tag", 12),
    ('There are 1 <tracks coords="0.0 1 100 200">a</tracks>.', "tag", 12),
    ('<points coords="1 1 100 200">a</tracks>', "tag", 30),
    ('<points coords="1 1 100 200">a', "tag", 30),
    ('<points coords="1 1 100 200">a\nb</points>', "tag", 30),
    ('<points coords="1 1 100 200', "coords", 16),
    ('<points coords="">a</points>', "coords", 16),
    ('<points coords="1">a</points>', "coords", 16),
    ('<points coords="1 1 100">a</points>', "coords", 16),
    ('<points coords=" 1 1 100 200">a</points>', "coords", 16),
    ('<points coords="1 1 100 200 ">a</points>', "coords", 16),
    ('<points coords="1  1 100 200">a</points>', "coords", 16),
    ('<points coords="1 1 100 200;">a</points>', "coords", 28),
    ('<points coords="1 1 100 200; 2 2 100 200">a</points>', "coords", 28),
    ('<points coords="0 1 100 200">a</points>', "index", 16),
    ('<points coords="01 1 100 200">a</points>', "index", 16),
    ('<points coords="-1 1 100 200">a</points>', "index", 16),
    ('<points coords="1 1 100 200\t2 2 300 400">a</points>', "triple", 17),
    ('<points coords="0.50 1 100 200">a</points>', "index", 16),
    ('<points coords="00.5 1 100 200">a</points>', "index", 16),
    ('<points coords="1 1 100 200;0.5 2 100 200">a</points>', "index", 28),
    ('<tracks coords="1 1 100 200">a</tracks>', "index", 16),
    ('<points coords="1 1 10 200">a</points>', "triple", 17),
    ('<points coords="1 1 1001 200">a</points>', "triple", 17),
    ('<points coords="1 1 0100 200">a</points>', "triple", 17),
    ('<points coords="1 1 -10 200">a</points>', "triple", 17),
    ('<points coords="1 01 100 200">a</points>', "triple", 17),
    ('<points coords="1 1 100 200 2 30 400">a</points>', "triple", 27),
    ('<points coords="1 2 100 200">a</points>', "number", 17),
    ('<points coords="1 1 100 200 1 300 400">a</points>', "number", 27),
    ('<points coords="1 1 100 200;2 1 300 400">a</points>', "number", 29),
    ('<tracks coords="0.0 2 100 200">a</tracks>', "number", 19),
    ('<tracks coords="0.0 1 300 200 2 100 200">a</tracks>', "number", 29),
    ('<points coords="1 1 300 200 2 100 200">a</points>', "order", 27),
    ('<points coords="1 1 100 200 2 100 100">a</points>', "order", 27),
    ('<points coords="1 1 100 200;1 2 300 400">a</points>', "order", 28),
    ('<points coords="3 1 100 200;1 2 100 200;3 3 100 200">a</points>', "order", 40),
    ('<points coords="1.0 1 100 200;0.5 2 300 400">a</points>', "order", 30),
    ('<tracks coords="0.0 1 100 200 2 300 200;0.5 2 100 200 1 300 200">a</tracks>', "order", 53),
    ('<points coords="1 1 100 200">&lt;&amp;</points>', "label", 29),
    ('<points coords="1 1 100 200">a&#10;&amp;b</points>', "label", 29),
    (f"There are 3 {POINTS}.", "count", 10),
    (f"Counting the {POINTS} shows a total of 1.", "count", 13 + len(POINTS) + 18),
    ("There are none. ", "sentence", 0),
    (f"{POINTS} ", "end", len(POINTS)),
    (f"{POINTS}.", "end", len(POINTS)),
    (f"{POINTS}{POINTS}", "end", len(POINTS)),
    (f"There are 2 {POINTS}.\n", "end", 13 + len(POINTS)),
    (f" {POINTS}", "sentence", 0),
]


@pytest.mark.parametrize(("text", "reason", "position"), REFUSED)
def test_a_refusal_says_why_and_where(text: str, reason: Fault, position: int) -> None:
    with pytest.raises(GrammarError) as refused:
        parse_answer(text)
    assert (refused.value.reason, refused.value.position) == (reason, position), str(refused.value)


def test_every_reason_occurs() -> None:
    assert {reason for _, reason, _ in REFUSED} == set(get_args(Fault))


@pytest.mark.parametrize(
    ("text", "form", "count"),
    [
        ("There are none.", "points", 0),
        ("0", "count", 0),
        ("17", "count", 17),
        (POINTS, "points", 2),
        (f"There are 2 {POINTS}.", "count_then_point", 2),
        (f"Counting the {POINTS} shows a total of 2.", "point_then_count", 2),
        ('<points alt="b" coords="1 1 100 200">a</points>', "points", 1),
        ('<points coords="3 1 100 200;1 2 000 1000">a</points>', "points", 2),
        ('<points coords="1 1 100 200 2 100 200"></points>', "points", 2),
        ('<tracks coords="0.0 1 100 200;0.5 1 300 200 2 100 200">a</tracks>', "points", 3),
    ],
)
def test_what_is_accepted(text: str, form: str, count: int) -> None:
    answer = parse_answer(text)
    assert (answer.form, answer.count) == (form, count)
    assert (answer.tag is None) == ("<" not in text)


def test_a_refusal_crosses_processes() -> None:
    refusal = GrammarError("count", 3, "some answer")
    copy = pickle.loads(pickle.dumps(refusal))
    assert isinstance(copy, DataError) and str(copy) == str(refusal)
    assert (copy.reason, copy.position, copy.text) == ("count", 3, "some answer")
