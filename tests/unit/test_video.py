"""Which instants of a video are seen, and whether the right frame is seen there, on real H.264 files."""

from __future__ import annotations

import io
from fractions import Fraction

import av
import numpy as np
import pytest

from molmo2core.errors import DataError
from molmo2core.preprocessing.config import VisualGeometry
from molmo2core.preprocessing.video import decode_frames, frame_patches, frame_times, num_frames

HEIGHT, WIDTH = 48, 64


def made_video(starts: list[float], *, rotation: int = 0, first_pts: int = 0) -> bytes:
    """An MP4 whose k-th frame begins at starts[k], is grey of level 20 + 10 k, and has a white top left corner."""
    stream = io.BytesIO()
    with av.open(stream, "w", format="mp4") as container:
        video = container.add_stream("libx264", rate=30)
        video.width, video.height, video.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        video.time_base = video.codec_context.time_base = Fraction(1, 1000)
        if rotation:
            video.set_display_rotation(rotation)
        for number, start in enumerate(starts):
            pixels = np.full((HEIGHT, WIDTH, 3), 20 + 10 * number, np.uint8)
            pixels[:16, :16] = 255
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = first_pts + round(start * 1000), Fraction(1, 1000)
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
    return stream.getvalue()


def numbers(data: bytes, times: list[float]) -> list[int]:
    """Which frame was shown at each time, read off its grey level."""
    return [round((float(frame[24:40, 24:40].mean()) - 20) / 10) for frame in decode_frames(data, times)]


@pytest.mark.parametrize(
    ("duration", "budget", "count", "first", "last"),
    [
        (0.0, 8, 1, [0.0], [0.0]),
        (0.1, 8, 2, [0.0, 0.1], [0.0, 0.1]),
        (1.0, 8, 3, [0.0, 0.5, 1.0], [0.0, 0.5, 1.0]),
        (1.5, 8, 4, [0.0, 0.5, 1.0], [0.5, 1.0, 1.5]),
        (2.001, 8, 6, [0.0, 0.5, 1.0], [1.5, 2.0, 2.0]),
        (10, 128, 21, [0.0, 0.5, 1.0], [9.0, 9.5, 10.0]),
        (63.5, 128, 128, [0.0, 0.5, 1.0], [62.5, 63.0, 63.5]),
        (63.6, 128, 128, [0.0, 0.5, 1.0], [62.6, 63.1, 63.6]),
        (63.6, 384, 129, [0.0, 0.5, 1.0], [63.0, 63.5, 63.6]),
        (191.5, 384, 384, [0.0, 0.5, 1.0], [190.5, 191.0, 191.5]),
        (192, 384, 384, [0.0, 0.5, 1.0], [191.0, 191.5, 192.0]),
        (600, 128, 128, [0.0, 4.7, 9.4], [600.0]),
        (600, 384, 384, [0.0, 1.6, 3.1], [600.0]),
    ],
)
def test_golden_times(duration: float, budget: int, count: int, first: list[float], last: list[float]) -> None:
    """The table of model.md 5.1; catches a missing last instant and a wrong switch to even spreading."""
    printed = [float(f"{time:.1f}") for time in frame_times(duration, budget, 2.0)]
    assert len(printed) == num_frames(duration, budget, 2.0) == count
    assert printed[: len(first)] == first and printed[-len(last) :] == last


def test_frame_on_screen_is_shown() -> None:
    """Variable frame rate: the frame that began last before t, not the nearest and not the k-th."""
    data = made_video([0.0, 0.1, 0.9, 1.0, 2.5])
    assert numbers(data, [0.0, 0.05, 0.1, 0.5, 0.89, 0.9, 0.95, 1.0, 2.4, 2.5]) == [0, 0, 1, 1, 1, 2, 2, 3, 3, 4]


def test_last_instant_shows_the_last_frame() -> None:
    """The sampler asks for the very end, where no frame begins."""
    data = made_video([k / 10 for k in range(10)])
    assert numbers(data, [0.0, 0.5, 1.0, 99.0]) == [0, 5, 9, 9]


def test_time_counts_from_the_first_frame() -> None:
    data = made_video([0.0, 0.5, 1.0], first_pts=5000)
    assert numbers(data, [0.0, 0.5, 1.0]) == [0, 1, 2]


@pytest.mark.parametrize(
    ("rotation", "shape", "corner"),
    [
        (0, (HEIGHT, WIDTH), (0, 0)),
        (90, (WIDTH, HEIGHT), (-1, 0)),
        (180, (HEIGHT, WIDTH), (-1, -1)),
        (-90, (WIDTH, HEIGHT), (0, -1)),
    ],
)
def test_rotation_is_applied(rotation: int, shape: tuple[int, int], corner: tuple[int, int]) -> None:
    """Counter-clockwise degrees; a wrong direction would put every point on the other side."""
    (frame,) = decode_frames(made_video([0.0, 0.5], rotation=rotation), [0.0])
    assert frame.shape == (*shape, 3)
    bright = {place for place in ((0, 0), (0, -1), (-1, 0), (-1, -1)) if frame[place].mean() > 200}
    assert bright == {corner}


def test_a_frame_becomes_one_crop() -> None:
    geometry = VisualGeometry(crop_size=54, patch_size=6, overlap_margins=(1, 1))
    crops = frame_patches(decode_frames(made_video([0.0, 0.5, 1.0]), [0.0, 0.5, 1.0]), geometry)
    assert crops.shape == (3, 81, 108) and crops.dtype == np.uint8
    assert [round((float(crop[40].mean()) - 20) / 10) for crop in crops] == [0, 1, 2]


def sound_only() -> bytes:
    stream = io.BytesIO()
    with av.open(stream, "w", format="wav") as container:
        sound = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(sound.encode(frame))
    return stream.getvalue()


@pytest.mark.parametrize(
    ("bad", "found"),
    [
        (b"", "do not decode"),
        (b"no video at all", "do not decode"),
        (made_video([k / 10 for k in range(20)])[:1500], "(do not decode|unknown codec)"),
        (sound_only(), "no video stream"),
    ],
    ids=["empty", "text", "truncated", "sound"],
)
def test_broken_videos_are_data_errors(bad: bytes, found: str) -> None:
    """FFmpeg has many exception types; the loader replaces only media that raise DataError."""
    with pytest.raises(DataError, match=rf"^d/7: .*{found}"):
        list(decode_frames(bad, [0.0], "d/7"))
