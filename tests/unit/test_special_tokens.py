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

PAD = CHAT_START
"""Some third token: OLMo3 pads with one that Qwen does not have."""
QWEN = {"eos_token": CHAT_END, "pad_token": TEXT_PAD}


def tokenizer_in(folder: Path, config: dict[str, Any] | None, file: str = "tokenizer_config.json") -> Path:
    folder.mkdir()
    tiny_tokenizer().backend.save(str(folder / "tokenizer.json"))
    if config is not None:
        (folder / file).write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("config", "bos", "eos", "pad"),
    [
        ({"bos_token": None, "eos_token": CHAT_END, "pad_token": TEXT_PAD}, CHAT_END, CHAT_END, TEXT_PAD),  # Qwen's
        ({"bos_token": TEXT_PAD, "eos_token": CHAT_END, "pad_token": PAD}, TEXT_PAD, CHAT_END, PAD),  # OLMo3's
        ({"eos_token": {"content": TEXT_PAD, "special": True}, "pad_token": PAD}, TEXT_PAD, TEXT_PAD, PAD),  # older
    ],
)
@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
def test_text_tokens_are_the_files_and_stay_so_in_an_export(
    file: str, config: dict[str, Any], bos: str, eos: str, pad: str, tmp_path: Path
) -> None:
    """Would catch Molmo2-O-7B trained or exported with Qwen's BOS, which it never saw."""
    folder, exported = tokenizer_in(tmp_path / "tokenizer", config, file), tmp_path / "exported"
    exported.mkdir()
    write_processor_files(exported, folder, VisualGeometry(), PreprocessingConfig())
    for place in (folder, exported):
        tokenizer = load_tokenizer(place)
        special = tokenizer.special
        assert [special.bos, special.eos, special.pad] == [tokenizer.token_id(name) for name in (bos, eos, pad)]


def test_text_tokens_are_never_assumed(tmp_path: Path) -> None:
    """Would catch Qwen's names taken for a tokenizer that happens to have such tokens too, as OLMo3's has."""
    for number, (config, missing) in enumerate(
        ((None, "eos_token"), ({"bos_token": TEXT_PAD}, "eos_token"), ({"eos_token": CHAT_END}, "pad_token"))
    ):
        with pytest.raises(DataError, match=rf"tokenizer_config\.json: no {missing}"):
            load_tokenizer(tokenizer_in(tmp_path / str(number), config))


def test_the_digest_changes_with_the_ids_only(tmp_path: Path) -> None:
    """Would catch a checkpoint reused for another BOS, and one made anew for an entry that changes nothing."""
    plain = tokenizer_digest(tokenizer_in(tmp_path / "plain", QWEN))
    same = tokenizer_in(tmp_path / "same", QWEN | {"padding_side": "left"})
    other = tokenizer_in(tmp_path / "other", QWEN | {"bos_token": TEXT_PAD})
    assert tokenizer_digest(same) == plain != tokenizer_digest(other)


def test_a_damaged_configuration_and_an_unknown_token_are_named(tmp_path: Path) -> None:
    damaged = tokenizer_in(tmp_path / "damaged", None)
    (damaged / "tokenizer_config.json").write_text("[]")
    with pytest.raises(DataError, match=r"tokenizer_config\.json"):
        load_tokenizer(damaged)
    with pytest.raises(DataError, match="no token <s>"):
        load_tokenizer(tokenizer_in(tmp_path / "unknown", QWEN | {"bos_token": "<s>"}))
