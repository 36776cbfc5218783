"""At which instants a video is looked at: golden values of each sampler, and which sampler an example gets."""

from __future__ import annotations

import pytest

from molmo2core.annotations import Annotation, Caption, Point, Pointing, Tracking
from molmo2core.errors import DataError
from molmo2core.preprocessing.config import PreprocessingConfig
from molmo2core.preprocessing.frame_times import (
    frame_times,
    native_frame_times,
    sampled_times,
    shown_instants,
    tracking_frame_times,
    tracking_grid,
    tracking_rate,
)


def tracked(fps: float) -> Tracking:
    return Tracking(task="tracking", label="dog", sampling_fps=fps)


@pytest.mark.parametrize(
    ("duration", "budget", "count", "first", "last"),
    [
        (0.0, 8, 1, [0.0], [0.0]),
        (0.1, 8, 2, [0.0, 0.1], [0.0, 0.1]),
        (1.0, 8, 3, [0.0, 0.5, 1.0], [0.0, 0.5, 1.0]),
        (1.5, 8, 4, [0.0, 0.5, 1.0], [0.5, 1.0, 1.5]),
        (2.001, 8, 6, [0.0, 0.5, 1.0], [1.5, 2.0, 2.0]),
        (10, 128, 21, [0.0, 0.5, 1.0], [9.0, 9.5, 10.0]),
        (63.5, 128, 128, [0.0, 0.5, 1.0], [62.5, 63.0, 63.5]),
        (63.6, 128, 128, [0.0, 0.5, 1.0], [62.6, 63.1, 63.6]),
        (63.6, 384, 129, [0.0, 0.5, 1.0], [63.0, 63.5, 63.6]),
        (191.5, 384, 384, [0.0, 0.5, 1.0], [190.5, 191.0, 191.5]),
        (192, 384, 384, [0.0, 0.5, 1.0], [191.0, 191.5, 192.0]),
        (600, 128, 128, [0.0, 4.7, 9.4], [600.0]),
        (600, 384, 384, [0.0, 1.6, 3.1], [600.0]),
    ],
)
def test_golden_times(duration: float, budget: int, count: int, first: list[float], last: list[float]) -> None:
    """The table of model.md 5.1; catches a missing last instant and a wrong switch to even spreading."""
    printed = [float(f"{time:.1f}") for time in frame_times(duration, budget, 2.0)]
    assert len(printed) == count
    assert printed[: len(first)] == first and printed[-len(last) :] == last


@pytest.mark.parametrize(
    ("duration", "fps", "grid", "budget", "rate"),
    [
        (10, 6, 1, 128, 6),  # files of the academic sets: 6 frames per second
        (10, 4, 1, 128, 4),  # LV-VIS
        (12, 30, 2, 128, 10),
        (20, 30, 2, 128, 6),  # 10 does not fit, 5 and 3 would miss every other annotated time
        (20, 30, 1, 128, 6),
        (25, 30, 1, 128, 5),
        (10, 25, 1, 128, 5),
        (10, 25, 2, 128, 2),  # no divisor of 25 is even: the annotated times themselves
        (10, 29.97, 2, 128, 10),
        (40, 6, 2, 128, 2),  # the published sampler takes 3 and loses half of the times
        (10, 0, 2, 128, 2),  # rate unknown
        (10, 60, 2, 8, 1 / 2),  # not even the grid fits: a part of its times, to the end
        (100, 6, 2, 128, 1),
        (600, 30, 1, 128, 1 / 8),
        (0.0, 30, 2, 128, 10),
    ],
)
def test_tracking_rates(duration: float, fps: float, grid: float, budget: int, rate: float) -> None:
    """data.md 6.5: the largest divisor of the file's rate up to 10 that fits, but never off the annotated grid."""
    times = tracking_frame_times(duration, tracking_rate(duration, fps, grid, budget, 10.0))
    assert times == pytest.approx([k / rate for k in range(len(times))])
    assert 1 <= len(times) <= budget and times[-1] < max(duration, 1e-9) <= times[-1] + 1 / rate + 1e-9
    if rate >= grid:
        assert {round(k / grid, 6) for k in range(int(duration * grid))} <= {round(time, 6) for time in times}


def test_the_grid_of_an_example() -> None:
    """One video, one choice of frames for all of its branches."""
    caption = Caption(task="video_caption", text="x")
    points = Pointing(task="video_pointing", label="dog", points=(Point(x=0.5, y=0.5, time=0.5),))
    cases: list[tuple[tuple[Annotation, ...], float]] = [
        ((caption, points), 0.0),
        ((tracked(1.0), caption), 1.0),
        ((tracked(1.0), tracked(2.0)), 2.0),
        ((tracked(2.0), tracked(3.0)), 6.0),
        ((tracked(0.5), tracked(0.75)), 1.5),
        ((tracked(1.0), points), 2.0),  # points lie on half seconds
        ((tracked(3.0), points), 6.0),
    ]
    assert [tracking_grid(annotations) for annotations, _ in cases] == [grid for _, grid in cases]


def test_which_sampler() -> None:
    config = PreprocessingConfig(max_frames=32)
    assert sampled_times(2.0, config) == [0.0, 0.5, 1.0, 1.5, 2.0]
    assert sampled_times(2.0, config, fps=6.0, grid_fps=2.0) == pytest.approx([k / 6 for k in range(12)])
    limited = PreprocessingConfig(max_frames=32, max_tracking_fps=2.0)
    assert sampled_times(2.0, limited, fps=6.0, grid_fps=2.0) == [0.0, 0.5, 1.0, 1.5]
    native = PreprocessingConfig(max_frames=32, frame_sampling="as_native_processor")
    times = sampled_times(2.0, native, fps=6.0, grid_fps=2.0)
    assert times == [0.0, 0.5, 1.0, 1.5]
    assert shown_instants(times, native, 6.0) == pytest.approx([time + 1 / 12 for time in times])
    assert shown_instants(times, config, 6.0) == times


def test_native_sampling_needs_the_rate() -> None:
    with pytest.raises(DataError, match="no frame rate"):
        native_frame_times(2.0, 0.0, 8, 2.0)
