"""Annotations as conversations, and conversations as the token ids of a branch (model.md 6.3, 6.4; data.md 5).

    <|im_start|>user\\n{style prefix} {question}<|im_end|>\\n<|im_start|>assistant\\n{reply} EOS
    <|im_end|>\\n<|im_start|>user\\n ...                       later turns: the released models know the doubled end

How a question is worded is settled in wording.py, its style prefix in styles.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from molmo2core.annotations import Annotation, Conversation, QuestionAnswer
from molmo2core.message_tree.tree import Branch, EncodedTurn
from molmo2core.preprocessing import wording
from molmo2core.preprocessing.choices import draw_choice
from molmo2core.preprocessing.config import Style
from molmo2core.preprocessing.styles import INFERENCE_LENGTH, draw_length, inference_style, style_of, style_prefix
from molmo2core.preprocessing.templates import Pieces, fill
from molmo2core.special_tokens import CHAT_END, CHAT_START, TextTokenizer


@dataclass(frozen=True, kw_only=True)
class Dialogue:
    """One branch as text: user, assistant, user, ...; each in the pieces that are tokenised one by one."""

    messages: tuple[Pieces, ...]

    @property
    def texts(self) -> tuple[str, ...]:
        """The messages in one piece each."""
        return tuple("".join(message) for message in self.messages)


def reply_of(annotation: Annotation) -> str:
    """What the model has to say last when it is evaluated.

    Raises:
        DataError: a multiple-choice answer is none of its options.
    """
    return "".join(wording.reply(annotation))


def training_dialogue(annotation: Annotation, style: Style, rng: np.random.Generator, num_images: int = 1) -> Dialogue:
    """A drawn phrasing and prefix, then the reply.

    Args:
        annotation: what is asked and answered.
        style: of the training stage.
        rng: every decision is a draw from it.
        num_images: in the medium; a prompt may be about some of them.

    Raises:
        DataError: a multiple-choice answer is none of its options.
    """
    if has_drawn_options(annotation, style):
        assert isinstance(annotation, QuestionAnswer)
        choice = draw_choice(annotation.question, annotation.options, wording.right_option(annotation), rng)
        prompt, reply = choice.prompt, choice.reply
    else:
        selection = wording.draw_selection(annotation, style, num_images, rng)
        prompt = _draw_prompt(wording.wordings(annotation, style, selection), rng)
        reply = wording.reply(annotation, selection)
    length = draw_length(sum(map(len, reply)), rng) if style == "style_and_length_v2" else None
    prefix = style_prefix(style_of(annotation), style, length)
    return Dialogue(messages=(opening(prefix, prompt), *earlier_messages(annotation), reply))


def inference_dialogue(annotation: Annotation, style: Style) -> Dialogue:
    """The first phrasing, and earlier turns of a conversation; the last reply is left out."""
    first = wording.wordings(annotation, style)[0]
    prefix = style_prefix(inference_style(style_of(annotation)), style, INFERENCE_LENGTH)
    prompt = fill(first.family[0], first.fields)
    return Dialogue(messages=(opening(prefix, prompt), *earlier_messages(annotation)))


def has_drawn_options(annotation: Annotation, style: Style) -> bool:
    """Whether training draws the form of a multiple-choice question."""
    return (
        style == "demo_or_style_v2"
        and isinstance(annotation, QuestionAnswer)
        and bool(annotation.options)
        and not annotation.explanation
    )


def opening(prefix: Pieces, prompt: Pieces) -> Pieces:
    """The first user text: prefix and prompt with a space between them, as far as they are there."""
    return (*prefix, f" {prompt[0]}", *prompt[1:]) if prefix and prompt else prefix + prompt


def encode_dialogue(dialogue: Dialogue, task: str, tokenizer: TextTokenizer) -> Branch:
    """Token ids turn by turn; special tokens that people's text spells out stay text."""
    turns = []
    for number, message in enumerate(dialogue.messages):
        is_reply = number % 2 == 1
        ids = encode_pieces(message, tokenizer) if is_reply else encode_prompt(message, tokenizer, is_first=number == 0)
        turns.append(EncodedTurn(ids=tuple(ids), is_reply=is_reply))
    return Branch(task=task, turns=tuple(turns))


def encode_prompt(message: Pieces, tokenizer: TextTokenizer, *, is_first: bool) -> list[int]:
    """A user text between its tokens, up to where the reply begins; a later one closes the reply before it."""
    start, end = [tokenizer.token_id(CHAT_START)], [tokenizer.token_id(CHAT_END)]
    newline, assistant = tokenizer.encode_text("\n"), tokenizer.encode_text("assistant\n")
    first, *others = message or ("",)
    text = encode_pieces((f"user\n{first}", *others), tokenizer)
    return [*([] if is_first else end + newline), *start, *text, *end, *newline, *start, *assistant]


def encode_pieces(pieces: Pieces, tokenizer: TextTokenizer) -> list[int]:
    """Ids of a text; no token reaches over the end of a piece."""
    return [token for piece in pieces for token in tokenizer.encode_text(piece)]


def _draw_prompt(ways: tuple[wording.Wording, ...], rng: np.random.Generator) -> Pieces:
    chosen = ways[int(rng.choice(len(ways), p=[way.share for way in ways]))] if len(ways) > 1 else ways[0]
    return fill(chosen.family[int(rng.integers(len(chosen.family)))], chosen.fields)


def earlier_messages(annotation: Annotation) -> tuple[Pieces, ...]:
    """Messages between the first prompt and the last reply."""
    if not isinstance(annotation, Conversation):
        return ()
    first = 2 if annotation.turns[0].role == "system" else 1
    return tuple((turn.text,) for turn in annotation.turns[first:-1])
