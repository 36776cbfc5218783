"""Bounds that packs are planned with are never below the true length, and not far above it: images.

An undershoot would make the loader meet a pack that does not fit.
"""

from __future__ import annotations

import io

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from molmo2core.annotations import QuestionAnswer
from molmo2core.examples import ROOT, Example, Media
from molmo2core.preprocessing.config import PreprocessingConfig, VisualGeometry
from molmo2core.preprocessing.lengths import root_bound
from molmo2core.preprocessing.preprocessor import Preprocessor
from molmo2core.testing.tiny_tokenizer import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
GEOMETRIES = st.sampled_from(
    [
        VisualGeometry(crop_size=54, patch_size=6, overlap_margins=(1, 1)),
        VisualGeometry(crop_size=60, patch_size=6, overlap_margins=(1, 2), image_pooling=(3, 2)),
        VisualGeometry(crop_size=28, patch_size=14, overlap_margins=(0, 0), video_pooling=(2, 2)),
    ]
)


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 250), st.integers(1, 250)), min_size=1, max_size=3),
    geometry=GEOMETRIES,
    max_crops=st.integers(1, 9),
)
def test_image_roots(sizes: list[tuple[int, int]], geometry: VisualGeometry, max_crops: int) -> None:
    """Real images: crops exact, tokens exact but for the bytes of `Image k`."""

    def png(width: int, height: int) -> bytes:
        stream = io.BytesIO()
        Image.fromarray(np.zeros((height, width, 3), np.uint8)).save(stream, "PNG")
        return stream.getvalue()

    config = PreprocessingConfig(max_crops=max_crops)
    preprocessor = Preprocessor(geometry=geometry, config=config, tokenizer=TOKENIZER, weighting="none", seed=0)
    media = Media(kind="images", files=tuple(png(*size) for size in sizes), sizes=tuple(sizes))
    question = QuestionAnswer(task="multi_image_qa", question="?", answer="!")
    example = Example(uid="u", dataset="d", split="train", media=media, annotations=(question,))
    tokenized = preprocessor.tokenize(example, epoch=0)
    tokens, crops = root_bound("images", sizes, 0.0, 0, geometry, config)
    true = int((tokenized.subsegment_ids == ROOT).sum())
    assert crops == len(tokenized.crops)
    assert true <= tokens <= true + len("Image 1") * len(sizes)
