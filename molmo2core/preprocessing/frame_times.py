"""At which instants a video is looked at (model.md 5.1, 5.2; data.md 6.5).

uniform    every 1 / max_fps seconds and the last instant; evenly spread if that is too many.  The default.
tracking   k / rate for a rate on whose grid the annotated times lie, without the last instant: examples with tracks
native     frame numbers, as transformers' own video processor takes them; `frame_sampling: as_native_processor`

Pure arithmetic on what was measured at validation: bounds on lengths are exact without opening the video.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import ceil, gcd, lcm
from typing import Final

import numpy as np

from molmo2core.annotations import Annotation, Pointing, Tracking
from molmo2core.errors import DataError
from molmo2core.preprocessing.config import PreprocessingConfig

POINTING_FPS: Final = Fraction(2)
"""Points of videos are annotated at multiples of half a second (data.md 6.4)."""
_FINEST_GRID = 1000
"""Frame rates are taken as fractions with denominators up to this."""
_WHOLE = 0.01
"""How far the ratio of two frame rates may be from a whole number, in parts: 29.97 counts as 30."""


def sampled_times(
    duration_seconds: float, config: PreprocessingConfig, *, fps: float = 0.0, grid_fps: float = 0.0
) -> list[float]:
    """Seconds of each frame that the model sees, ascending, as printed before it; at least one.

    Args:
        duration_seconds: of the video, or of the clip of it.
        config: limits and sampling of a stage.
        fps: frames per second of the file as measured; 0 if unknown.
        grid_fps: from `tracking_grid`; 0 if nothing is tracked.
    """
    if config.frame_sampling == "as_native_processor":
        return native_frame_times(duration_seconds, fps, config.max_frames, config.max_fps)
    if grid_fps:
        rate = tracking_rate(duration_seconds, fps, grid_fps, config.max_frames, config.max_tracking_fps)
        return tracking_frame_times(duration_seconds, rate)
    return frame_times(duration_seconds, config.max_frames, config.max_fps)


def shown_instants(times: Sequence[float], config: PreprocessingConfig, fps: float) -> list[float]:
    """The instants whose frames are taken for `times`.

    They are the same, but for native sampling, which counts frames: there, the middle of the k-th frame.
    """
    return [time + 0.5 / fps for time in times] if config.frame_sampling == "as_native_processor" else list(times)


def frame_times(duration_seconds: float, max_frames: int, max_fps: float) -> list[float]:
    """Every 1 / max_fps seconds and the very last instant; if that is more than `max_frames`, evenly spread instants
    with both ends (model.md 5.1).
    """
    if (max_frames - 1) / max_fps < duration_seconds:
        return [float(t) for t in np.linspace(0, duration_seconds, max_frames)]
    regular = (k / max_fps for k in range(ceil(duration_seconds * max_fps)))
    return [t for t in regular if t < duration_seconds] + [duration_seconds]


def tracking_grid(annotations: Sequence[Annotation]) -> float:
    """Frames per second on whose grid all annotated times of a tracked video lie; 0 if nothing is tracked.

    The least common multiple of the `sampling_fps` of its tracks, and of POINTING_FPS if points are annotated too.
    """
    rates = [as_fraction(annotation.sampling_fps) for annotation in annotations if isinstance(annotation, Tracking)]
    if rates and any(isinstance(annotation, Pointing) for annotation in annotations):
        rates.append(POINTING_FPS)
    if not rates:
        return 0.0
    return float(Fraction(lcm(*(rate.numerator for rate in rates)), gcd(*(rate.denominator for rate in rates))))


def tracking_rate(duration_seconds: float, fps: float, grid_fps: float, max_frames: int, max_rate: float) -> Fraction:
    """Frames per second at which a tracked video is looked at (data.md 6.5).

    The largest rate up to `max_rate` that divides the file's own and is a multiple of `grid_fps`, if so many frames
    are allowed: every annotated time is then sampled.  If not even `grid_fps` fits, it is halved until it does: every
    sampled time is then on the grid, and the whole video is still seen.
    """
    grid, duration = as_fraction(grid_fps), Fraction(duration_seconds)
    multiples = (grid * k for k in range(int(max_rate / grid), 1, -1))
    rate = next((rate for rate in multiples if _divides(rate, fps) and duration * rate <= max_frames), grid)
    while duration * rate > max_frames:
        rate /= 2
    return rate


def tracking_frame_times(duration_seconds: float, rate: Fraction) -> list[float]:
    """Times k / rate before the end; the last instant is not added (data.md 6.5)."""
    return [float(k / rate) for k in range(max(1, ceil(Fraction(duration_seconds) * rate)))]


def native_frame_times(duration_seconds: float, fps: float, max_frames: int, max_fps: float) -> list[float]:
    """Times of the frames that transformers' Molmo2VideoProcessor takes from a video of constant rate.

    No last frame; its float steps, which now and then give a frame more, are kept (model.md 5.2).

    Raises:
        DataError: the file's frame rate was not measured.
    """
    if fps <= 0:
        raise DataError("native frame sampling", found="no frame rate", expected="a measured video")
    total = max(round(duration_seconds * fps), 1)
    wanted = min(max_frames, int(total / fps * max_fps)) if fps > max_fps else max_frames
    indices = np.arange(0, total, total / min(max(wanted, 1), total)).astype(int)
    return [float(index / fps) for index in indices]


def _divides(rate: Fraction, fps: float) -> bool:
    ratio = fps / float(rate)
    return round(ratio) >= 1 and abs(ratio - round(ratio)) <= _WHOLE * ratio


def as_fraction(rate: float) -> Fraction:
    """A frame rate without the noise of its float."""
    return Fraction(rate).limit_denominator(_FINEST_GRID)
