"""Images and frames with true positions as green rings and predicted ones as red crosses.

A ring is as wide as the radius within which an answer hits.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from molmo2core.annotations import Annotation, Pointing, Tracking
from molmo2core.evaluation.metrics.matching import TIME_TOLERANCE_SECONDS
from molmo2core.evaluation.tasks import predicted_points, predicted_tracks
from molmo2core.examples import ByteArray, Example
from molmo2core.image_decoding import decode_image
from molmo2core.video_decoding import decode_frames

TRUE_COLOUR = (0, 160, 60)
PREDICTED_COLOUR = (220, 30, 30)
_DISPLAY_SIDE = 288  # pixels of the longer side
_MAX_FRAMES = 6
_CROSS_ARM = 7  # pixels
_LINE = 3  # pixels
_NAME_SIZE = 14  # pixels
_EDGE_COLOUR = (255, 255, 255)


@dataclass(frozen=True, kw_only=True)
class Mark:
    """One position to draw on one picture."""

    x: float
    y: float
    radius: float | None = None
    """Fraction of the shorter side: a true position.  None: a predicted one."""
    name: str = ""
    """Object number of a track."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One drawn image or frame."""

    caption: str
    jpeg: bytes


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


def draw_marks(pixels: ByteArray, marks: Iterable[Mark]) -> bytes:
    """A JPEG of `pixels` [height, width, 3], scaled for reading, with `marks`."""
    picture = Image.fromarray(pixels)
    scale = _DISPLAY_SIDE / max(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(picture)
    for mark in marks:
        _draw_mark(pen, mark, width, height)
    written = io.BytesIO()
    picture.save(written, "JPEG", quality=88)
    return written.getvalue()


def _draw_mark(pen: ImageDraw.ImageDraw, mark: Mark, width: int, height: int) -> None:
    """With a white edge: shapes may have the mark's own colour."""
    x, y = mark.x * width, mark.y * height
    if mark.radius is None:
        for colour, arm, line in ((_EDGE_COLOUR, _CROSS_ARM + 2, _LINE + 4), (PREDICTED_COLOUR, _CROSS_ARM, _LINE)):
            pen.line((x - arm, y - arm, x + arm, y + arm), colour, line)
            pen.line((x - arm, y + arm, x + arm, y - arm), colour, line)
        _draw_name(pen, (x + _CROSS_ARM + 2, y), mark.name, PREDICTED_COLOUR)
        return
    ring = mark.radius * min(width, height)
    pen.ellipse((x - ring - 1, y - ring - 1, x + ring + 1, y + ring + 1), outline=_EDGE_COLOUR, width=_LINE + 2)
    pen.ellipse((x - ring, y - ring, x + ring, y + ring), outline=TRUE_COLOUR, width=_LINE)
    _draw_name(pen, (x - ring - 8, y - ring), mark.name, TRUE_COLOUR)


def _draw_name(pen: ImageDraw.ImageDraw, place: tuple[float, float], name: str, colour: tuple[int, int, int]) -> None:
    pen.text(place, name, colour, font_size=_NAME_SIZE, stroke_width=1, stroke_fill=_EDGE_COLOUR)


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
