"""The frames that a video shows at given instants: exact, and with as little decoding as that allows.

The frame at an instant is the one that began last; before the first frame it is the first, after the end the last.
Which packet holds it is known from the index, so whole groups of pictures are jumped over, and in H.264 frames that no
other frame refers to are not decoded unless they are wanted.  Whenever the decoder gives anything else than the index
promised, the video is decoded from its start instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, repeat
from typing import TYPE_CHECKING, cast

import numpy as np
from av.sidedata.sidedata import Type as SideData
from av.video.reformatter import VideoReformatter

from molmo2core.errors import DataError
from molmo2core.examples import ByteArray
from molmo2core.video_file import Ticks, VideoFile, VideoIndex, check_cost, open_video

if TYPE_CHECKING:
    from av.buffer import Buffer
    from av.packet import Packet
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream


def decode_frames(data: bytes, times: Sequence[float], where: str = "video") -> Iterator[ByteArray]:
    """The frame shown at each of the ascending `times`, turned and mirrored as displayed.

    Args:
        data: the whole file.
        times: seconds from the start of the first frame.
        where: named in errors.

    Yields:
        [height, width, 3] uint8 RGB; the very same array again while one frame is shown.

    Raises:
        VideoTooLarge: the video, or the work that it would take, is beyond a limit of video_file.
        DataError: no video stream, no frame, or bytes that do not decode without damage.
    """
    with open_video(data, where) as video:
        reformatter = VideoReformatter()  # keeps its tables from frame to frame
        shown: VideoFrame | None = None
        for frame in frames_at(video, times):
            if frame is not shown:
                shown, pixels = frame, displayed(frame, reformatter)
            yield pixels


def displayed(frame: VideoFrame, reformatter: VideoReformatter) -> ByteArray:
    """RGB pixels of a frame as players show it: [height, width, 3] uint8.

    FFmpeg's conversion with its defaults, as PyAV's `to_ndarray` does it: the frame's own matrix and range where they
    are stated, else BT.601 and limited; alpha is dropped, fields stay interleaved, pixels are taken as square.
    """
    pixels = cast(ByteArray, reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray())
    side_data = cast("Mapping[SideData, Buffer]", frame.side_data)
    if SideData.DISPLAYMATRIX not in side_data:
        return pixels
    # Columns and rows of the picture go to a x + c y and b x + d y: quarter turns and mirrors.
    matrix = np.frombuffer(bytes(side_data[SideData.DISPLAYMATRIX]), np.int32).reshape(3, 3)
    (a, b), (c, d) = matrix[:2, :2].tolist()
    if abs(b) > abs(a):
        pixels, a, d = pixels.transpose(1, 0, 2), c, b
    return np.ascontiguousarray(pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1])


@dataclass(frozen=True, kw_only=True)
class _Run:
    """Packets that are decoded one after another."""

    first: int
    last: int
    wanted: tuple[int, ...]
    """Ascending ticks of the frames that are taken."""


def frames_at(video: VideoFile, times: Sequence[float]) -> Iterator[VideoFrame]:
    """The frame shown at each of the ascending `times`; see decode_frames."""
    done = 0
    if video.index.exact:
        for frame in _promised_frames(video, times):
            yield frame
            done += 1
    if done < len(times):
        yield from _walked_frames(video, times[done:])


def _promised_frames(video: VideoFile, times: Sequence[float]) -> Iterator[VideoFrame]:
    """The frame of each time, jumping; ends early when the decoder does not give what the index promised."""
    targets = _targets(video.index, times)
    runs = _runs(video.index, targets)
    check_cost(sum(run.last + 1 - run.first for run in runs), video.pixels, video.where)
    found = _run_frames(video, runs)
    frame: VideoFrame | None = None
    for tick in video.index.ticks[targets].tolist():
        if frame is None or frame.pts != tick:
            frame = next(found, None)
        if frame is None or frame.pts != tick:
            return
        yield frame


def _targets(index: VideoIndex, times: Sequence[float]) -> Ticks:
    """The packet that holds the frame of each time."""
    shown = np.flatnonzero(index.shown)
    shown = shown[np.argsort(index.ticks[shown])]
    limits = [index.tick_at(time) for time in times]
    return shown[np.maximum(np.searchsorted(index.ticks[shown], limits, side="right") - 1, 0)]


def _runs(index: VideoIndex, targets: Ticks) -> list[_Run]:
    """What to decode for the packets `targets`: each from the last entry that is shown no later than it."""
    targets = np.unique(targets)
    targets = targets[np.argsort(index.ticks[targets])]
    wanted = index.ticks[targets]
    entries = np.searchsorted(index.ticks[index.entries], wanted, side="right") - 1
    runs: list[_Run] = []
    for entry, target, tick in zip(entries.tolist(), targets.tolist(), wanted.tolist(), strict=True):
        first = int(index.entries[max(entry, 0)])
        if runs and first <= runs[-1].last:  # it is decoded anyway: go on from there
            before = runs.pop()
            runs.append(_Run(first=before.first, last=max(before.last, target), wanted=(*before.wanted, tick)))
        else:
            runs.append(_Run(first=first, last=target, wanted=(tick,)))
    return runs


def _run_frames(video: VideoFile, runs: Sequence[_Run]) -> Iterator[VideoFrame]:
    """All wanted frames as the decoder gives them; ends early when a run does not begin with its key frame."""
    ticks, begin = video.index.ticks.tolist(), int(video.index.entries[0])
    with video.packets() as packets:
        position = 0
        for run in runs:
            chosen = islice(packets, run.first - position, run.last + 1 - position)
            wanted, key, at_key = set(run.wanted), ticks[run.first], run.first == begin
            for frame in _decoded(video, chosen, (ticks[n] in wanted for n in range(run.first, run.last + 1))):
                if frame.pts is not None and frame.pts < key:
                    continue  # refers to frames before the key frame: not decodable from here, and not wanted
                at_key = at_key or frame.pts == key
                if not at_key:
                    return
                _refuse_damaged(frame, video)
                if frame.pts in wanted:
                    yield frame
            position = run.last + 1


def _walked_frames(video: VideoFile, times: Sequence[float]) -> Iterator[VideoFrame]:
    """The frame of each time, decoding everything."""
    index = video.index
    first = int(index.entries[0])
    check_cost(len(index.ticks) - first, video.pixels, video.where)
    with video.packets() as packets:
        frames = _timed_frames(video, _decoded(video, islice(packets, first, None), repeat(True)))
        following = next(frames, None)
        if following is None:
            raise DataError(video.where, found="no frame that can be decoded", expected="a complete video")
        shown = following[1]
        for time in times:
            limit = index.tick_at(time)
            while following is not None and following[0] <= limit:
                shown = following[1]
                following = next(frames, None)
            yield shown


def _timed_frames(video: VideoFile, frames: Iterator[VideoFrame]) -> Iterator[tuple[int, VideoFrame]]:
    """Frames with the ticks at which they are shown, never descending."""
    index = video.index
    tick = int(index.ticks[0])
    for number, frame in enumerate(frames):
        if not index.timed:
            tick = int(index.ticks[min(number, len(index.ticks) - 1)])
        elif frame.pts is None:
            tick += frame.duration
        elif frame.pts < index.start:
            continue
        else:
            tick = max(tick, frame.pts)
        _refuse_damaged(frame, video)
        yield tick, frame


def _decoded(video: VideoFile, packets: Iterator[Packet[VideoStream]], wanted: Iterable[bool]) -> Iterator[VideoFrame]:
    """What the decoder gives for consecutive packets; in H.264, only wanted frames and those that others refer to."""
    codec = video.codec
    codec.flush_buffers()
    for packet, is_wanted in zip(packets, wanted, strict=False):
        if codec.name == "h264":  # elsewhere "not a reference" is not as strict, or costs nothing
            codec.skip_frame = "DEFAULT" if is_wanted else "NONREF"
        yield from codec.decode(packet)
    yield from codec.decode(None)


def _refuse_damaged(frame: VideoFrame, video: VideoFile) -> None:
    if frame.is_corrupt:
        at = (frame.pts - video.index.start) * video.index.tick if frame.pts is not None else 0
        found = f"a damaged frame at {float(at):.2f} s"
        raise DataError(video.where, found=found, expected="a complete video", mend="deliver it again")
