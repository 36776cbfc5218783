"""Bounds that packs are planned with are never below the true length, and not far above it.

An undershoot would make the loader meet a pack that does not fit.
"""

from __future__ import annotations

import dataclasses
import io

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from molmo2core.annotations import (
    QuestionAnswer,
)
from molmo2core.examples import ROOT, Example, Media, Subtitle
from molmo2core.preprocessing.config import PreprocessingConfig, VisualGeometry
from molmo2core.preprocessing.lengths import root_bound, subtitle_tokens
from molmo2core.preprocessing.preprocessor import Preprocessor
from molmo2core.preprocessing.root import frame_ids, subtitle_ids
from molmo2core.preprocessing.video import frame_times, num_frames
from molmo2core.testing.tiny_tokenizer import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
TEXTS = st.one_of(
    st.text(max_size=60),
    st.lists(st.sampled_from(["a red ", "circle", "\n", "<im_patch>", "12", "é", '"'])).map("".join),
)
TIMES = st.floats(0, 1000)
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


SUBTITLES = st.lists(
    st.tuples(TIMES, st.floats(0, 9), TEXTS).map(lambda t: Subtitle(start=t[0], end=t[0] + t[1], text=t[2])), max_size=5
)


@settings(max_examples=60, deadline=None)
@given(
    duration=st.floats(0, 2000),
    subtitles=SUBTITLES,
    geometry=GEOMETRIES,
    config=st.builds(
        PreprocessingConfig,
        max_frames=st.integers(1, 40),
        max_fps=st.sampled_from([0.5, 1.0, 2.0, 3.0]),
        max_subtitle_tokens=st.integers(0, 80),
    ),
)
def test_video_roots(
    duration: float, subtitles: list[Subtitle], geometry: VisualGeometry, config: PreprocessingConfig
) -> None:
    """Everything but decoding: times, their text, patches, and subtitles that are kept whole."""
    media = Media(kind="video", duration_seconds=duration, subtitles=tuple(subtitles))
    times = frame_times(duration, config.max_frames, config.max_fps)
    frames = sum(len(frame_ids(n, t, geometry, TOKENIZER)) for n, t in enumerate(times))
    lines = len(subtitle_ids(subtitles, times, config.max_subtitle_tokens, TOKENIZER))
    tokens, crops = root_bound("video", (), duration, subtitle_tokens(media, TOKENIZER), geometry, config)
    assert len(times) == num_frames(duration, config.max_frames, config.max_fps) <= config.max_frames
    assert crops == len(times)
    assert lines <= config.max_subtitle_tokens
    assert 1 + frames + lines <= tokens
    without = dataclasses.replace(config, max_subtitle_tokens=0)
    tight, _ = root_bound("video", (), duration, 0, geometry, without)
    assert tight <= 1 + frames + 3 * len(times), "a number may be merged, nothing else"
