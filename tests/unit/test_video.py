"""Whether the right frame, the right way up, is seen at each instant of real files of many kinds."""

from __future__ import annotations

import io
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, cast

import av
import numpy as np
import pytest
from av.audio.stream import AudioStream
from av.video.stream import VideoStream

from molmo2core import video_decoding, video_file
from molmo2core.errors import DataError
from molmo2core.examples import ByteArray
from molmo2core.preprocessing.config import VisualGeometry
from molmo2core.preprocessing.video import frame_patches
from molmo2core.testing.video_files import HEIGHT, WIDTH, encode_video, level_frame, level_number, textured_frame
from molmo2core.video_decoding import decode_frames
from molmo2core.video_file import open_video

GEOMETRY = VisualGeometry(crop_size=54, patch_size=6, overlap_margins=(1, 1))


def made_video(starts: Sequence[float], **options: Any) -> bytes:
    """A video whose k-th frame begins at starts[k] and shows the number k."""
    return encode_video([level_frame(number) for number in range(len(starts))], starts=starts, **options)


def numbers(data: bytes, times: Sequence[float]) -> list[int]:
    """Which frame was shown at each time."""
    return [level_number(frame) for frame in decode_frames(data, times)]


def fully_decoded(data: bytes) -> list[tuple[float, ByteArray]]:
    """Every frame with its seconds since the first, as plain PyAV gives them."""
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        frames = [(frame.time, frame.to_ndarray(format="rgb24")) for frame in container.decode(stream)]
    return [(cast(float, time) - cast(float, frames[0][0]), cast(ByteArray, pixels)) for time, pixels in frames]


def test_frame_on_screen_is_shown() -> None:
    """Variable frame rate: the frame that began last before t, not the nearest and not the k-th."""
    data = made_video([0.0, 0.1, 0.9, 1.0, 2.5])
    assert numbers(data, [0.0, 0.05, 0.1, 0.5, 0.89, 0.9, 0.95, 1.0, 2.4, 2.5]) == [0, 0, 1, 1, 1, 2, 2, 3, 3, 4]


def test_before_the_start_and_after_the_end() -> None:
    """The sampler asks for the very end, where no frame begins."""
    data = made_video([k / 10 for k in range(10)])
    assert numbers(data, [-1.0, 0.0, 0.5, 1.0, 99.0]) == [0, 0, 5, 9, 9]


@pytest.mark.parametrize("container", ["mp4", "matroska", "mpegts"])
@pytest.mark.parametrize("first", [5.0, -2.0], ids=["late", "negative"])
def test_time_counts_from_the_first_frame(container: str, first: float) -> None:
    """Streams that do not start at 0, with B-frames; an edit list cuts off what lies before 0 in an MP4."""
    data = made_video([first + k / 10 for k in range(30)], container=container)
    shown = numbers(data, [0.0, 0.05, 0.1, 0.55, 0.9])
    cut = 20 if container == "mp4" and first < 0 else 0
    assert shown == [cut + k for k in (0, 0, 1, 5, 9)]
    with open_video(data) as video:
        assert video.index.duration_seconds == pytest.approx((30 - cut) / 10, abs=0.07)
        assert video.index.num_frames == 30 - cut


def test_an_edit_list_in_the_middle_of_a_group() -> None:
    """Frames before the cut are needed for decoding and must neither be shown nor counted."""
    data = made_video([-0.35 + k / 10 for k in range(40)], options={"g": "100", "bf": "2"})
    with open_video(data) as video:
        assert not video.index.shown.all()
        first = 40 - video.index.num_frames
    assert numbers(data, [0.0, 0.1, 1.0]) == [first, first + 1, first + 10]


def test_one_frame_is_one_array() -> None:
    """Duplicates are neither converted nor resized again; an equal copy would be."""
    data = made_video([0.0, 1.0, 2.0])
    frames = list(decode_frames(data, [0.0, 0.4, 0.8, 1.0, 1.9, 2.0, 9.0]))
    assert [len({id(f) for f in part}) for part in (frames[:3], frames[3:5], frames[5:])] == [1, 1, 1]
    assert len({id(frame) for frame in frames}) == 3


