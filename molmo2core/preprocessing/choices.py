"""Multiple-choice questions as text: one standard form, and the forms that training draws (data.md 5.4).

    standard    Which colour?                               at evaluation always, in training one time in ten
                Reply with one of these options only.
                A. red
                B. blue                                     reply: A. red
    drawn       everything apart from each other: labels or none, their alphabet and marker, one line or several,
                bullets, which instruction stands where, whether the label alone or the whole option is the reply

An option that is labelled is two pieces, marker and text, so that bounds need not try all combinations.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from molmo2core.preprocessing.templates import Family, Pieces, fill

STANDARD_PROBABILITY = 0.1
LABEL_ALONE_PROBABILITY = 0.25
LABELLED_PROBABILITY = 0.8
COMMON_MARKER_PROBABILITY = 0.8
ONE_LINE_PROBABILITY = 0.1
BULLET_PROBABILITY = 0.5
INSTRUCTION_PROBABILITY = 0.5
"""An instruction in a layout; otherwise a template that holds its own."""
OWN_NAME_PROBABILITY, IDENTIFIER_PROBABILITY = 0.6, 0.2
"""A label is called by its own name (`letter`, `number`, `numeral`); or `identifier`; or `label`."""

Alphabet = Literal["upper", "lower", "number", "roman"]
ALPHABETS: tuple[Alphabet, ...] = ("upper", "lower", "number", "roman")
OWN_NAMES: dict[Alphabet, str] = {"upper": "letter", "lower": "letter", "number": "number", "roman": "numeral"}
NAMES = (*sorted(set(OWN_NAMES.values())), "identifier", "label")
COMMON_MARKERS: Family = ("{}.", "{})", "{}:", "({})")
ODD_MARKERS: Family = (
    "[{}]", "<{}>", "{} -", "{} =", "{} |", "{}/", "{} >", "-{}-", "*{}*", "#{}", "'{}'", "{};", "{},", "{}.)", "{}]",
    "Option {}:", "Choice {}:", "{} )", "={}=",
)  # fmt: skip
BULLETS: Family = ("-", "*", "+", "•", "◦", "–", "·", "»", "→", "○")
SEPARATORS: Family = (";", " |||", "")
"""Between options on one line; each option that follows begins with a space."""

STANDARD = "{question}\nReply with one of these options only.\n{options}"

LABEL_INSTRUCTIONS: Family = (
    "Reply with the {name} of the right option.",
    "Reply with the {name} only.",
    "Give only the {name} of the answer.",
    "Answer with the {name} of your choice.",
    "State the {name} of the correct option.",
    "Which {name} is right? Say only that.",
    "Respond with one {name}.",
    "Your answer is one {name} and nothing else.",
    "Pick an option and give its {name}.",
    "Write down the {name} of the best option.",
    "Only the {name}, please.",
    "The reply is to be a single {name}.",
    "Choose, and return the {name}.",
    "Name the right option by its {name}.",
    "Do not repeat the option, give its {name}.",
    "Say which {name} stands before the right answer.",
)
OPTION_INSTRUCTIONS: Family = (
    "Reply with one of the options.",
    "Give the right option in full.",
    "Answer by repeating the correct option.",
    "Choose one of the options and write it out.",
    "Pick the best option.",
    "Select the option that fits.",
    "Return the correct option word for word.",
    "Your answer is one of the options, nothing else.",
    "Which of these is right? Repeat it.",
    "Copy the option that answers the question.",
    "State the right option.",
    "Decide for one option and say it.",
    "Only one option is right. Which?",
    "Answer with the text of one option.",
)
LABELLED_OPTION_INSTRUCTIONS: Family = (
    *OPTION_INSTRUCTIONS,
    "Reply with the {name} and the text of the right option.",
    "Give the correct option together with its {name}.",
)
LAYOUTS: Family = (
    "{question}\n{instruction}\n{options}",
    "{question}\n{options}\n{instruction}",
    "{instruction}\n{question}\n{options}",
    "{question} {instruction}\n{options}",
    "{instruction} {question}\n{options}",
    "{question}\n\n{options}\n\n{instruction}",
    "{question}\nOptions:\n{options}\n{instruction}",
    "Question: {question}\n{options}\n{instruction}",
    "Question: {question}\nOptions:\n{options}\n{instruction}",
    "Question: {question}\n{instruction}\nOptions:\n{options}",
    "{instruction}\nQuestion: {question}\nOptions:\n{options}",
    "Q: {question}\n{options}\n{instruction}",
    "{question}\nChoices:\n{options}\n{instruction}",
    "{instruction}\n\n{question}\n\n{options}",
    "{question}\nPossible answers:\n{options}\n{instruction}",
)
LABEL_TEMPLATES: Family = (
    "{question}\n{options}\nThe {name} of the right option is",
    "{question}\n{options}\n{name}:",
    "{question} Choose a {name}.\n{options}",
    "{question} (one {name})\n{options}",
    "Which {name}? {question}\n{options}",
    "Find the {name} of the answer. {question}\n{options}",
    "{question}\nOptions:\n{options}\nAnswer ({name}):",
    "Test question, answered by {name}: {question}\n{options}",
    "{question} Answer with the {name} from this list.\n{options}",
)
OPTION_TEMPLATES: Family = (
    "{question}\n{options}",
    "{question}\nOptions:\n{options}",
    "{question}\nChoices:\n{options}",
    "{question} Choose one:\n{options}",
    "{question} Choose from these:\n{options}",
    "{question} Select one of:\n{options}",
    "{question}\n{options}\nAnswer:",
    "{question}\nOptions:\n{options}\nAnswer:",
    "Question: {question}\n{options}\nAnswer:",
    "Question: {question}\nOptions:\n{options}\nAnswer:",
    "Q: {question}\n{options}\nA:",
    "{question}\nIs it one of these?\n{options}\nWhich?",
    "{question}\nThe candidates are:\n{options}",
    "One of the following is right. {question}\n{options}",
    "Pick the right answer. {question}\n{options}",
    "Here is a question with several answers. {question}\n{options}",
    "Which of the options answers this question? {question}\n{options}",
    "{question}\nYou may choose between:\n{options}",
    "Multiple choice: {question}\n{options}",
)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A multiple-choice question as it is asked, and the reply."""

    prompt: Pieces
    reply: Pieces


