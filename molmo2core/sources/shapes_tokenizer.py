"""Train a small byte-level BPE tokenizer that is built like Qwen's, with Molmo2's extra tokens (model.md 3.5)."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from molmo2core.special_tokens import CHAT_END, CHAT_START, TEXT_PAD, add_extra_tokens

_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Qwen2's splitting: single digits, words with the space before them, runs of punctuation."""


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A tokenizer of `vocab_size` base tokens (fillers included) and the extra tokens behind them.

    All 256 bytes are in the vocabulary, so that every text can be encoded and decoded without loss.  The same texts in
    the same order give the same tokenizer.

    Raises:
        DataError: `vocab_size` is too small for the bytes and the chat tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    chat_tokens = (TEXT_PAD, CHAT_START, CHAT_END)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(chat_tokens),
        min_frequency=2,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in chat_tokens])
    add_extra_tokens(tokenizer, vocab_size)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write `tokenizer.json` and the `tokenizer_config.json` with which transformers loads it."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": CHAT_END,
        "eos_token": CHAT_END,
        "pad_token": TEXT_PAD,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1_000_000,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