@pytest.mark.parametrize(
    ("degrees", "left_right", "top_bottom", "corner"),
    [
        (0, False, False, (0, 0)),
        (90, False, False, (-1, 0)),
        (180, False, False, (-1, -1)),
        (-90, False, False, (0, -1)),
        (0, True, False, (0, -1)),
        (0, False, True, (-1, 0)),
        (90, True, False, (-1, -1)),
        (90, False, True, (0, 0)),
    ],
)
def test_display_matrix_is_applied(degrees: int, left_right: bool, top_bottom: bool, corner: tuple[int, int]) -> None:
    """Counter-clockwise, then mirrored: all eight ways; a wrong one would put every point on another side.

    The whole picture is compared with numpy's, so that a corner that happens to fit does not pass.
    """
    data = made_video([0.0, 0.5], display=(degrees, left_right, top_bottom))
    (frame,) = decode_frames(data, [0.0])
    (plain,) = decode_frames(made_video([0.0, 0.5]), [0.0])
    expected = np.rot90(plain, degrees // 90)
    expected = expected[:, ::-1] if left_right else expected
    expected = expected[::-1] if top_bottom else expected
    np.testing.assert_array_equal(frame, expected)
    bright = {place for place in ((0, 0), (0, -1), (-1, 0), (-1, -1)) if frame[place].mean() > 200}
    assert bright == {corner}


KINDS: dict[str, dict[str, Any]] = {
    "H.264 in MP4": {"options": {"g": "12"}},
    "H.264 in MKV": {"container": "matroska", "options": {"g": "12"}},
    "H.264 in MPEG-TS": {"container": "mpegts", "options": {"g": "12"}},
    "H.264 in FLV": {"container": "flv", "options": {"g": "12"}},
    "H.264 open GOP": {"options": {"g": "12", "x264-params": "open-gop=1"}},
    "H.264 interlaced": {"options": {"g": "12", "x264-params": "tff=1"}},
    "H.264 10 bit": {"pixel_format": "yuv420p10le"},
    "H.264 4:4:4": {"pixel_format": "yuv444p"},
    "H.264 4:2:2": {"pixel_format": "yuv422p"},
    "H.264 grey": {"pixel_format": "gray"},
    "H.264 NV12": {"pixel_format": "nv12"},
    "H.264 full range": {"pixel_format": "yuvj420p"},
    "H.264 RGB": {"codec": "libx264rgb", "pixel_format": "rgb24", "options": {"g": "12"}},
    "HEVC": {"codec": "libx265", "options": {"x265-params": "log-level=none:keyint=12"}},
    "VP8 in WebM": {"container": "webm", "codec": "libvpx", "options": {"g": "12"}},
    "VP9 in WebM": {"container": "webm", "codec": "libvpx-vp9", "options": {"g": "12", "cpu-used": "8"}},
    "VP9 in IVF": {"container": "ivf", "codec": "libvpx-vp9", "options": {"g": "12", "cpu-used": "8"}},
    "MPEG-4 in MP4": {"codec": "mpeg4", "options": {"g": "12", "bf": "2", "q:v": "2"}},
    "MPEG-4 in AVI": {"container": "avi", "codec": "mpeg4", "options": {"g": "12", "bf": "2"}},
    "H.264 in AVI": {"container": "avi", "options": {"g": "12"}},
    "MPEG-2 in MPEG-TS": {"container": "mpegts", "codec": "mpeg2video", "options": {"g": "12", "bf": "2"}},
    "MPEG-2 in MPEG-PS": {"container": "vob", "codec": "mpeg2video", "options": {"g": "12", "bf": "2"}},
    "WMV": {"container": "asf", "codec": "wmv2", "options": {"g": "12"}},
    "Motion JPEG": {"container": "avi", "codec": "mjpeg", "pixel_format": "yuvj420p"},
    "ProRes in MOV": {"container": "mov", "codec": "prores_ks", "pixel_format": "yuv422p10le"},
    "FFV1, BGRA": {"container": "matroska", "codec": "ffv1", "pixel_format": "bgra"},
    "VP8 in Ogg": {"container": "ogg", "codec": "libvpx", "options": {"g": "12"}},
    "GIF": {"container": "gif", "codec": "gif", "pixel_format": "rgb8", "rate": 10},
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_files(kind: str) -> None:
    """Every instant of a second shows the frame that the encoder was given for it, whatever the container says."""
    rate = KINDS[kind].get("rate", 30)
    count = 40 if rate == 30 else 20
    data = encode_video([level_frame(number) for number in range(count)], **KINDS[kind])
    with open_video(data) as video:
        assert video.index.num_frames == count
        assert video.index.duration_seconds == pytest.approx(count / rate, abs=0.04)
        assert video.index.fps == pytest.approx(rate, rel=0.03)
    wanted = [0, 1, 5, 13, 14, count - 1]
    # a third into each frame: WebM's milliseconds and GIF's hundredths begin frames a little off
    found = numbers(data, [(number + 0.34) / rate for number in wanted])
    tolerance = 3 if kind in ("GIF", "WMV", "MPEG-4 in AVI", "MPEG-4 in MP4") else 1  # their quantisers are coarse
    if kind != "H.264 grey":  # swscale makes grey of full range, which the file does not say
        assert [abs(a - b) <= tolerance for a, b in zip(found, wanted, strict=True)] == [True] * len(wanted), found
    if kind not in ("H.264 in AVI", "MPEG-4 in AVI"):  # PyAV tells no usable times there
        truth = fully_decoded(data)
        times = sorted((number + 0.34) / rate for number in range(0, count, 3))
        for time, frame in zip(times, decode_frames(data, times), strict=True):
            np.testing.assert_array_equal(frame, next(p for t, p in reversed(truth) if t <= time + 1e-6))


def test_av1() -> None:
    """The encoder prints to standard error, so it stands alone."""
    frames = [level_frame(number, 64, 64) for number in range(24)]
    data = encode_video(frames, codec="libsvtav1", options={"g": "8", "preset": "12"})
    with open_video(data) as video:
        assert video.codec.name == "libdav1d" and len(video.index.entries) > 1
    assert numbers(data, [0.34 / 30, 9.34 / 30, 23.34 / 30]) == [0, 9, 23]


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 9), (35, 51), (2, 300)])
def test_odd_sizes(height: int, width: int) -> None:
    frames = [textured_frame(number, height, width) for number in range(4)]
    data = encode_video(frames, container="matroska", codec="ffv1", pixel_format="bgra")
    for frame, shown in zip(frames, decode_frames(data, [(k + 0.3) / 30 for k in range(4)]), strict=True):
        np.testing.assert_array_equal(shown, frame)
    assert frame_patches(decode_frames(data, [0.0]), 1, GEOMETRY).shape == (1, 81, 108)


