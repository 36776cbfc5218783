"""Video files from outside: opened so that they reach nothing else, and every packet counted before any is decoded.

Validation and loading open a video here, under the same limits; what they learn of it is a `VideoIndex`: when each
packet's frame is shown and where decoding may start.  Reading it costs microseconds per packet, decoding milliseconds.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from math import floor
from typing import IO, TYPE_CHECKING, Final

import av
import numpy as np
import numpy.typing as npt
from av.error import ArgumentError, FFmpegError
from av.stream import Disposition

from molmo2core.errors import DataError

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.packet import Packet
    from av.video.codeccontext import VideoCodecContext
    from av.video.stream import VideoStream

CONTAINERS: Final = ("mov", "matroska", "mpegts", "mpeg", "avi", "flv", "asf", "ogg", "ivf", "gif")
"""FFmpeg's names of what is opened (mov: MP4, MOV, 3GP; matroska: MKV, WebM; mpeg: MPEG-PS, VOB; asf: WMV).

All hold their own data.  Playlists (HLS, DASH, concat scripts, SDP) name other files or addresses, still pictures and
raw streams have no times: they stay closed.
"""
MAX_FRAME_PIXELS: Final = 8192 * 4320
"""Pixels of a frame at most: 8K.  A decoder holds up to 17 such frames."""
MAX_PACKETS: Final = 1_000_000
"""Packets, that is frames, of a video at most: nine hours at 30 frames per second."""
MAX_DURATION_SECONDS: Final = 86_400.0
"""Length of a video at most: one day."""
MAX_DECODED_PIXELS: Final = 200_000_000_000
"""Pixels that may have to be decoded for the frames of one example: two hours of 720p at 30 frames per second.