def standard_choice(question: str, options: Sequence[str], answer: int) -> Choice:
    """The form that evaluation asks in."""
    markers = [f"{label('upper', number)}." for number in range(len(options))]
    return Choice(
        prompt=fill(STANDARD, {"question": question, "options": options_block(options, markers, "\n")}),
        reply=_option(options[answer], markers[answer]),
    )


def draw_choice(question: str, options: Sequence[str], answer: int, rng: np.random.Generator) -> Choice:
    """A form for training.

    Args:
        question: asked.
        options: two or more.
        answer: which of them is right, from 0.
        rng: every decision is one draw from it.
    """
    if rng.random() < STANDARD_PROBABILITY:
        return standard_choice(question, options, answer)
    label_alone = rng.random() < LABEL_ALONE_PROBABILITY
    # An option without text could be neither shown nor said without its label.
    is_labelled = rng.random() < LABELLED_PROBABILITY or label_alone or not all(map(str.strip, options))
    alphabet = ALPHABETS[int(rng.integers(len(ALPHABETS)))]
    marker = _draw(COMMON_MARKERS if rng.random() < COMMON_MARKER_PROBABILITY else ODD_MARKERS, rng)
    bullet = _draw(BULLETS, rng) if rng.random() < BULLET_PROBABILITY else ""
    separator = "\n"
    if rng.random() < ONE_LINE_PROBABILITY:
        # Without labels, bullets and separators nobody could tell where an option ends.
        separator, bullet = _draw(SEPARATORS if is_labelled else SEPARATORS[:2], rng), ""
    labels = [label(alphabet, number) for number in range(len(options))]
    markers = [marker.format(name) if is_labelled else bullet for name in labels]
    template = _draw_template(label_alone, is_labelled, rng)
    block = options_block(options, markers, separator)
    prompt = fill(template, {"question": question, "options": block, "name": _draw_name(alphabet, rng)})
    if label_alone:
        return Choice(prompt=prompt, reply=(labels[answer],))
    return Choice(prompt=prompt, reply=_option(options[answer], markers[answer] if is_labelled else ""))


