"""Names of Molmo2's special tokens, looked up in a tokenizer.  No token id is written down anywhere else.

Source: model.md 3.5 (order and ids), 0.12 (the eight visual kinds).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Tokenizer

from molmo2core.errors import DataError

IM_START = "<im_start>"
IM_END = "<im_end>"
IM_PATCH = "<im_patch>"
IM_COL = "<im_col>"
LOW_RES_IM_START = "<low_res_im_start>"
IMAGE = "<|image|>"
IM_LOW = "<im_low>"
FRAME_START = "<frame_start>"
FRAME_END = "<frame_end>"
VIDEO = "<|video|>"

EXTRA_TOKENS = (
    IM_START, IM_END, IM_PATCH, IM_COL, LOW_RES_IM_START, IMAGE, IM_LOW, FRAME_START, FRAME_END, VIDEO,
)  # fmt: skip
"""In the order of their ids, which begin at the padded base vocabulary."""
VISUAL_TOKENS = (IM_PATCH, IM_COL, IM_START, LOW_RES_IM_START, FRAME_START, IM_END, FRAME_END, IM_LOW)
"""Attend to each other in both directions within an example."""

CHAT_START = "<|im_start|>"
CHAT_END = "<|im_end|>"
TEXT_PAD = "<|endoftext|>"


@dataclass(frozen=True, kw_only=True)
class SpecialTokens:
    """Ids of the special tokens in one tokenizer."""

    bos: int
    eos: int
    pad: int
    im_start: int
    im_end: int
    im_patch: int
    im_col: int
    low_res_im_start: int
    image: int
    im_low: int
    frame_start: int
    frame_end: int
    video: int

    @property
    def visual(self) -> tuple[int, ...]:
        """The eight ids that attend to each other in both directions."""
        return (
            self.im_patch, self.im_col, self.im_start, self.low_res_im_start,
            self.frame_start, self.im_end, self.frame_end, self.im_low,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TextTokens:
    """Names of the tokens that begin, end and pad text.  Qwen's are the defaults, for tokenizers made here; those of a
    folder are read from its files."""

    bos: str = CHAT_END
    eos: str = CHAT_END
    pad: str = TEXT_PAD


def find_special_tokens(
    tokenizer: Tokenizer, where: str = "tokenizer", text: TextTokens | None = None
) -> SpecialTokens:
    """Look the special tokens up by name.

    Args:
        text: begin, end and padding; Qwen's without it.

    Raises:
        DataError: a token is missing, or the extra tokens do not have consecutive ids in their order.
    """

    def token_id(name: str) -> int:
        found = tokenizer.token_to_id(name)
        if found is None:
            raise DataError(where, found=f"no token {name}", mend="add it with special_tokens.add_extra_tokens")
        return found

    text = text or TextTokens()
    ids = [token_id(name) for name in EXTRA_TOKENS]
    if ids != list(range(ids[0], ids[0] + len(ids))):
        raise DataError(where, found=f"extra token ids {ids}", expected="consecutive ids, in order of EXTRA_TOKENS")
    return SpecialTokens(
        bos=token_id(text.bos),
        eos=token_id(text.eos),
        pad=token_id(text.pad),
        im_start=token_id(IM_START),
        im_end=token_id(IM_END),
        im_patch=token_id(IM_PATCH),
        im_col=token_id(IM_COL),
        low_res_im_start=token_id(LOW_RES_IM_START),
        image=token_id(IMAGE),
        im_low=token_id(IM_LOW),
        frame_start=token_id(FRAME_START),
        frame_end=token_id(FRAME_END),
        video=token_id(VIDEO),
    )


def add_extra_tokens(tokenizer: Tokenizer, base_vocab_size: int) -> None:
    """Append fillers up to `base_vocab_size`, then the extra tokens, as the released tokenizers do (model.md 3.5).

    Raises:
        DataError: the tokenizer already has more than `base_vocab_size` tokens.
    """
    size = tokenizer.get_vocab_size(with_added_tokens=True)
    if size > base_vocab_size:
        raise DataError("tokenizer", found=f"{size} tokens", expected=f"at most {base_vocab_size}")
    fillers = [f"|<EXTRA_TOKENS_{n}>|" for n in range(base_vocab_size - size)]
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in [*fillers, *EXTRA_TOKENS]])


@dataclass(frozen=True)
class TextTokenizer:
    """A `tokenizers` tokenizer with its special tokens; `encode` never adds special tokens of its own accord."""

    backend: Tokenizer
    special: SpecialTokens

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; special tokens written out in `text` become their ids."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_text(self, text: str) -> list[int]:
        """Token ids of people's text: a special token written out in it stays ordinary text."""
        self.backend.encode_special_tokens = True
        try:
            return self.encode(text)
        finally:
            self.backend.encode_special_tokens = False

    def token_id(self, name: str) -> int:
        """Id of the special token called `name`.

        Raises:
            DataError: the tokenizer has no such token.
        """
        found = self.backend.token_to_id(name)
        if found is None:
            raise DataError("tokenizer", found=f"no token {name}", mend="add it with special_tokens.add_extra_tokens")
        return found

    def decode(self, ids: list[int]) -> str:
        """Text of `ids`, special tokens left out."""
        return self.backend.decode(ids, skip_special_tokens=True)