A core decodes H.264 at about half a billion pixels a second or more: a loader's worker is never silent for longer than
its timeout.
"""

_NOT_THE_VIDEO = Disposition.attached_pic | Disposition.timed_thumbnails
_JUMPING_CODECS = frozenset(
    {"h264", "hevc", "vp8", "libvpx", "vp9", "libvpx-vp9", "libdav1d", "mpeg4", "mpeg1video", "mpeg2video", "mjpeg"}
)
"""Decoders whose key frames reset everything, tested against decoding from the start.  (APNG's, for one, do not.)"""
_KEPT_BYTES = 64 << 20
"""Packets of files up to this size stay in memory between counting and decoding; larger files are read twice."""

_BUFFER_BYTES = 1 << 18
_USUAL_RATE = Fraction(25)
_MICROSECOND = Fraction(1, 1_000_000)
"""Tolerance: times are floats, ticks are rational."""

Ticks = npt.NDArray[np.int64]


class VideoTooLarge(DataError):
    """A video beyond one of this module's limits."""


@dataclass(frozen=True, kw_only=True, eq=False)
class VideoIndex:
    """The packets of a video in the order of decoding, N of them."""

    tick: Fraction
    """Seconds of one tick."""
    ticks: Ticks
    """[N] when the frame of each packet is shown; if not `timed`, when the n-th frame is shown."""
    timed: bool
    """Whether the container says when frames are shown.  AVI does not."""
    shown: npt.NDArray[np.bool_]
    """[N] False: never shown, as it is cut off by an edit list or stands before the first key frame."""
    entries: Ticks
    """[E] packets at which decoding may start; ascending, at least one."""
    start: int
    """Tick at which the first frame is shown: 0 s of the video as displayed."""
    end: int
    """Tick at which the last frame ends."""

    @property
    def duration_seconds(self) -> float:
        """From the start of the first frame to the end of the last, to a microsecond."""
        return round(float((self.end - self.start) * self.tick), 6)

    @property
    def num_frames(self) -> int:
        """Frames that are shown."""
        return int(self.shown.sum())

    @property
    def fps(self) -> float:
        """Frames per second on average."""
        return float(self.num_frames / ((self.end - self.start) * self.tick)) if self.end > self.start else 0.0

    @property
    def exact(self) -> bool:
        """Each shown packet has a time of its own, so that the frame of an instant is known before decoding."""
        times = self.ticks[self.shown]
        return self.timed and len(np.unique(times)) == len(times)

    def most_packets(self, num_frames: int) -> int:
        """About how many packets have to be decoded at most for `num_frames` frames, whichever they are."""
        if not self.exact:
            return len(self.ticks)
        groups = np.diff(np.append(self.entries, len(self.ticks)))
        return int(np.sort(groups)[-num_frames:].sum())

    def tick_at(self, seconds: float) -> int:
        """The last tick that has begun `seconds` after the start, or begins within a microsecond."""
        return self.start + floor((Fraction(seconds) + _MICROSECOND) / self.tick)


@dataclass(frozen=True, kw_only=True, eq=False)
class VideoFile:
    """An opened video whose limits were checked; one decoding thread, as loader workers are the parallelism."""

    where: str
    container: InputContainer
    stream: VideoStream
    index: VideoIndex
    kept: tuple[Packet[VideoStream], ...] | None
    """All packets, if the file is small."""
    data: bytes

    @property
    def codec(self) -> VideoCodecContext:
        """The decoder."""
        return self.stream.codec_context

    @property
    def pixels(self) -> int:
        """Of one frame, as the header says; larger frames are refused by the decoder."""
        return self.stream.width * self.stream.height

    @contextmanager
    def packets(self) -> Iterator[Iterator[Packet[VideoStream]]]:
        """The packets of `index`, from the first."""
        if self.kept is not None:
            yield iter(self.kept)
            return
        with _opened(self.data) as container:
            stream = next(stream for stream in container.streams.video if stream.index == self.stream.index)
            yield _packets(container, stream)


@contextmanager
def open_video(data: bytes, where: str = "video") -> Iterator[VideoFile]:
    """Open a video and count its packets; everything that FFmpeg raises inside becomes a DataError.

    The video is the first video stream that is marked as the default one, else the first; cover pictures and
    thumbnails are none.

    Args:
        data: the whole file.
        where: named in errors.

    Raises:
        VideoTooLarge: it is beyond one of this module's limits.
        DataError: the bytes are no video, hold no video stream or frame, or do not decode.
    """
    try:
        with _opened(data) as container:
            stream = _video_stream(container, where)
            _check_size(stream.width, stream.height, where)
            index, packets = _read_index(container, stream, keep=len(data) <= _KEPT_BYTES, where=where)
            if index.duration_seconds > MAX_DURATION_SECONDS:
                found = f"{index.duration_seconds:.0f} s of video"
                raise VideoTooLarge(where, found=found, expected=f"at most {MAX_DURATION_SECONDS:.0f} s")
            yield VideoFile(where=where, container=container, stream=stream, index=index, kept=packets, data=data)
    except (FFmpegError, EOFError, ValueError, MemoryError) as error:
        reason = error.strerror if isinstance(error, FFmpegError) else error
        raise DataError(
            where,
            found=f"{len(data)} bytes that do not decode: {reason}",
            expected="a complete video",
        ) from error


def check_cost(num_packets: int, pixels: int, where: str) -> None:
    """Refuse to decode `num_packets` frames of `pixels` pixels if that would take minutes.

    Raises:
        VideoTooLarge: more than MAX_DECODED_PIXELS.
    """
    if num_packets * pixels > MAX_DECODED_PIXELS:
        raise VideoTooLarge(
            where,
            found=f"{num_packets} frames of {pixels} pixels to decode",
            expected=f"at most {MAX_DECODED_PIXELS} pixels",
            mend="cut or scale down the video, or encode it with more key frames",
        )


def _opened(data: bytes) -> InputContainer:
    """No protocol, no other file: the container's own bytes or nothing."""
    try:
        return av.open(
            io.BytesIO(data),
            mode="r",
            options={"max_pixels": str(MAX_FRAME_PIXELS)},  # for the decoders that probe the streams
            container_options={"format_whitelist": ",".join(CONTAINERS), "protocol_whitelist": ""},
            io_open=_refuse,
            buffer_size=_BUFFER_BYTES,
        )
    except ArgumentError:  # what FFmpeg calls a container that is not on the list
        kinds = "a still picture, a playlist, a raw stream or in another container"
        raise ValueError(f"{kinds} than {', '.join(CONTAINERS)}") from None


def _refuse(url: str, _flags: int, _options: dict[str, str]) -> IO[bytes]:
    raise ValueError(f"it refers to another file, {url!r}")


def _video_stream(container: InputContainer, where: str) -> VideoStream:
    streams = [stream for stream in container.streams.video if not stream.disposition & _NOT_THE_VIDEO]
    if not streams:
        found = "no video stream" + (" but a cover picture" if container.streams.video else "")
        raise DataError(where, found=found, expected="a video file")
    stream = next((stream for stream in streams if stream.disposition & Disposition.default), streams[0])
    codec: VideoCodecContext | None = stream.codec_context
    if codec is None:  # the header is cut, or FFmpeg lacks the codec
        raise DataError(where, found="a video stream of unknown codec", expected="a complete video file")
    codec.thread_count = 1
    codec.options = {"max_pixels": str(MAX_FRAME_PIXELS)}
    return stream


def _check_size(width: int, height: int, where: str) -> None:
    if width * height > MAX_FRAME_PIXELS:
        raise VideoTooLarge(
            where, found=f"frames of {width} x {height} pixels", expected=f"at most {MAX_FRAME_PIXELS} pixels"
        )


def _packets(container: InputContainer, stream: VideoStream) -> Iterator[Packet[VideoStream]]:
    return (packet for packet in container.demux(stream) if packet.size)  # an empty one would end decoding


def _read_index(
    container: InputContainer, stream: VideoStream, *, keep: bool, where: str
) -> tuple[VideoIndex, tuple[Packet[VideoStream], ...] | None]:
    kept: list[Packet[VideoStream]] = []
    rows: list[tuple[int | None, int | None, int, bool, bool]] = []
    for packet in _packets(container, stream):
        if len(rows) == MAX_PACKETS:
            raise VideoTooLarge(where, found=f"more than {MAX_PACKETS} frames", expected="at most so many")
        rows.append((packet.pts, packet.dts, packet.duration or 0, packet.is_keyframe, packet.is_discard))
        if keep:
            kept.append(packet)
    if not rows:
        raise DataError(where, found="no frame", expected="a complete video")
    shown_at, decoded_at, durations, keys, discarded = zip(*rows, strict=True)
    timed = None not in shown_at and container.format.name != "avi"
    rate = stream.average_rate or stream.guessed_rate or _USUAL_RATE
    counted = None in decoded_at and not timed
    tick = 1 / rate if counted or stream.time_base is None else stream.time_base
    ticks = np.array(range(len(rows)) if counted else shown_at if timed else sorted(decoded_at), np.int64)
    first, entries = _entries(ticks, np.array(keys), np.array(discarded), stream.codec_context.name, timed)
    shown = ~np.array(discarded) & (np.arange(len(rows)) >= first) & (ticks >= ticks[first])
    if not shown.any():
        raise DataError(where, found="no frame that is shown", expected="a complete video")
    last = int(np.where(shown, ticks, np.iinfo(np.int64).min).argmax())
    index = VideoIndex(
        tick=tick,
        ticks=ticks,
        timed=timed,
        shown=shown,
        entries=entries,
        start=int(ticks[shown].min()),
        end=int(ticks[last]) + (durations[last] or round(1 / rate / tick)),
    )
    return index, tuple(kept) if keep else None


def _entries(
    ticks: Ticks, keys: npt.NDArray[np.bool_], discarded: npt.NDArray[np.bool_], codec: str, timed: bool
) -> tuple[int, Ticks]:
    """The packet at which decoding begins, and all at which it may begin.

    Nothing before the first key frame can be decoded.  Decoding may begin at a later key frame if it is shown and all
    packets before it are shown earlier; what follows it but is shown before it then needs an earlier entry.
    """
    if not timed or codec not in _JUMPING_CODECS or not keys.any():
        return 0, np.zeros(1, np.int64)
    first = int(keys.argmax())
    latest_before = np.maximum.accumulate(ticks[first:])[:-1]
    later = keys[first + 1 :] & ~discarded[first + 1 :] & (ticks[first + 1 :] > latest_before)
    return first, np.concatenate([[first], first + 1 + np.flatnonzero(later)])
