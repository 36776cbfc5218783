"""The number that an answer states (training_and_evaluation.md 4.3; data.md 6.1 for the sentences)."""

from __future__ import annotations

import re

_NUMBER = r"([0-9]{1,15})(?![0-9])"
_ALONE = re.compile(_NUMBER)
_STATED = (
    re.compile(rf"\btotal of {_NUMBER}"),
    re.compile(rf"\btotal number\b[^\n]{{0,200}}?\bis:? {_NUMBER}"),
    re.compile(rf"\bthere (?:is|are) {_NUMBER}"),
)
_NONE = re.compile(r"\b(?:none|no)\b")


def stated_count(text: str) -> int | None:
    """The number in an answer such as `3`, `... shows a total of 3.`, `There are 3 ...`, `There are none.`

    None when it states none of these, or a number of more than 15 digits, as models do that repeat themselves.  The
    number of points in the answer does not matter here.
    """
    lowered = text.lower().strip()
    if alone := _ALONE.fullmatch(lowered.rstrip(".")):
        return int(alone[1])
    for pattern in _STATED:
        if found := pattern.search(lowered):
            return int(found[1])
    return 0 if says_none(text) else None


def says_none(text: str) -> bool:
    """Whether an answer says that there is nothing to point at."""
    return "<" not in text and bool(_NONE.search(text.lower()))
