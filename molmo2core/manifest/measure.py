"""Open media files as training will, and say what they are or why they cannot be used."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING

import av

from molmo2core.annotations import MediaKind
from molmo2core.errors import DataError
from molmo2core.image_decoding import MAX_PIXELS, TooManyPixels, decode_image

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.stream import VideoStream

_TAIL_SECONDS = 2.0
_MISSING_TAIL_SECONDS = 0.5
"""A video whose last frame ends earlier than this before its stated end has lost data."""


@dataclass(frozen=True, kw_only=True)
class FileFacts:
    """What one media file turned out to be.  Exactly one of `size` and `fault` is set."""

    size: tuple[int, int] | None = None
    """Displayed (width, height), after EXIF or video rotation."""
    duration_seconds: float = 0.0
    """Of a video: end of the last frame, counted from the start of the first."""
    fault: str = ""
    """Rule that the file breaks: `missing_file`, `empty_file`, `broken_file` or `oversized_file`."""
    details: str = ""


def measure_file(content: bytes, kind: MediaKind) -> FileFacts:
    """Decode `content` far enough to trust it: an image whole, a video at its start and end.

    Args:
        content: encoded bytes.
        kind: `video`, else an image is expected.
    """
    if not content:
        return FileFacts(fault="empty_file", details="the file has no bytes")
    try:
        return _video_facts(content) if kind == "video" else _image_facts(content)
    except TooManyPixels as error:
        return FileFacts(fault="oversized_file", details=f"{error.found}, more than {MAX_PIXELS}")
    except DataError as error:
        return FileFacts(fault="broken_file", details=f"cannot be decoded: {error.found}")
    except (OSError, ValueError, EOFError, av.FFmpegError) as error:
        return FileFacts(fault="broken_file", details=f"cannot be decoded: {error}")


def _image_facts(content: bytes) -> FileFacts:
    height, width, _ = decode_image(content).shape  # whole, as the loader does: of a truncated file the header is fine
    return FileFacts(size=(width, height))


def _video_facts(content: bytes) -> FileFacts:
    if missing := _bytes_missing_in_mp4(content):
        return FileFacts(fault="broken_file", details=f"truncated: at least {missing} bytes are missing at its end")
    with av.open(io.BytesIO(content), mode="r") as container:
        if not container.streams.video:
            return FileFacts(fault="broken_file", details="has no video stream")
        if container.format.name.endswith("_pipe"):
            return FileFacts(fault="broken_file", details=f"is a still picture ({container.format.name}), no video")
        stream = container.streams.video[0]
        if stream.width * stream.height > MAX_PIXELS:
            return _oversized(stream.width, stream.height)
        first = next(container.decode(stream), None)
        if first is None or first.time is None:
            return FileFacts(fault="broken_file", details="has no frame that can be decoded")
        stated = _stated_duration(container, stream)
        end = _end_of_last_frame(container, stream, stated) - first.time
        if stated and end < stated - _MISSING_TAIL_SECONDS:
            details = f"ends after {end:.2f} s although its header states {stated:.2f} s: truncated"
            return FileFacts(fault="broken_file", details=details)
        size = (first.height, first.width) if first.rotation % 180 else (first.width, first.height)
        return FileFacts(size=size, duration_seconds=round(stated or end, 6))


def _bytes_missing_in_mp4(content: bytes) -> int:
    """How far the last box of an MP4 (or MOV) reaches beyond the end of the file; 0 for other containers."""
    if content[4:8] != b"ftyp":
        return 0
    position = 0
    while position + 8 <= len(content):
        size = int.from_bytes(content[position : position + 4], "big")
        if size == 1:  # a 64-bit size follows
            size = int.from_bytes(content[position + 8 : position + 16], "big")
        if size < 8:  # 0: up to the end of the file; else nonsense, left to the decoder
            return 0
        position += size
    return max(position - len(content), 0)


def _stated_duration(container: InputContainer, stream: VideoStream) -> float:
    """Seconds; 0 when the header does not say."""
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    return (container.duration or 0) / 1_000_000


def _end_of_last_frame(container: InputContainer, stream: VideoStream, stated: float) -> float:
    """Seconds; decodes only the tail of a long video."""
    if stated > 2 * _TAIL_SECONDS and stream.time_base:
        container.seek(round((stated - _TAIL_SECONDS) / stream.time_base), stream=stream)
    else:
        container.seek(0)
    end = 0.0
    for frame in container.decode(stream):
        if frame.time is not None and frame.time_base is not None:
            end = max(end, frame.time + float((frame.duration or 0) * frame.time_base))
    return end


def _oversized(width: int, height: int) -> FileFacts:
    return FileFacts(fault="oversized_file", details=f"{width} x {height} pixels, more than {MAX_PIXELS}")
