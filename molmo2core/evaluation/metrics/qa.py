"""Short answers, multiple choice and free text (training_and_evaluation.md 4.11)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from molmo2core.preprocessing.choices import labelled_options


def clean_answer(text: str) -> str:
    """What an answer says: after "Answer:" if that occurs, else the most frequent line; spaces squeezed."""
    _, marker, after = text.partition("Answer:")
    lines = [" ".join(line.split()) for line in (after if marker else text).strip().splitlines()]
    spoken = [line for line in lines if line]
    if not spoken:
        return ""
    return spoken[0] if marker else Counter(spoken).most_common(1)[0][0]


def matches_exactly(prediction: str, answer: str) -> bool:
    """Whether both say the same, apart from case, spaces and punctuation at the ends."""
    return _normalised(clean_answer(prediction)) == _normalised(answer)


def select_option(prediction: str, options: Sequence[str]) -> int | None:
    """The option that a multiple-choice answer means; None only when it is empty.

    Options are compared with their letters ("A. text"), as they were shown.  In order: the same text, with or without
    letter; the only option that the answer begins with; the only one that begins with the answer; the only one that
    contains it; else the one at the smallest edit distance, first on ties.
    """
    said = _normalised(clean_answer(prediction))
    if not said:
        return None
    bare = [_normalised(option) for option in options]
    shown = [_normalised(option) for option in labelled_options(tuple(options))]
    rules = (
        [said in pair for pair in zip(shown, bare, strict=True)],
        [said.startswith(option) for option in shown],
        [option.startswith(said) for option in shown],
        [said in option for option in shown],
    )
    for chosen in rules:
        if sum(chosen) == 1:
            return chosen.index(True)
    distances = [edit_distance(said, option) for option in shown]
    return distances.index(min(distances))


def word_f1(prediction: str, reference: str) -> float:
    """F1 of the two bags of lower-cased words: cheap, blind to order, and no judge of quality."""
    said, meant = Counter(_words(prediction)), Counter(_words(reference))
    common = (said & meant).total()
    if common == 0:
        return float(not said and not meant)
    return 2 * common / (said.total() + meant.total())


def edit_distance(a: str, b: str) -> int:
    """Fewest insertions, deletions and substitutions that turn `a` into `b` (Levenshtein)."""
    previous = list(range(len(b) + 1))
    for row, left in enumerate(a, start=1):
        current = [row]
        for column, right in enumerate(b, start=1):
            current.append(min(previous[column] + 1, current[-1] + 1, previous[column - 1] + (left != right)))
        previous = current
    return previous[-1]


def _normalised(text: str) -> str:
    return " ".join(text.lower().split()).strip(" .,!?;:'\"")


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())