def test_stated_matrix_and_range_are_used() -> None:
    """Red decodes to red when the file says how it was coded: BT.601 or BT.709, limited or full range."""
    red = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    red[:] = (230, 20, 40)
    for matrix, space, full in (("bt709", 1, False), ("smpte170m", 6, False), ("bt709", 1, True)):
        file = io.BytesIO()
        with av.open(file, "w", format="mp4") as output:
            stream = cast(VideoStream, output.add_stream("libx264", rate=10))
            stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv444p"
            stream.codec_context.options = {"colorspace": matrix, "color_range": "pc" if full else "tv", "crf": "4"}
            frame = av.VideoFrame.from_ndarray(red, format="rgb24").reformat(
                format="yuv444p", dst_colorspace=space, dst_color_range="JPEG" if full else "MPEG"
            )
            output.mux(stream.encode(frame))
            output.mux(stream.encode(None))
        (shown,) = decode_frames(file.getvalue(), [0.0])
        assert np.abs(shown.reshape(-1, 3).mean(axis=0) - red[0, 0]).max() < 4, (matrix, full)


def muxed(*streams: str) -> bytes:
    """An MP4 with the named streams in this order: `video`, `other` (shows 40), `sound`, `cover` (shows 60)."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as output:
        made: list[tuple[str, VideoStream | AudioStream]] = []
        for name in streams:
            if name == "sound":
                made.append((name, cast(AudioStream, output.add_stream("aac", rate=8000, layout="mono"))))
                continue
            codec = "mjpeg" if name == "cover" else "libx264"
            stream = cast(VideoStream, output.add_stream(codec, rate=10))
            stream.height, stream.width = HEIGHT, WIDTH
            stream.pix_fmt = "yuvj420p" if name == "cover" else "yuv420p"
            stream.disposition = av.stream.Disposition[  # type: ignore[attr-defined]
                {"cover": "attached_pic", "video": "default", "other": "forced"}[name]
            ]
            made.append((name, stream))
        for name, stream in made:
            if isinstance(stream, AudioStream):
                sound = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), format="fltp", layout="mono")
                sound.sample_rate = 8000
                output.mux(stream.encode(sound))
                continue
            for number in range(1 if name == "cover" else 10):
                shown = {"cover": 60, "other": 40, "video": 0}[name] + number
                frame = av.VideoFrame.from_ndarray(level_frame(shown), format="rgb24")
                frame.pts, frame.time_base = number, Fraction(1, 10)
                output.mux(stream.encode(frame))
        for _, stream in made:
            output.mux(stream.encode(None))
    return file.getvalue()


@pytest.mark.parametrize(
    ("streams", "first"),
    [
        ("sound video", 0),
        ("cover video", 0),
        ("video cover", 0),
        ("cover sound other video", 0),
        ("other sound", 40),
        ("other other", 40),
    ],
)
def test_the_video_among_other_streams(streams: str, first: int) -> None:
    """Cover pictures are no videos; of several videos the one that is marked as the default, else the first."""
    assert numbers(muxed(*streams.split()), [0.0, 0.5]) == [first, first + 5]


@pytest.mark.parametrize("streams", ["sound", "cover", "sound cover"])
def test_no_video_among_the_streams(streams: str) -> None:
    with pytest.raises(DataError, match=r"^d/7: no video stream( but a cover picture)?; expected a video file$"):
        list(decode_frames(muxed(*streams.split()), [0.0], "d/7"))


def test_a_recording_that_begins_in_the_middle() -> None:
    """What stands before the first key frame cannot be decoded: the video begins with that key frame."""
    frames = [level_frame(number) for number in range(40)]
    data = encode_video(frames, container="mpegts", options={"g": "15", "x264-params": "repeat-headers=1"})
    cut = encode_video(
        frames, container="mpegts", options={"g": "15", "x264-params": "repeat-headers=1"}, skip_packets=4
    )
    with open_video(cut) as video:
        assert video.index.num_frames < 36
        first = 40 - video.index.num_frames
    assert first == 15
    assert numbers(cut, [0.34 / 30, 5.34 / 30]) == [15, 20] and numbers(data, [0.34 / 30]) == [0]


@pytest.mark.parametrize("times", [[None] * 10, [k // 2 for k in range(10)]], ids=["none", "doubled"])
def test_missing_and_doubled_times(monkeypatch: pytest.MonkeyPatch, times: list[int | None]) -> None:
    """No time: frames follow one another.  One time for two frames: the later one is shown."""
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as output:
        stream = cast(VideoStream, output.add_stream("ffv1", rate=10))
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "bgra"
        for number in range(10):
            frame = av.VideoFrame.from_ndarray(level_frame(number), format="rgb24").reformat(format="bgra")
            frame.pts, frame.time_base = number, Fraction(1, 10)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    packets = video_file._packets

    def stamped(container: Any, stream: Any) -> Any:
        for packet, time in zip(packets(container, stream), times, strict=True):
            packet.pts = packet.dts = None if time is None else 100 * time
            yield packet

    monkeypatch.setattr(video_file, "_packets", stamped)
    shown = numbers(file.getvalue(), [0.01, 0.11, 0.25, 0.45, 2.0])
    assert shown == ([0, 1, 2, 4, 9] if None in times else [1, 3, 5, 9, 9])


def test_jumping_saves_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the whole design is for; without it every test of equality passes as well."""
    decoded: list[int] = []

    def counted(video: Any, packets: Any, wanted: Any) -> Any:
        def count(stream: Any) -> Any:
            for packet in stream:
                decoded.append(packet.pts)
                yield packet

        return original(video, count(packets), wanted)

    original = video_decoding._decoded
    monkeypatch.setattr(video_decoding, "_decoded", counted)
    data = encode_video([textured_frame(number) for number in range(120)], options={"g": "12", "sc_threshold": "0"})
    list(decode_frames(data, [0.0, 2.0, 2.01, 3.9]))
    assert len(decoded) <= 1 + 12 + 12
    decoded.clear()
    list(decode_frames(data, [k / 30 for k in range(120)]))
    assert len(decoded) == 120, "a frame is decoded once"


def test_large_files_are_read_twice_instead_of_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    data = made_video([k / 10 for k in range(30)], options={"g": "7"})
    kept = numbers(data, [0.3, 1.1, 2.9])
    monkeypatch.setattr(video_file, "_KEPT_BYTES", 0)
    with open_video(data) as video:
        assert video.kept is None
    assert numbers(data, [0.3, 1.1, 2.9]) == kept == [3, 11, 29]


def test_a_frame_becomes_one_crop() -> None:
    data = made_video([0.0, 0.5, 1.0])
    crops = frame_patches(decode_frames(data, [0.0, 0.2, 0.5, 1.0]), 4, GEOMETRY)
    assert crops.shape == (4, 81, 108) and crops.dtype == np.uint8
    assert [round((float(crop[40].mean()) - 20) / 3) for crop in crops] == [0, 0, 1, 2]
