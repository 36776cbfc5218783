"""Small video files of many kinds, whose frames can be told apart."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import cast

import av
import numpy as np
from av.video.stream import VideoStream

from molmo2core.examples import ByteArray

HEIGHT, WIDTH = 48, 64
_MILLISECOND = Fraction(1, 1000)


def level_frame(number: int, height: int = HEIGHT, width: int = WIDTH) -> ByteArray:
    """Grey of level 20 + 3 * number with a white top left corner: survives lossy coding."""
    pixels = np.full((height, width, 3), 20 + 3 * number, np.uint8)
    pixels[: height // 3, : width // 4] = 255
    return pixels


def level_number(pixels: ByteArray) -> int:
    """The number of a `level_frame`, read off its lower half."""
    return round((float(pixels[pixels.shape[0] // 2 :, pixels.shape[1] // 2 :].mean()) - 20) / 3)


def textured_frame(number: int, height: int = HEIGHT, width: int = WIDTH) -> ByteArray:
    """Coarse noise that drifts, with a new scene every eight frames: every frame differs, and motion is coded."""
    rng = np.random.default_rng(number // 8)
    blocks = rng.integers(0, 256, (-(-height // 8), -(-width // 8), 3), dtype=np.uint8)
    return np.roll(np.kron(blocks, np.ones((8, 8, 1), np.uint8))[:height, :width], 2 * number, axis=1)


def encode_video(
    frames: Sequence[ByteArray],
    *,
    container: str = "mp4",
    codec: str = "libx264",
    pixel_format: str = "yuv420p",
    starts: Sequence[float] | None = None,
    rate: int = 30,
    options: Mapping[str, str] | None = None,
    display: tuple[float, bool, bool] = (0, False, False),
    skip_packets: int = 0,
) -> bytes:
    """A video file.

    Args:
        frames: [height, width, 3] uint8 each.
        container: FFmpeg's name of the format.
        codec: of an encoder.
        pixel_format: of the coded frames.
        starts: seconds at which the frames begin, to a millisecond; default one every 1 / rate.
        rate: frames per second.
        options: of the encoder.
        display: rotation in degrees counter-clockwise, then mirrored left-right, top-bottom.
        skip_packets: leave out so many packets at the start, as a recording does that begins in the middle.
    """
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        stream = cast(VideoStream, output.add_stream(codec, rate=rate))
        stream.height, stream.width, _ = frames[0].shape
        stream.pix_fmt = pixel_format
        stream.codec_context.options = dict(options or {})
        stream.codec_context.thread_count = 1
        tick = Fraction(1, rate)
        if starts is not None:
            stream.time_base = stream.codec_context.time_base = tick = _MILLISECOND
        if display != (0, False, False):
            degrees, left_right, top_bottom = display
            stream.set_display_rotation(degrees, hflip=left_right, vflip=top_bottom)
        position = 0
        for number, pixels in enumerate((*frames, None)):
            frame = None
            if pixels is not None:
                frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format=pixel_format)
                frame.pts = number if starts is None else round(starts[number] / tick)
                frame.time_base = tick
            for packet in stream.encode(frame):
                if position >= skip_packets:
                    output.mux(packet)
                position += 1
    return file.getvalue()
