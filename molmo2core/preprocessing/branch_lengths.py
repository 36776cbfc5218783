"""Upper bounds of what a branch adds to a sequence, over everything that training may draw (see lengths.py).

Texts are made of pieces that are tokenised one by one (templates.py), so the longest draw is found piece by piece and
not by writing out every draw.  Where a draw only leaves out or renumbers points (a part of an image set, a later start
of a track), it is taken for granted that a number with fewer digits takes no more tokens, and `There are none.` no more
than a tag.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Sequence

from molmo2core.annotations import Annotation, QuestionAnswer, Tracking
from molmo2core.preprocessing import wording
from molmo2core.preprocessing.chat import earlier_messages, encode_prompt, has_drawn_options
from molmo2core.preprocessing.choices import (
    ALPHABETS,
    BULLETS,
    COMMON_MARKERS,
    ODD_MARKERS,
    SEPARATORS,
    choice_templates,
    label,
)
from molmo2core.preprocessing.config import STYLES, Style
from molmo2core.preprocessing.styles import (
    MAX_LENGTH_NOISE_CHARACTERS,
    STYLES_WITHOUT_LENGTH,
    hinted_length,
    style_of,
    style_prefix,
)
from molmo2core.preprocessing.templates import Family, Fields, Pieces, Slot, cut
from molmo2core.preprocessing.tracking import num_queries
from molmo2core.special_tokens import TextTokenizer

Counter = Callable[[str], int]
"""Number of tokens of a text."""

_USER = "user\n"
_DIGIT = re.compile("[0-9]")
_MARKERS = COMMON_MARKERS + ODD_MARKERS
_CACHED_CHARACTERS = 64


def annotation_tokens_bounds(annotation: Annotation, tokenizer: TextTokenizer, num_images: int = 1) -> tuple[int, ...]:
    """Most tokens that a branch of `annotation` adds to a sequence, for each of config.STYLES.

    The EOS that ends the branch is only a target and not counted.

    Args:
        annotation: any.
        tokenizer: of the model.
        num_images: in the medium.

    Raises:
        DataError: a multiple-choice answer is none of its options, or a number is not finite.
    """
    count = _counter(tokenizer)
    reply = wording.reply(annotation)
    reply_tokens = _tokens(reply, count)
    frame = len(encode_prompt((), tokenizer, is_first=True)) - count(_USER) + _earlier_tokens(annotation, tokenizer)
    bounds = []
    for style in STYLES:
        prefix = _prefix_tokens(annotation, style, sum(map(len, reply)), count)
        before = " " if prefix else _USER
        if isinstance(annotation, QuestionAnswer) and has_drawn_options(annotation, style):
            text = _choice_tokens(annotation, before, tokenizer)
        else:
            text = _prompt_tokens(annotation, style, num_images, before, tokenizer) + reply_tokens
        bounds.append(frame + prefix + text)
    return tuple(bounds)


def _earlier_tokens(annotation: Annotation, tokenizer: TextTokenizer) -> int:
    """Of the messages between the first prompt and the last reply; each reply among them is closed by an EOS."""
    count, total = _counter(tokenizer), 0
    for number, message in enumerate(earlier_messages(annotation)):
        is_reply = number % 2 == 0
        total += _tokens(message, count) + 1 if is_reply else len(encode_prompt(message, tokenizer, is_first=False))
    return total


def _prefix_tokens(annotation: Annotation, style: Style, reply_characters: int, count: Counter) -> int:
    """Longest style prefix that training can draw, with the `user` before it; 0 when there is none."""
    name = style_of(annotation)
    prefix = style_prefix(name, style, None)
    if not prefix:
        return 0
    hints = [prefix[1]]
    if style == "style_and_length_v2" and name not in STYLES_WITHOUT_LENGTH:
        noise = MAX_LENGTH_NOISE_CHARACTERS
        shortest, longest = (hinted_length(reply_characters, n) for n in (-noise, noise))
        hints += [style_prefix(name, style, length)[1] for length in range(shortest, longest + 1)]
    return count(f"{_USER}{name}") + max(map(count, hints))


def _prompt_tokens(annotation: Annotation, style: Style, num_images: int, before: str, tokenizer: TextTokenizer) -> int:
    """Longest filled template; `before` is what its first piece is joined to."""
    return max(
        _filled_tokens(way.family, way.fields, before, tokenizer)
        for selection in _longest_selections(annotation, style, num_images)
        for way in wording.wordings(annotation, style, selection)
    )


def _longest_selections(annotation: Annotation, style: Style, num_images: int) -> Iterator[wording.Selection]:
    """Of all that `wording.draw_selection` may draw, those with the longest prompts."""
    yield wording.EVERYTHING
    if style != "demo_or_style_v2":
        return
    if wording.is_divisible(annotation) and num_images > 1:
        yield wording.Selection(images=tuple(range(1, num_images + 1)))
    if isinstance(annotation, Tracking) and annotation.form == "single_point":
        shown = range(num_queries(annotation))
        # Of texts that differ in the values of digits only, one is enough; a longer text may have fewer tokens.
        forms = {_DIGIT.sub("0", wording.query_text(annotation, query)): query for query in shown}
        yield from (wording.Selection(query=query) for query in forms.values())


def _filled_tokens(family: Family, fields: Fields, before: str, tokenizer: TextTokenizer) -> int:
    """Tokens of the template of `family` that is longest with these fields."""
    count = _counter(tokenizer)
    return max(
        fixed + sum(_tokens(slot.filled(fields[slot.name]), count) for slot in slots)
        for fixed, slots in _outlines(family, before, tokenizer)
    )


def _choice_tokens(question: QuestionAnswer, before: str, tokenizer: TextTokenizer) -> int:
    """Longest prompt and longest reply of `choices.draw_choice`."""
    count, options = _counter(tokenizer), question.options
    layouts = _outlines(choice_templates(), before, tokenizer)
    asked = max(
        fixed + sum(_tokens(slot.filled(question.question), count) for slot in slots if slot.name == "question")
        for fixed, slots in layouts
    )
    behind = {slot.after for _, slots in layouts for slot in slots if slot.name == "options"}
    shown = max(_options_tokens(options, separator, behind, tokenizer) for separator in ("\n", *SEPARATORS))
    right = wording.right_option(question)
    marked = _marker_tokens(right, tokenizer) + count(f" {options[right]}")
    return asked + shown + max(marked, count(options[right]))


def _options_tokens(options: Sequence[str], separator: str, behind: set[str], tokenizer: TextTokenizer) -> int:
    """Longest way to show all options: with the longest markers, or bare; `behind`: what may follow the last one."""
    count, is_apart = _counter(tokenizer), separator.startswith(" ")
    ends = [{"" if is_apart else separator}] * (len(options) - 1) + [behind]
    between = count(separator) * (len(options) - 1) if is_apart else 0
    texts, spaced = (
        sum(
            max(count(f"{space}{text}{end}") for end in set_of_ends)
            for text, set_of_ends in zip(options, ends, strict=True)
        )
        for space in ("", " ")
    )
    return between + max(texts, spaced + _all_markers_tokens(len(options), tokenizer))


@functools.lru_cache(maxsize=1024)
def _all_markers_tokens(num_options: int, tokenizer: TextTokenizer) -> int:
    """Most tokens of what stands before so many options."""
    count = _counter(tokenizer)
    drawn = [
        [marker.format(label(alphabet, n)) for n in range(num_options)] for marker in _MARKERS for alphabet in ALPHABETS
    ]
    drawn += [[bullet] * num_options for bullet in BULLETS]
    return max(sum(max(count(marker), count(f" {marker}")) for marker in markers) for markers in drawn)


@functools.lru_cache(maxsize=1024)
def _marker_tokens(number: int, tokenizer: TextTokenizer) -> int:
    """Most tokens of the marker of one option in a reply, or of its label alone."""
    return max(_counter(tokenizer)(marker.format(label(a, number))) for marker in ("{}", *_MARKERS) for a in ALPHABETS)


@functools.lru_cache(maxsize=256)
def _outlines(family: Family, before: str, tokenizer: TextTokenizer) -> tuple[tuple[int, tuple[Slot, ...]], ...]:
    """What matters of the templates of a family: (tokens outside of slots, slots), the longest for equal slots."""
    count = _counter(tokenizer)
    longest: dict[tuple[Slot, ...], int] = {}
    for template in family:
        first, *others = cut(template) or ("",)
        joined = before if template or before == _USER else ""  # a prefix without a text is followed by nothing
        parts = [joined + first if isinstance(first, str) else dataclasses.replace(first, before=joined + first.before)]
        parts += others
        slots = tuple(part for part in parts if isinstance(part, Slot))
        fixed = sum(count(part) for part in parts if isinstance(part, str))
        longest[slots] = max(fixed, longest.get(slots, 0))
    return tuple((fixed, slots) for slots, fixed in longest.items())


def _tokens(pieces: Pieces, count: Counter) -> int:
    return sum(map(count, pieces))


@functools.lru_cache(maxsize=8)
def _counter(tokenizer: TextTokenizer) -> Counter:
    """Counts tokens; remembers short texts, which are mostly parts of templates."""

    @functools.lru_cache(maxsize=2**16)
    def count_short(text: str) -> int:
        return len(tokenizer.encode_text(text))

    def count(text: str) -> int:
        return count_short(text) if len(text) <= _CACHED_CHARACTERS else len(tokenizer.encode_text(text))

    return count
