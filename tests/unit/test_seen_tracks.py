"""Tracks of videos that are too long to be seen as often as they were annotated."""

from __future__ import annotations

import dataclasses

from hypothesis import given, settings
from hypothesis import strategies as st

from molmo2core.annotations import Annotation, Caption, Track, Tracking, TrackPosition
from molmo2core.preprocessing.config import PreprocessingConfig
from molmo2core.preprocessing.frame_times import sampled_times, tracking_grid, tracking_rate
from molmo2core.preprocessing.seen_tracks import as_seen, possibly_seen

CAPTION = Caption(task="video_caption", text="x")


def tracked(fps: float, *times: float) -> Tracking:
    positions = tuple(TrackPosition(time=time, x=0.5, y=0.5) for time in times)
    return Tracking(
        task="tracking",
        label="dog",
        sampling_fps=fps,
        tracks=(Track(object_id=1, positions=positions),) if times else (),
    )


def rates(config: PreprocessingConfig, duration: float, *annotations: Tracking) -> list[float]:
    seen = as_seen((CAPTION, *annotations), duration, 30.0, config)
    assert seen[0] is CAPTION
    return [annotation.sampling_fps for annotation in seen if isinstance(annotation, Tracking)]


def test_prompts_ask_for_times_that_are_seen() -> None:
    """A prompt that says 2 frames per second over frames at 1 loses half of the published sampler's targets."""
    config = PreprocessingConfig(max_frames=16)
    assert rates(config, 8.0, tracked(2.0)) == [2.0]
    assert rates(config, 1.0, tracked(2.0), tracked(1.0)) == [2.0, 1.0]
    assert rates(config, 16.0, tracked(2.0), tracked(1.0)) == [1.0, 1.0]
    assert rates(config, 64.0, tracked(2.0)) == [0.25]
    assert rates(config, 10.0, tracked(2.0), tracked(3.0)) == [0.5, 1.5]  # frames at 1.5 per second
    native = PreprocessingConfig(max_frames=16, frame_sampling="as_native_processor")
    assert rates(native, 64.0, tracked(2.0)) == [2.0]


def test_no_object_is_lost() -> None:
    """An object that is seen between the slower times only must not become "There are none."."""
    config = PreprocessingConfig(max_frames=16)
    assert rates(config, 16.0, tracked(2.0, 0.5, 1.0)) == [1.0]
    assert rates(config, 16.0, tracked(2.0, 0.5, 1.5)) == [2.0]
    assert rates(config, 16.0, tracked(2.0, 0.25)) == [1.0], "never in an answer, so not lost"
    single = dataclasses.replace(tracked(2.0, 0.0, 0.5), form="single_point")
    assert rates(config, 16.0, single) == [2.0], "the prompt shows 0.0, so only 0.5 is an answer"
    ground = dataclasses.replace(tracked(2.0, 0.5, 1.5), form="ground")
    assert rates(config, 16.0, ground) == [1.0], "its answer is the same at every rate"


@settings(max_examples=300, deadline=None)
@given(
    tracks=st.lists(
        st.tuples(st.sampled_from([0.5, 1.0, 2.0, 2.5, 3.0]), st.lists(st.integers(0, 400), max_size=5)),
        min_size=1,
        max_size=3,
    ),
    duration=st.floats(0, 500),
    fps=st.sampled_from([0.0, 6.0, 24.0, 25.0, 29.97, 30.0]),
    max_frames=st.integers(1, 200),
)
def test_what_is_asked_is_seen_and_bounded(
    tracks: list[tuple[float, list[int]]], duration: float, fps: float, max_frames: int
) -> None:
    """Every time of the lowered grid is the time of a frame, and bounds on lengths know of every lowered rate."""
    annotations: tuple[Annotation, ...] = tuple(
        tracked(rate, *(n / 2 for n in sorted(times))) for rate, times in tracks
    )
    config = PreprocessingConfig(max_frames=max_frames)
    grid_fps = tracking_grid(annotations)
    frame_rate = tracking_rate(duration, fps, grid_fps, max_frames, config.max_tracking_fps)
    times = sampled_times(duration, config, fps=fps, grid_fps=grid_fps)
    for annotation, seen in zip(annotations, as_seen(annotations, duration, fps, config), strict=True):
        assert seen in possibly_seen(annotation)
        assert isinstance(annotation, Tracking) and isinstance(seen, Tracking)
        if seen is not annotation or frame_rate >= grid_fps:
            grid = [k / seen.sampling_fps for k in range(1000) if k / seen.sampling_fps < duration]
            assert all(min(abs(time - t) for t in times) < 1e-6 for time in grid)
