"""Images and frames with true positions as green rings and predicted ones as red crosses.

A ring is as wide as the radius within which an answer hits.
"""

from __future__ import annotations

from collections.abc import Sequence

from molmo2core.annotations import Annotation, Pointing, Tracking
from molmo2core.drawing import Mark, Picture, draw_marks
from molmo2core.evaluation.metrics.matching import TIME_TOLERANCE_SECONDS
from molmo2core.evaluation.tasks import predicted_points, predicted_tracks
from molmo2core.examples import Example
from molmo2core.image_decoding import decode_image
from molmo2core.video_decoding import decode_frames

_MAX_FRAMES = 6


def draw_example(example: Example, annotation: Annotation, answer: str) -> list[Picture]:
    """The medium with truth and prediction: every image of a set, up to six frames of a video, nothing for text.

    Frames are taken where something is true or predicted, or spread over the video.
    """
    media = example.media
    where = f"{example.dataset}/{example.uid}"
    if media.kind == "video":
        marks = _video_marks(annotation, answer)
        times = _spread(_distinct(sorted(time for time, _ in marks))) or _even_times(media.duration_seconds)
        frames = decode_frames(media.files[0], [media.clip_start_seconds + time for time in times], where)
        return [
            Picture(caption=f"{time:.1f} s", jpeg=draw_marks(frame, _marks_at(marks, time)))
            for time, frame in zip(times, frames, strict=True)
        ]
    marks_of_image = _image_marks(annotation, answer)
    return [
        Picture(
            caption=f"image {number}" if media.kind == "images" else "",
            jpeg=draw_marks(decode_image(data, where), [mark for image, mark in marks_of_image if image == number]),
        )
        for number, data in enumerate(media.files, start=1)
    ]


def _image_marks(annotation: Annotation, answer: str) -> list[tuple[int, Mark]]:
    if not isinstance(annotation, Pointing):
        return []
    true = [(point.image, Mark(x=point.x, y=point.y, radius=point.radius)) for point in annotation.points]
    return true + [(point.image, Mark(x=point.x, y=point.y)) for point in predicted_points(answer, annotation)]


def _video_marks(annotation: Annotation, answer: str) -> list[tuple[float, Mark]]:
    if isinstance(annotation, Pointing):
        true = [(point.time or 0.0, Mark(x=point.x, y=point.y, radius=point.radius)) for point in annotation.points]
        return true + [
            (point.time or 0.0, Mark(x=point.x, y=point.y)) for point in predicted_points(answer, annotation)
        ]
    if isinstance(annotation, Tracking):
        return [
            (position.time, Mark(x=position.x, y=position.y, radius=radius, name=str(track.object_id)))
            for tracks, is_true in ((annotation.tracks, True), (predicted_tracks(answer), False))
            for track in tracks
            for position in track.positions
            if position.visible
            for radius in [track.radius if is_true else None]
        ]
    return []


def _marks_at(marks: Sequence[tuple[float, Mark]], time: float) -> list[Mark]:
    """Marks whose time counts as `time`, as in scoring."""
    return [mark for moment, mark in marks if abs(moment - time) < TIME_TOLERANCE_SECONDS]


def _distinct(times: Sequence[float]) -> list[float]:
    """Ascending `times` without those that count as the one before."""
    kept: list[float] = []
    for time in times:
        if not kept or time - kept[-1] >= TIME_TOLERANCE_SECONDS:
            kept.append(time)
    return kept


def _spread(times: Sequence[float]) -> list[float]:
    """At most `_MAX_FRAMES` of `times`, evenly, first and last included."""
    if len(times) <= _MAX_FRAMES:
        return list(times)
    return [times[round(i * (len(times) - 1) / (_MAX_FRAMES - 1))] for i in range(_MAX_FRAMES)]


def _even_times(duration_seconds: float) -> list[float]:
    return [duration_seconds * i / (_MAX_FRAMES - 1) for i in range(_MAX_FRAMES)]
