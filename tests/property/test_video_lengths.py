"""Bounds of videos that packs are planned with are never below the true length, and not far above it."""

from __future__ import annotations

import functools
from fractions import Fraction
from typing import get_args

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from molmo2core.annotations import Annotation, Caption, Pointing, Tracking
from molmo2core.examples import Example, Media, Subtitle
from molmo2core.preprocessing.config import FrameLayout, FrameSampling, PreprocessingConfig, VisualGeometry
from molmo2core.preprocessing.frame_times import sampled_times, tracking_grid
from molmo2core.preprocessing.lengths import root_bound, subtitle_tokens
from molmo2core.preprocessing.root import build_root, subtitle_ids, subtitle_text, video_ids
from molmo2core.testing.tiny_tokenizer import tiny_tokenizer
from molmo2core.testing.video_files import encode_video, level_frame
from molmo2core.video_file import open_video

TOKENIZER = tiny_tokenizer()
TEXTS = st.one_of(
    st.text(max_size=60),
    st.lists(st.sampled_from(["a red ", "circle", "\n", "<im_patch>", "12", "é", '"'])).map("".join),
)
TIMES = st.floats(0, 1000)
SUBTITLES = st.lists(
    st.tuples(TIMES, st.floats(0, 9), TEXTS).map(lambda t: Subtitle(start=t[0], end=t[0] + t[1], text=t[2])), max_size=5
)
GEOMETRIES = st.sampled_from(
    [
        VisualGeometry(crop_size=54, patch_size=6, overlap_margins=(1, 1)),
        VisualGeometry(crop_size=28, patch_size=14, overlap_margins=(0, 0), video_pooling=(2, 2)),
    ]
)
CONFIGS = st.builds(
    PreprocessingConfig,
    max_frames=st.integers(1, 40),
    max_fps=st.sampled_from([0.5, 1.0, 2.0, 3.0]),
    max_tracking_fps=st.sampled_from([1.0, 10.0]),
    max_subtitle_tokens=st.integers(0, 80),
    frame_layout=st.sampled_from(get_args(FrameLayout)),
    frame_sampling=st.sampled_from(get_args(FrameSampling)),
)
RATES = st.sampled_from([0.0, 0.0, 1.0, 2.0, 0.75, 3.0])


@settings(max_examples=300, deadline=None)
@given(
    duration=st.floats(0, 2000).map(lambda seconds: round(seconds, 6)),
    fps=st.sampled_from([0.7, 6.0, 24.0, 25.0, 29.97, 60.0, 1000.0]),
    grid_fps=RATES,
    subtitles=SUBTITLES,
    geometry=GEOMETRIES,
    config=CONFIGS,
)
def test_video_roots(
    duration: float,
    fps: float,
    grid_fps: float,
    subtitles: list[Subtitle],
    geometry: VisualGeometry,
    config: PreprocessingConfig,
) -> None:
    """Everything but decoding, under every sampler and layout: times, their text, patches, subtitles."""
    media = Media(kind="video", duration_seconds=duration, subtitles=tuple(subtitles))
    times = sampled_times(duration, config, fps=fps, grid_fps=grid_fps)
    # The native processor counts frames, and a duration need not be a whole number of them.
    assert times == sorted(times) and times[0] == 0 and times[-1] <= duration + 0.5 / fps
    frames = len(video_ids(times, config.frame_layout, geometry, TOKENIZER))
    lines = len(subtitle_ids(subtitles, times, config.max_subtitle_tokens, TOKENIZER))
    tokens, crops = root_bound(
        "video", (), duration, subtitle_tokens(media, TOKENIZER), geometry, config, fps=fps, grid_fps=grid_fps
    )
    # numpy's float steps give the native processor a frame more now and then; it is counted
    assert crops == len(times) <= config.max_frames + (config.frame_sampling == "as_native_processor")
    assert lines <= config.max_subtitle_tokens
    assert 1 + frames + lines <= tokens
    tight, _ = root_bound("video", (), duration, 0, geometry, config, fps=fps, grid_fps=grid_fps)
    assert tight <= 1 + frames + 3 * len(times), "a number may be merged, nothing else"


@settings(max_examples=200, deadline=None)
@given(subtitles=SUBTITLES, times=st.lists(TIMES, min_size=1, max_size=20).map(sorted), limit=st.integers(0, 200))
def test_subtitles(subtitles: list[Subtitle], times: list[float], limit: int) -> None:
    """`frame_1` (model.md 5.6): a line is kept if a second around a frame touches it; whole lines, up to the limit."""
    near = [line for line in subtitles if not all(line.end < time - 1 or time + 1 < line.start for time in times)]
    everything = [TOKENIZER.encode_text(text) for text in ("subtitle\n", *map(subtitle_text, near))]
    ids = subtitle_ids(subtitles, times, limit, TOKENIZER).tolist()
    assert len(ids) <= limit
    kept = next(n for n in range(len(everything), -1, -1) if sum(map(len, everything[:n])) <= limit)
    assert ids == ([token for line in everything[:kept] for token in line] if kept > 1 else [])


@functools.cache
def real_video(num_frames: int, rate: int) -> bytes:
    return encode_video([level_frame(number) for number in range(num_frames)], rate=rate, options={"g": "7"})


@settings(max_examples=25, deadline=None)
@given(
    num_frames=st.sampled_from([1, 2, 9, 40]),
    rate=st.sampled_from([4, 6, 25]),
    cut=st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted),
    tracked=st.lists(st.sampled_from([1.0, 2.0]), max_size=2),
    pointed=st.booleans(),
    config=CONFIGS,
)
def test_real_roots(
    num_frames: int, rate: int, cut: list[float], tracked: list[float], pointed: bool, config: PreprocessingConfig
) -> None:
    """With decoding, of whole videos and clips: what was measured suffices to know how many frames there will be."""
    geometry = VisualGeometry(crop_size=28, patch_size=14, overlap_margins=(0, 0), video_pooling=(2, 2))
    data = real_video(num_frames, rate)
    with open_video(data) as video:
        index = video.index
    assert index.fps == Fraction(rate)
    start, end = (round(part * index.duration_seconds, 6) for part in cut)
    media = Media(
        kind="video",
        files=(data,),
        duration_seconds=round(end - start, 6),
        fps=index.fps,
        clip_start_seconds=start,
        subtitles=(Subtitle(start=0.0, end=1.0, text="hello"),),
    )
    annotations: tuple[Annotation, ...] = (
        Caption(task="video_caption", text="x"),
        *(Tracking(task="tracking", label="dog", sampling_fps=fps) for fps in tracked),
        *([Pointing(task="video_pointing", label="dog")] if pointed else []),
    )
    example = Example(uid="u", dataset="d", split="train", media=media, annotations=annotations)
    root = build_root(example, geometry=geometry, config=config, tokenizer=TOKENIZER)
    tokens, crops = root_bound(
        "video",
        ((64, 48),),
        media.duration_seconds,
        subtitle_tokens(media, TOKENIZER),
        geometry,
        config,
        fps=media.fps,
        grid_fps=tracking_grid(annotations),
    )
    assert crops == len(root.crops) and len(root.ids) <= tokens
    assert root.pooling.max() == len(root.crops) * geometry.num_patches - 1
    assert len(root.pooling) == int((root.ids == TOKENIZER.special.im_patch).sum())
    assert np.array_equal(np.unique(root.pooling[root.pooling >= 0]), np.arange(root.pooling.max() + 1))
