"""Multiple choice against data.md 5.4: the standard form, and every draw with its probability."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from molmo2core.preprocessing import choices
from molmo2core.preprocessing.choices import Choice, draw_choice, label, labelled_options, standard_choice

QUESTION = "Which colour is it?"
OPTIONS = ("red", "light blue", "green")
NUM_DRAWS = 6000
LABELS = {alphabet: [label(alphabet, number) for number in range(3)] for alphabet in choices.ALPHABETS}


def text(choice: Choice) -> tuple[str, str]:
    return "".join(choice.prompt), "".join(choice.reply)


@pytest.fixture(scope="module")
def drawn() -> list[tuple[str, str]]:
    rng = np.random.default_rng(0)
    return [text(draw_choice(QUESTION, OPTIONS, 1, rng)) for _ in range(NUM_DRAWS)]


def share(hits: list[bool]) -> float:
    return sum(hits) / len(hits)


def near(value: float, expected: float, draws: int) -> bool:
    """Within four standard deviations."""
    return abs(value - expected) < 4 * (expected * (1 - expected) / draws) ** 0.5


def test_standard_form() -> None:
    prompt, reply = text(standard_choice(QUESTION, OPTIONS, 1))
    assert prompt == f"{QUESTION}\nReply with one of these options only.\nA. red\nB. light blue\nC. green"
    assert reply == "B. light blue"


def test_standard_in_one_of_ten(drawn: list[tuple[str, str]]) -> None:
    standard = text(standard_choice(QUESTION, OPTIONS, 1))
    assert near(share([pair == standard for pair in drawn]), choices.STANDARD_PROBABILITY, NUM_DRAWS)


def kind_of_reply(reply: str) -> str:
    if reply in {labels[1] for labels in LABELS.values()}:
        return "label"
    return "bare" if reply == OPTIONS[1] else "labelled"


def test_replies(drawn: list[tuple[str, str]]) -> None:
    """0.9 x 0.25 labels alone; of the rest 0.2 without labels."""
    kinds = Counter(kind_of_reply(reply) for _, reply in drawn)
    assert near(kinds["label"] / NUM_DRAWS, 0.9 * 0.25, NUM_DRAWS)
    assert near(kinds["bare"] / NUM_DRAWS, 0.9 * 0.75 * 0.2, NUM_DRAWS)


def test_the_reply_can_be_read_off_the_prompt(drawn: list[tuple[str, str]]) -> None:
    """A label alone stands before its option; an option is repeated as it is shown."""
    for prompt, reply in drawn:
        assert all(option in prompt for option in (QUESTION, *OPTIONS))
        before = prompt[: prompt.index("light blue")]
        assert reply in prompt if kind_of_reply(reply) != "label" else reply in before.splitlines()[-1], (prompt, reply)


def test_alphabets_and_markers(drawn: list[tuple[str, str]]) -> None:
    labels = Counter(reply for _, reply in drawn if kind_of_reply(reply) == "label")
    assert set(labels) == {"B", "b", "2", "ii"}
    total = labels.total()
    assert all(near(count / total, 0.25, total) for count in labels.values())
    markers = Counter(reply.removesuffix(" light blue") for _, reply in drawn if kind_of_reply(reply) == "labelled")
    common = {marker.format(labels[1]) for marker in choices.COMMON_MARKERS for labels in LABELS.values()}
    # The standard form's own marker is a common one too.
    total = markers.total()
    standard = 0.1 / (0.1 + 0.9 * 0.75 * 0.8)
    assert near(sum(markers[m] for m in common) / total, standard + (1 - standard) * 0.8, total)
    odd = {marker.format(labels[1]) for marker in choices.ODD_MARKERS for labels in LABELS.values()}
    assert set(markers) == common | odd, "each of 23 markers in each of four alphabets"


def test_lines_bullets_and_separators(drawn: list[tuple[str, str]]) -> None:
    one_line = [any("red" in line and "green" in line for line in prompt.splitlines()) for prompt, _ in drawn]
    assert near(share(one_line), 0.9 * choices.ONE_LINE_PROBABILITY, NUM_DRAWS)
    assert any("red; " in prompt for prompt, _ in drawn) and any("red ||| " in prompt for prompt, _ in drawn)
    bare_lists = [prompt for prompt, reply in drawn if kind_of_reply(reply) == "bare" and "\nlight blue" in prompt]
    bullets = [prompt for prompt, reply in drawn if kind_of_reply(reply) == "bare" and "\nlight blue" not in prompt
               and "red\n" in prompt]  # fmt: skip
    total = len(bare_lists) + len(bullets)
    assert near(len(bullets) / total, choices.BULLET_PROBABILITY, total)
    assert all(any(f"\n{bullet} light blue" in prompt for prompt in bullets) for bullet in choices.BULLETS)


def test_every_template_and_instruction_is_drawn() -> None:
    rng = np.random.default_rng(1)
    prompts = [text(draw_choice("QQ", ("x1", "x2"), 0, rng))[0] for _ in range(30_000)]
    heads = Counter(prompt.partition("QQ")[0] for prompt in prompts)
    assert len(heads) > 100, "layouts that begin with an instruction, and those that begin with the question"
    for instruction in (*choices.LABEL_INSTRUCTIONS, *choices.LABELLED_OPTION_INSTRUCTIONS):
        words = instruction.replace("{name}", "label")
        assert any(words in prompt for prompt in prompts), words


def test_names_of_labels() -> None:
    """0.6 its own name, 0.2 identifier, 0.2 label."""
    rng = np.random.default_rng(2)
    names = Counter(choices._draw_name("roman", rng) for _ in range(NUM_DRAWS))
    for name, expected in (("numeral", 0.6), ("identifier", 0.2), ("label", 0.2)):
        assert near(names[name] / NUM_DRAWS, expected, NUM_DRAWS)


@pytest.mark.parametrize("alphabet", choices.ALPHABETS)
def test_no_alphabet_runs_out(alphabet: choices.Alphabet) -> None:
    """The published one has ten numerals and loses later options (data.md 5.4)."""
    labels = [label(alphabet, number) for number in range(60)]
    assert len(set(labels)) == 60
    expected = {"upper": ("A", "Z", "AA"), "lower": ("a", "z", "aa"), "number": ("1", "26", "27"),
                "roman": ("i", "xxvi", "xxvii")}  # fmt: skip
    assert (labels[0], labels[25], labels[26]) == expected[alphabet]
    rng = np.random.default_rng(0)
    options = tuple(f"option {n}" for n in range(60))
    for _ in range(200):
        prompt, reply = text(draw_choice("Q", options, 59, rng))
        assert all(option in prompt for option in options) and reply


def test_numerals() -> None:
    assert [label("roman", n - 1) for n in (4, 9, 14, 40, 49, 90, 99)] == [
        "iv", "ix", "xiv", "xl", "xlix", "xc", "xcix",
    ]  # fmt: skip


def test_blank_options_have_labels() -> None:
    """Otherwise there would be nothing to say."""
    rng = np.random.default_rng(0)
    for _ in range(300):
        _prompt, reply = text(draw_choice("Q", (" ", "x"), 0, rng))
        assert reply.strip()


def test_labelled_options_are_those_of_the_standard_form() -> None:
    """Evaluation compares answers with them."""
    prompt, reply = text(standard_choice(QUESTION, OPTIONS, 2))
    assert prompt.splitlines()[2:] == labelled_options(OPTIONS)
    assert reply == labelled_options(OPTIONS)[2]
