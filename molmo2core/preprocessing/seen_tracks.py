"""Tracks as they are asked for where a video is too long to look at it as often as it was annotated.

A prompt for positions at times that the model does not see teaches it to guess, and times that are left out without a
word teach it to be incomplete (the published sampler does both, data.md 10.2).  So prompt and answer get the rate at
which every time is seen.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from fractions import Fraction

from molmo2core.annotations import Annotation, Tracking
from molmo2core.preprocessing.config import PreprocessingConfig
from molmo2core.preprocessing.frame_times import as_fraction, tracking_grid, tracking_rate
from molmo2core.preprocessing.tracking import answered_tracks

_MAX_HALVINGS = 4


def as_seen(
    annotations: Sequence[Annotation], duration_seconds: float, fps: float, config: PreprocessingConfig
) -> tuple[Annotation, ...]:
    """The annotations of an example, tracks with the `sampling_fps` at which all their times are sampled.

    It is the annotated one unless the video is too long for `max_frames`; then it is halved as often as needed.  It
    stays as it is if an object that is seen would not be in the answer any more.
    """
    grid_fps = tracking_grid(annotations)
    if not grid_fps or config.frame_sampling != "as_trained":
        return tuple(annotations)
    rate = tracking_rate(duration_seconds, fps, grid_fps, config.max_frames, config.max_tracking_fps)
    return tuple(_slowed(item, rate) if isinstance(item, Tracking) else item for item in annotations)


def possibly_seen(annotation: Annotation) -> tuple[Annotation, ...]:
    """Everything that `as_seen` can make of `annotation` in any stage: what bounds on lengths must cover."""
    if not isinstance(annotation, Tracking):
        return (annotation,)
    slower = (_halved(annotation, halvings) for halvings in range(1, _MAX_HALVINGS + 1))
    return (annotation, *(tracking for tracking in slower if _keeps_objects(annotation, tracking.sampling_fps)))


def _slowed(tracking: Tracking, rate: Fraction) -> Tracking:
    sampling_fps, halvings = as_fraction(tracking.sampling_fps), 0
    while (rate * 2**halvings / sampling_fps).denominator > 1:
        halvings += 1
        if halvings > _MAX_HALVINGS:
            return tracking
    if halvings == 0:
        return tracking
    slower = _halved(tracking, halvings)
    return slower if _keeps_objects(tracking, slower.sampling_fps) else tracking


def _halved(tracking: Tracking, halvings: int) -> Tracking:
    return dataclasses.replace(tracking, sampling_fps=tracking.sampling_fps / 2**halvings)


def _keeps_objects(tracking: Tracking, sampling_fps: float) -> bool:
    """Whether every object in the answer at the annotated rate is in the one at `sampling_fps`."""
    slower = dataclasses.replace(tracking, sampling_fps=sampling_fps)
    return _answered_objects(tracking) <= _answered_objects(slower)


def _answered_objects(tracking: Tracking) -> set[int]:
    return {track.object_id for track in answered_tracks(tracking)}
