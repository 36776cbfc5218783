"""Annotations as conversations, and conversations as the token ids of a branch (model.md 6.3, 6.4; data.md 5).

    <|im_start|>user\\n{style prefix} {question}<|im_end|>\\n<|im_start|>assistant\\n{reply} EOS
    <|im_end|>\\n<|im_start|>user\\n ...                       later turns: the released models know the doubled end

The style prefix of the first user turn depends on the stage:
    demo_or_style_v2        `vqa2: question` for short answers, no prefix for everything a person would type
    style_and_length_v2     `long_caption 37:`, a hint of the reply's length in units of 15 characters
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from molmo2core.annotations import Annotation, Caption, Conversation, Pointing, QuestionAnswer, Tracking
from molmo2core.errors import DataError
from molmo2core.message_tree.tree import Branch, EncodedTurn
from molmo2core.preprocessing import templates
from molmo2core.preprocessing.config import Style
from molmo2core.preprocessing.points import format_points, format_tracks
from molmo2core.special_tokens import CHAT_END, CHAT_START, TextTokenizer

CHARACTERS_PER_LENGTH_UNIT = 15
LENGTH_NOISE_CHARACTERS = 25.0
MAX_LENGTH_NOISE_CHARACTERS = 250
"""Ten standard deviations: never reached, but it makes the number in a prefix bounded (lengths.py)."""
INFERENCE_LENGTH = 65
"""Length hint when there is no reply to measure."""
NO_HINT_PROBABILITY = 0.1


@dataclass(frozen=True, kw_only=True)
class Dialogue:
    """One branch as text."""

    prefix: tuple[str, ...] = ()
    """Style prefix in pieces that are tokenised separately, e.g. ("vqa2", " 3:"); empty: none."""
    messages: tuple[str, ...]
    """User, assistant, user, ...; style prefix left out."""


def reply_of(annotation: Annotation) -> str:
    """What the model has to say last.

    Raises:
        DataError: a multiple-choice answer is none of its options.
    """
    match annotation:
        case Caption():
            return annotation.text
        case QuestionAnswer(options=()):
            return annotation.answer
        case QuestionAnswer():
            if annotation.answer not in annotation.options:
                raise DataError(
                    f"question {annotation.question!r}",
                    found=f"answer {annotation.answer!r}",
                    expected=f"one of the options {annotation.options}",
                )
            return templates.labelled_options(annotation.options)[annotation.options.index(annotation.answer)]
        case Pointing(task="image_counting", points=points) if points:
            tag = format_points(points, annotation.label, "image")
            return f"Counting the {tag} shows a total of {len(points)}."
        case Pointing(task="video_pointing"):
            return format_points(annotation.points, annotation.label, "video")
        case Pointing(task="multi_image_pointing"):
            return format_points(annotation.points, annotation.label, "images")
        case Pointing():
            return format_points(annotation.points, annotation.label, "image")
        case Tracking():
            return format_tracks(annotation.tracks, annotation.label)
        case Conversation():
            return annotation.turns[-1].text


def training_dialogue(annotation: Annotation, style: Style, rng: np.random.Generator) -> Dialogue:
    """A drawn phrasing and prefix, then the reply."""
    reply = reply_of(annotation)
    texts = phrasings(annotation, style)
    prompt = texts[int(rng.integers(len(texts)))]
    length = None
    if style == "style_and_length_v2" and rng.random() >= NO_HINT_PROBABILITY:
        length = hinted_length(len(reply), round(float(rng.normal(0.0, LENGTH_NOISE_CHARACTERS))))
    return Dialogue(
        prefix=style_prefix(templates.style_of(annotation), style, length),
        messages=(prompt, *later_messages(annotation, reply)),
    )


def inference_dialogue(annotation: Annotation, style: Style) -> Dialogue:
    """The first phrasing, and earlier turns of a conversation; the last reply is left out."""
    return Dialogue(
        prefix=style_prefix(templates.style_of(annotation), style, INFERENCE_LENGTH),
        messages=(phrasings(annotation, style)[0], *later_messages(annotation, "")[:-1]),
    )


def phrasings(annotation: Annotation, style: Style) -> tuple[str, ...]:
    """All prompts that `style` may draw, prefix left out."""
    if style == "style_and_length_v2":
        return (templates.bare_phrasing(annotation),)
    return templates.phrasings(annotation)


def style_prefix(name: str, style: Style, length: int | None) -> tuple[str, ...]:
    """Pieces of the prefix of the first user turn; `length` counts only where the style tells it."""
    if style == "demo_or_style_v2":
        return (name, ":") if name in templates.STYLES_WITH_TAG else ()
    if length is None or name in templates.STYLES_WITHOUT_LENGTH:
        return (name, ":")
    return (name, f" {length}:")


def hinted_length(num_characters: int, noise: int) -> int:
    """Length hint of a reply; never below 0, as a negative one tells nothing."""
    noise = max(-MAX_LENGTH_NOISE_CHARACTERS, min(MAX_LENGTH_NOISE_CHARACTERS, noise))
    return max(0, (num_characters + noise) // CHARACTERS_PER_LENGTH_UNIT)


def encode_dialogue(dialogue: Dialogue, task: str, tokenizer: TextTokenizer) -> Branch:
    """Token ids turn by turn; special tokens that people's text spells out stay text."""
    start, end = [tokenizer.token_id(CHAT_START)], [tokenizer.token_id(CHAT_END)]
    newline, assistant = tokenizer.encode_text("\n"), tokenizer.encode_text("assistant\n")
    turns = []
    for number, message in enumerate(dialogue.messages):
        if number % 2:
            turns.append(EncodedTurn(ids=tuple(tokenizer.encode_text(message)), is_reply=True))
            continue
        close_reply = [] if number == 0 else end + newline
        text = encode_user_text(() if number else dialogue.prefix, message, tokenizer)
        ids = [*close_reply, *start, *text, *end, *newline, *start, *assistant]
        turns.append(EncodedTurn(ids=tuple(ids), is_reply=False))
    return Branch(task=task, turns=tuple(turns))


def encode_user_text(prefix: tuple[str, ...], message: str, tokenizer: TextTokenizer) -> list[int]:
    """`user`, the prefix and the message.

    The pieces meet where byte-level pre-tokenisers cut anyway, so the ids are those of the whole text, and the
    longest possible prompt can be bounded piece by piece.
    """
    if not prefix:
        return tokenizer.encode_text(f"user\n{message}")
    name, rest = prefix
    pieces = [f"user\n{name}", rest, *([f" {message}"] if message else [])]
    return [token for piece in pieces for token in tokenizer.encode_text(piece)]


def later_messages(annotation: Annotation, reply: str) -> tuple[str, ...]:
    """Messages after the first user turn, ending with `reply`."""
    earlier = annotation.turns[1:-1] if isinstance(annotation, Conversation) else ()
    return (*(turn.text for turn in earlier), reply)