def load_tokenizer(folder: str | Path) -> TextTokenizer:
    """Load `tokenizer.json` of a local folder, with the BOS, EOS and padding that the files beside it name.

    Raises:
        DataError: a file is missing or lacks a special token.
    """
    path = _tokenizer_file(Path(folder))
    backend = Tokenizer.from_file(str(path))
    return TextTokenizer(backend, find_special_tokens(backend, str(path), read_text_tokens(Path(folder))))


def tokenizer_digest(folder: Path) -> str:
    """sha256 of all that ids follow from: `tokenizer.json`, and names of text tokens that are not Qwen's.

    Raises:
        DataError: the file is missing.
    """
    digest = hashlib.sha256(_tokenizer_file(folder).read_bytes())
    text = read_text_tokens(folder)
    if text != TextTokens():
        digest.update(json.dumps([text.bos, text.eos, text.pad]).encode())
    return digest.hexdigest()


def read_text_tokens(folder: Path) -> TextTokens:
    """The text tokens that a tokenizer's files name; where they name no BOS, it is the EOS (model.md 3.5).

    Never assumed: Molmo2-O-7B begins with another token than it ends with, and pads with a third.

    Raises:
        DataError: no file names the EOS or the padding, or a file is no JSON object.
    """
    names = _named_tokens(folder / "special_tokens_map.json") | _named_tokens(folder / "tokenizer_config.json")
    for kind in ("eos", "pad"):
        if kind not in names:
            raise DataError(
                str(folder / "tokenizer_config.json"),
                found=f"no {kind}_token, neither here nor in special_tokens_map.json",
                expected="the name of a token",
                mend="copy these files from where tokenizer.json comes from",
            )
    return TextTokens(bos=names.get("bos", names["eos"]), eos=names["eos"], pad=names["pad"])


def _named_tokens(path: Path) -> dict[str, str]:
    """Names by kind (bos, eos, pad) as far as a file has them: plain, or within an object (older files)."""
    try:
        config = json.loads(path.read_text()) if path.is_file() else {}
        named = {kind: config.get(f"{kind}_token") for kind in ("bos", "eos", "pad")}
        return {kind: value["content"] if isinstance(value, dict) else value for kind, value in named.items() if value}
    except (ValueError, AttributeError, KeyError) as error:
        raise DataError(str(path), found=f"not a tokenizer's configuration ({error})") from error


def _tokenizer_file(folder: Path) -> Path:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise DataError(str(path), found="no such file", expected="a Hugging Face fast tokenizer")
    return path
