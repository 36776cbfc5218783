"""A tokenizer for tests: trained in a moment on a few words, laid out like the real ones."""

from __future__ import annotations

import functools

from molmo2core.sources.shapes_annotations import WORDINGS
from molmo2core.sources.shapes_scene import COLOURS, FORMS
from molmo2core.sources.shapes_tokenizer import train_tokenizer
from molmo2core.special_tokens import TextTokenizer, find_special_tokens


@functools.cache
def tiny_tokenizer(vocab_size: int = 768) -> TextTokenizer:
    """`vocab_size` base tokens (every byte, chat tokens, fillers) and the extra tokens behind them; no file needed."""
    words = [f"a {colour} {form} at the top left" for colour in COLOURS for form in FORMS]
    questions = [wording for wordings in WORDINGS.values() for wording in wordings]
    points = ['<points coords="1 1 500 250;2 2 500 250">', "</points>", "There are none.", "user\nassistant\n"]
    backend = train_tokenizer([*words, *questions, *points] * 2, vocab_size)
    return TextTokenizer(backend, find_special_tokens(backend))
