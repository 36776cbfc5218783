"""The message tree: one visual input, and the annotations of it as branches that cannot see each other."""

from __future__ import annotations

from dataclasses import dataclass

from molmo2core.examples import IntArray


@dataclass(frozen=True, kw_only=True)
class EncodedTurn:
    """Token ids of one role's text; a reply's EOS is added when the tree is linearized."""

    ids: tuple[int, ...]
    is_reply: bool
    """Whether the model has to say this (and is trained on it)."""


@dataclass(frozen=True, kw_only=True)
class Branch:
    """One annotation: turns that alternate between prompt and reply, prompt first."""

    task: str
    turns: tuple[EncodedTurn, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class MessageTree:
    """What all branches see, and the branches in the order in which they appear."""

    root_ids: IntArray
    """[R] BOS, visual tokens, time stamps and subtitles."""
    branches: tuple[Branch, ...]
