"""Answers, options, word overlap and stated numbers: the rules of training_and_evaluation.md 4.11, case by case."""

from __future__ import annotations

import pytest

from molmo2core.evaluation.metrics.counting import says_none, stated_count
from molmo2core.evaluation.metrics.qa import clean_answer, edit_distance, matches_exactly, select_option, word_f1

OPTIONS = ("red", "dark red", "blue", "green")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("  a   red\tcircle ", "a red circle"),
        ("I think so.\nAnswer: blue", "blue"),
        ("Answer: blue\nbecause", "blue"),
        ("red\nblue\nblue", "blue"),
        ("red\nblue", "red"),  # a tie goes to the first
        ("", ""),
        ("Answer:", ""),
    ],
)
def test_clean_answer(text: str, said: str) -> None:
    assert clean_answer(text) == said


@pytest.mark.parametrize(
    ("prediction", "answer", "right"),
    [
        ("Red.", "red", True),
        ("red circle", "red", False),
        ("", "red", False),
        ("RED", " red ", True),
        ("2", "12", False),
    ],
)
def test_exact_match_ignores_case_and_edges_only(prediction: str, answer: str, right: bool) -> None:
    assert matches_exactly(prediction, answer) is right


@pytest.mark.parametrize(
    ("prediction", "chosen"),
    [
        ("A. red", 0),
        ("B. dark red", 1),
        ("red", 0),  # not "dark red", which also contains it
        ("b", 1),
        ("C.", 2),
        ("C. blue, I am sure", 2),
        ("blu", 2),  # contained in one option
        ("C. blew", 2),  # nearest by edits
        ("", None),
        ("\n", None),
    ],
)
def test_select_option(prediction: str, chosen: int | None) -> None:
    assert select_option(prediction, OPTIONS) == chosen


def test_a_prefix_shared_by_two_options_selects_neither_at_once() -> None:
    """Would catch taking the first option that matches instead of the only one."""
    assert select_option("3 re", ("13 red circles", "3 red squares")) == 1
    assert select_option("red", ("red circle", "red")) == 1


@pytest.mark.parametrize(
    ("a", "b", "distance"), [("", "", 0), ("kitten", "sitting", 3), ("", "abc", 3), ("flaw", "lawn", 2)]
)
def test_edit_distance(a: str, b: str, distance: int) -> None:
    assert edit_distance(a, b) == distance


def test_word_f1() -> None:
    assert word_f1("a red circle", "A red circle.") == 1.0
    assert word_f1("red red red", "red") == pytest.approx(0.5)  # repeating a word does not help
    assert word_f1("blue", "red") == 0.0
    assert word_f1("", "red") == 0.0
    assert word_f1("", "") == 1.0


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("3", 3),
        (" 12. ", 12),
        ('Counting the <points coords="1 1 100 100 2 200 200">x</points> shows a total of 2.', 2),
        ("The total number of cats is: 7.", 7),
        ("There are 4 red circles.", 4),
        ("There is 1 circle.", 1),
        ("There are none.", 0),
        ("many", None),
        ("", None),
        ('<points coords="1 1 100 100">no circle</points>', None),  # a label is no statement
        ("²", None),  # a digit to Python, no number
    ],
)
def test_stated_count(text: str, count: int | None) -> None:
    assert stated_count(text) == count


def test_says_none_reads_words_not_letters() -> None:
    assert says_none("There are none.")
    assert not says_none("nonesuch")
    assert not says_none("")
