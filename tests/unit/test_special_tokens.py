"""special_tokens: which tokens begin and end text is the tokenizer's to say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from molmo2core.checkpoints.processor_files import write_processor_files
from molmo2core.errors import DataError
from molmo2core.preprocessing.config import PreprocessingConfig, VisualGeometry
from molmo2core.special_tokens import CHAT_END, CHAT_START, TEXT_PAD, load_tokenizer, tokenizer_digest
from molmo2core.testing.tiny_tokenizer import tiny_tokenizer


def tokenizer_in(folder: Path, config: dict[str, Any] | None) -> Path:
    folder.mkdir()
    tiny_tokenizer().backend.save(str(folder / "tokenizer.json"))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("config", "bos", "eos", "pad"),
    [
        (None, CHAT_END, CHAT_END, TEXT_PAD),
        ({"bos_token": None, "eos_token": CHAT_END}, CHAT_END, CHAT_END, TEXT_PAD),  # Qwen's files
        ({"bos_token": TEXT_PAD, "eos_token": CHAT_END, "pad_token": CHAT_START}, TEXT_PAD, CHAT_END, CHAT_START),
        ({"eos_token": {"content": TEXT_PAD, "special": True}}, TEXT_PAD, TEXT_PAD, TEXT_PAD),  # older files
    ],
)
def test_text_tokens_are_the_files_and_stay_so_in_an_export(
    config: dict[str, Any] | None, bos: str, eos: str, pad: str, tmp_path: Path
) -> None:
    """Would catch Molmo2-O-7B trained or exported with Qwen's BOS, which it never saw."""
    folder, exported = tokenizer_in(tmp_path / "tokenizer", config), tmp_path / "exported"
    exported.mkdir()
    write_processor_files(exported, folder, VisualGeometry(), PreprocessingConfig())
    for place in (folder, exported):
        tokenizer = load_tokenizer(place)
        special = tokenizer.special
        assert [special.bos, special.eos, special.pad] == [tokenizer.token_id(name) for name in (bos, eos, pad)]


def test_the_digest_changes_with_the_ids_only(tmp_path: Path) -> None:
    """Would catch a checkpoint reused for another BOS, and one made anew for an entry that changes nothing."""
    plain = tokenizer_digest(tokenizer_in(tmp_path / "plain", None))
    same = tokenizer_in(tmp_path / "same", {"eos_token": CHAT_END, "padding_side": "left"})
    other = tokenizer_in(tmp_path / "other", {"bos_token": TEXT_PAD, "eos_token": CHAT_END})
    assert tokenizer_digest(same) == plain != tokenizer_digest(other)


def test_a_damaged_configuration_and_an_unknown_token_are_named(tmp_path: Path) -> None:
    damaged = tokenizer_in(tmp_path / "damaged", None)
    (damaged / "tokenizer_config.json").write_text("[]")
    with pytest.raises(DataError, match=r"tokenizer_config\.json"):
        load_tokenizer(damaged)
    with pytest.raises(DataError, match="no token <s>"):
        load_tokenizer(tokenizer_in(tmp_path / "unknown", {"bos_token": "<s>"}))
