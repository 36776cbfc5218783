"""How large a synthetic corpus `sources.shapes` renders."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ShapesConfig:
    """Numbers of media; splits are disjoint: 80 % train, 10 % validation, 10 % test unless said otherwise."""

    seed: int = 0
    images: int = 1000
    """Single images, shared out over captions, image QA and image pointing."""
    image_sets: int = 100
    """Sets of 2-5 images."""
    videos: int = 120
    """Videos, shared out over captions, QA, pointing and tracking."""
    texts: int = 100
    """Conversations without a medium."""
    vocab_size: int = 768
    """Base vocabulary (with fillers) of the tokenizer trained on the corpus."""