@functools.cache
def choice_templates() -> Family:
    """Every template that is filled, instructions in their layouts and labels called by all their names."""
    instructions = (*LABEL_INSTRUCTIONS, *LABELLED_OPTION_INSTRUCTIONS)
    in_layouts = (layout.replace("{instruction}", text) for layout in LAYOUTS for text in instructions)
    unnamed = (STANDARD, *LABEL_TEMPLATES, *OPTION_TEMPLATES, *in_layouts)
    return tuple(dict.fromkeys(template.replace("{name}", name) for template in unnamed for name in NAMES))


def label(alphabet: Alphabet, number: int) -> str:
    """Label of the option `number`, from 0; no alphabet ever runs out."""
    match alphabet:
        case "upper":
            return _letters(number)
        case "lower":
            return _letters(number).lower()
        case "number":
            return str(number + 1)
        case "roman":
            return _roman(number + 1)


def labelled_options(options: Sequence[str]) -> list[str]:
    """`A. text` lines of the standard form."""
    return [f"{label('upper', number)}. {text}" for number, text in enumerate(options)]


def _draw(family: Family, rng: np.random.Generator) -> str:
    return family[int(rng.integers(len(family)))]


def _draw_template(label_alone: bool, is_labelled: bool, rng: np.random.Generator) -> str:
    if rng.random() >= INSTRUCTION_PROBABILITY:
        return _draw(LABEL_TEMPLATES if label_alone else OPTION_TEMPLATES, rng)
    with_label = LABELLED_OPTION_INSTRUCTIONS if is_labelled else OPTION_INSTRUCTIONS
    instruction = _draw(LABEL_INSTRUCTIONS if label_alone else with_label, rng)
    return _draw(LAYOUTS, rng).replace("{instruction}", instruction)


def _draw_name(alphabet: Alphabet, rng: np.random.Generator) -> str:
    draw = rng.random()
    if draw < OWN_NAME_PROBABILITY:
        return OWN_NAMES[alphabet]
    identifier, name = NAMES[-2:]
    return identifier if draw < OWN_NAME_PROBABILITY + IDENTIFIER_PROBABILITY else name


def options_block(options: Sequence[str], markers: Sequence[str], separator: str) -> Pieces:
    """All options behind their markers (or none); the separator closes all but the last."""
    pieces: list[str] = []
    for number, (text, marker) in enumerate(zip(options, markers, strict=True)):
        shown = list(_option(text, marker))
        if number and separator != "\n":
            shown[0] = f" {shown[0]}"
        if number < len(options) - 1:
            if separator.startswith(" "):
                shown.append(separator)
            else:
                shown[-1] += separator
        pieces += shown
    return tuple(pieces)


def _option(text: str, marker: str) -> Pieces:
    return (marker, f" {text}") if marker else (text,)


def _letters(number: int) -> str:
    """A .. Z, AA, AB, ..."""
    ahead, last = divmod(number, 26)
    return (_letters(ahead - 1) if ahead else "") + chr(ord("A") + last)


def _roman(number: int) -> str:
    """i, ii, iii, iv, ..."""
    signs = ((1000, "m"), (900, "cm"), (500, "d"), (400, "cd"), (100, "c"), (90, "xc"), (50, "l"), (40, "xl"),
             (10, "x"), (9, "ix"), (5, "v"), (4, "iv"), (1, "i"))  # fmt: skip
    text = ""
    for value, sign in signs:
        text, number = text + sign * (number // value), number % value
    return text
