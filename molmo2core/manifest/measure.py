"""Open media files as training will, and say what they are or why they cannot be used."""

from __future__ import annotations

import re
from dataclasses import dataclass

from av.video.reformatter import VideoReformatter

from molmo2core.annotations import MediaKind
from molmo2core.errors import DataError
from molmo2core.image_decoding import TooManyPixels, decode_image
from molmo2core.video_decoding import displayed, frames_at
from molmo2core.video_file import VideoFile, VideoTooLarge, check_cost, open_video

_MOST_FRAMES = 384
"""Frames of a video that any published stage takes."""
_MATROSKA_DURATION = re.compile(r"([0-9]+):([0-9]{2}):([0-9]{2}\.[0-9]+)")
_MISSING_TAIL_SECONDS = 0.5
"""A video whose last frame ends earlier than this before its stated end has lost data."""


@dataclass(frozen=True, kw_only=True)
class FileFacts:
    """What one media file turned out to be.  Exactly one of `size` and `fault` is set."""

    size: tuple[int, int] | None = None
    """Displayed (width, height), after EXIF or video rotation."""
    duration_seconds: float = 0.0
    """Of a video: end of the last frame, counted from the start of the first."""
    fps: float = 0.0
    """Of a video: frames per second on average."""
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
    except (TooManyPixels, VideoTooLarge) as error:
        return FileFacts(fault="oversized_file", details=f"{error.found}, allowed {error.expected}")
    except DataError as error:
        return FileFacts(fault="broken_file", details=f"cannot be decoded: {error.found}")


def _image_facts(content: bytes) -> FileFacts:
    height, width, _ = decode_image(content).shape  # whole, as the loader does: of a truncated file the header is fine
    return FileFacts(size=(width, height))


def _video_facts(content: bytes) -> FileFacts:
    if missing := _bytes_missing_in_mp4(content):
        return FileFacts(fault="broken_file", details=f"truncated: at least {missing} bytes are missing at its end")
    with open_video(content) as video:
        index, stated = video.index, _stated_duration(video)
        if index.duration_seconds < stated - _MISSING_TAIL_SECONDS:
            details = f"ends after {index.duration_seconds:.2f} s although its header states {stated:.2f} s: truncated"
            return FileFacts(fault="broken_file", details=details)
        check_cost(index.most_packets(_MOST_FRAMES), video.pixels, video.where)
        first, _ = frames_at(video, [0.0, index.duration_seconds])
        height, width, _ = displayed(first, VideoReformatter()).shape
        return FileFacts(size=(width, height), duration_seconds=index.duration_seconds, fps=index.fps)


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


def _stated_duration(video: VideoFile) -> float:
    """Seconds that the header says the video lasts; 0 when it says nothing, or only how long all streams last."""
    stream = video.stream
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    if stated := _MATROSKA_DURATION.fullmatch(stream.metadata.get("DURATION", "")):
        hours, minutes, seconds = stated.groups()
        return int(hours) * 3600 + int(minutes) * 60 + float(seconds)
    alone = len(video.container.streams) == 1
    return (video.container.duration or 0) / 1_000_000 if alone else 0.0
