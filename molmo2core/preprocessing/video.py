"""Videos as frames: which instants, and the frame shown at each (model.md 5.1, 5.3, 5.4)."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from math import ceil

import av
import numpy as np
from av.error import FFmpegError

from molmo2core.errors import DataError
from molmo2core.examples import ByteArray, IntArray
from molmo2core.preprocessing.config import VisualGeometry
from molmo2core.preprocessing.image import patches, resize
from molmo2core.preprocessing.pooling import pooled_size, pooling_index

_EPSILON_SECONDS = 1e-6
"""A frame counts as shown at t if it starts this little later: times are floats, starts are rational."""


def frame_times(duration_seconds: float, max_frames: int, max_fps: float) -> list[float]:
    """Instants at which a video is looked at.

    Every 1 / max_fps seconds and the very last instant; if that is more than `max_frames`, evenly spread instants
    with both ends (model.md 5.1).
    """
    if (max_frames - 1) / max_fps < duration_seconds:
        return [float(t) for t in np.linspace(0, duration_seconds, max_frames)]
    regular = (k / max_fps for k in range(ceil(duration_seconds * max_fps)))
    return [t for t in regular if t < duration_seconds] + [duration_seconds]


def num_frames(duration_seconds: float, max_frames: int, max_fps: float) -> int:
    """How many instants `frame_times` gives."""
    return len(frame_times(duration_seconds, max_frames, max_fps))


def decode_frames(data: bytes, times: Sequence[float], where: str = "video") -> Iterator[ByteArray]:
    """The frame shown at each of the ascending `times`, rotated as displayed.

    The first frame is shown before its start, the last one after its end.  One decoding thread: the loader's worker
    processes are the parallelism.

    Yields:
        [height, width, 3] uint8 RGB.

    Raises:
        DataError: no video stream, no frame, or bytes that do not decode.
    """
    try:
        with av.open(io.BytesIO(data), mode="r") as container:
            if not container.streams.video:
                raise DataError(where, found="no video stream", expected="a video file")
            codec = container.streams.video[0].codec_context
            if codec is None:  # the header is cut, or FFmpeg lacks the codec
                raise DataError(where, found="a video stream of unknown codec", expected="a complete video file")
            codec.thread_count = 1
            yield from _frames_at(_timed_frames(container, where), times)
    except (FFmpegError, EOFError, ValueError) as error:
        raise DataError(
            where, found=f"{len(data)} bytes that do not decode: {error}", expected="a complete video"
        ) from error


def frame_patches(frames: Iterator[ByteArray], geometry: VisualGeometry) -> ByteArray:
    """Each frame squashed to one crop.

    Returns:
        [frames, P, D] uint8.
    """
    size = geometry.crop_size
    return np.stack([patches(resize(frame, size, size), geometry) for frame in frames])


def frame_grid(geometry: VisualGeometry) -> tuple[int, int]:
    """(rows, columns) of visual tokens of one frame."""
    rows, columns = (pooled_size(geometry.grid, size) for size in geometry.video_pooling)
    return rows, columns


def video_pooling(frames: int, geometry: VisualGeometry) -> IntArray:
    """Pooling rows of all frames in order: [V, K] indices into frames * P patches."""
    grid = np.arange(geometry.num_patches, dtype=np.int32).reshape(geometry.grid, geometry.grid)
    one = pooling_index(grid, geometry.video_pooling, geometry.max_pool)
    offsets = np.arange(frames, dtype=np.int32)[:, None, None] * geometry.num_patches
    shifted: IntArray = np.where(one >= 0, one + offsets, one).reshape(-1, one.shape[1]).astype(np.int32)
    return shifted


def _timed_frames(container: av.container.InputContainer, where: str) -> Iterator[tuple[float, av.VideoFrame]]:
    """Frames in the order of display, with seconds since the first."""
    stream = container.streams.video[0]
    start: float | None = None
    for frame in container.decode(stream):
        if frame.time is None:
            raise DataError(where, found="a frame without a time stamp", mend="remux the video")
        start = frame.time if start is None else start
        yield frame.time - start, frame
    if start is None:
        raise DataError(where, found="no frame", expected="a complete video")


def _frames_at(frames: Iterator[tuple[float, av.VideoFrame]], times: Sequence[float]) -> Iterator[ByteArray]:
    """Walk frames and times together; only shown frames are converted to RGB, each once."""
    _, shown = next(frames)
    following = next(frames, None)
    pixels: ByteArray | None = None
    for time in times:
        while following is not None and following[0] <= time + _EPSILON_SECONDS:
            shown, pixels = following[1], None
            following = next(frames, None)
        if pixels is None:
            pixels = _displayed(shown)
        yield pixels


def _displayed(frame: av.VideoFrame) -> ByteArray:
    """RGB pixels after the rotation that the container asks for (counter-clockwise degrees)."""
    pixels = frame.to_ndarray(format="rgb24")
    return np.ascontiguousarray(np.rot90(pixels, round(frame.rotation / 90) % 4))
