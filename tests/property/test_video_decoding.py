"""Jumping shows the same frames as decoding everything: random videos, random instants.

Every oracle frame is the one that plain PyAV gives when it decodes the whole file, and pixels are compared byte by
byte.  It catches jumps into groups whose first pictures refer to the one before (open GOP), skipped frames that others
refer to, frames lost or shown early at the end of a run, and times that are rounded.  Files of 64 x 48 pixels and a few
dozen frames take milliseconds each, so many are tried.
"""

from __future__ import annotations

import io
from typing import Any, cast

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from molmo2core import video_decoding, video_file
from molmo2core.examples import ByteArray
from molmo2core.testing.video_files import encode_video, textured_frame
from molmo2core.video_decoding import decode_frames
from molmo2core.video_file import open_video

H264 = st.builds(
    lambda **values: {"codec": "libx264", "options": x264(**values)},
    keyint=st.sampled_from([1, 5, 8, 12, 20, 50]),
    min_keyint=st.sampled_from([1, 4]),
    bframes=st.integers(0, 5),
    b_adapt=st.sampled_from([0, 2]),
    b_pyramid=st.sampled_from(["none", "strict", "normal"]),
    open_gop=st.sampled_from([0, 1]),
    intra_refresh=st.sampled_from([0, 0, 0, 1]),
    tff=st.sampled_from([0, 0, 0, 1]),
    ref=st.integers(1, 5),
    weightp=st.sampled_from([0, 2]),
    scenecut=st.sampled_from([0, 40]),
)
HEVC = st.builds(
    lambda keyint, bframes, open_gop, radl, layers: {
        "codec": "libx265",
        "options": {
            "x265-params": f"log-level=none:keyint={keyint}:min-keyint=1:bframes={bframes}:open-gop={open_gop}:"
            f"radl={0 if open_gop else min(radl, bframes)}:temporal-layers={layers}"
        },
    },
    keyint=st.sampled_from([3, 6, 10, 16, 40]),
    bframes=st.integers(0, 5),
    open_gop=st.sampled_from([0, 1]),
    radl=st.sampled_from([0, 2]),
    layers=st.sampled_from([1, 1, 3]),
)
SIMPLE = st.builds(
    lambda codec, gop, bframes: {
        "codec": codec,
        "container": {"libvpx": "webm", "libvpx-vp9": "webm", "mpeg2video": "mpegts", "mpeg4": "mp4"}[codec],
        "options": {"g": str(gop)}
        | ({"bf": str(bframes)} if codec.startswith("mpeg") else {"auto-alt-ref": "1", "lag-in-frames": "16"})
        | ({"cpu-used": "8", "deadline": "realtime"} if codec == "libvpx-vp9" else {}),
    },
    codec=st.sampled_from(["mpeg4", "mpeg2video", "libvpx", "libvpx-vp9"]),
    gop=st.sampled_from([1, 4, 9, 20]),
    bframes=st.integers(0, 2),
)
GAPS = st.tuples(st.sampled_from([12, 30, 45, 60]), st.integers(0, 99)).map(
    lambda drawn: np.random.default_rng(drawn[1]).choice([0.01, 0.033, 0.04, 0.1, 0.5], drawn[0]).tolist()
)
"""Seconds between one frame and the next."""


def x264(**values: Any) -> dict[str, str]:
    if values["intra_refresh"]:
        values |= {"bframes": 0, "open_gop": 0}
    return {"preset": "ultrafast", "x264-params": ":".join(f"{k.replace('_', '-')}={v}" for k, v in values.items())}


def fully_decoded(data: bytes) -> list[tuple[float, ByteArray]]:
    """Every frame with its seconds since the first."""
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        frames = [
            (cast(float, f.time), cast(ByteArray, f.to_ndarray(format="rgb24"))) for f in container.decode(stream)
        ]
    return [(time - frames[0][0], pixels) for time, pixels in frames]


def check(data: bytes, times: list[float]) -> None:
    truth = fully_decoded(data)
    shown = list(decode_frames(data, times))
    assert len(shown) == len(times)
    for time, frame in zip(times, shown, strict=True):
        expected = next((pixels for start, pixels in reversed(truth) if start <= time + 1e-6), truth[0][1])
        np.testing.assert_array_equal(frame, expected, err_msg=f"{time}")


@pytest.mark.parametrize(
    ("kinds", "containers", "examples"),
    [(H264, ["mp4", "matroska", "mpegts", "flv"], 120), (HEVC, ["mp4", "matroska", "mpegts"], 30), (SIMPLE, [""], 60)],
    ids=["H.264", "HEVC", "others"],
)
def test_jumping_shows_what_decoding_everything_shows(kinds: Any, containers: list[str], examples: int) -> None:
    jumped = []

    @settings(max_examples=examples, deadline=None)
    @given(
        kind=kinds,
        container=st.sampled_from(containers),
        gaps=GAPS,
        first=st.sampled_from([0.0, 0.0, 3.7]),
        parts=st.lists(st.floats(-0.02, 1.02), min_size=1, max_size=9).map(sorted),
        on_frames=st.booleans(),
        kept=st.booleans(),
    )
    def run(
        kind: dict[str, Any],
        container: str,
        gaps: list[float],
        first: float,
        parts: list[float],
        on_frames: bool,
        kept: bool,
    ) -> None:
        starts = np.round(first + np.cumsum([0.0, *gaps]), 3).tolist()
        if kind["codec"].startswith("mpeg"):
            starts = None  # their coded time bases are too coarse for milliseconds
        frames = [textured_frame(number) for number in range(len(gaps) + 1)]
        data = encode_video(frames, starts=starts, **({"container": container} | kind))
        times = [part * (sum(gaps) if starts else len(frames) / 30) for part in parts]
        if on_frames and starts:
            times = [starts[max(0, min(int(part * len(starts)), len(starts) - 1))] - first for part in parts]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(video_file, "_KEPT_BYTES", 1 << 26 if kept else 0)
            check(data, times)
        with open_video(data) as video:
            index = video.index
            jumped.append(len(video_decoding._runs(index, video_decoding._targets(index, times))) > 1)

    run()
    assert sum(jumped) > len(jumped) / 8, "most random instants lie in one group: nothing would be tested"


def test_a_key_frame_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Intra refresh: the muxer marks entries from which the picture only builds up; decoding starts over then."""
    walks = []
    original = video_decoding._walked_frames

    def walked(*arguments: Any) -> Any:
        walks.append(arguments)
        return original(*arguments)

    monkeypatch.setattr(video_decoding, "_walked_frames", walked)
    options = {"x264-params": "keyint=15:intra-refresh=1:bframes=0"}
    data = encode_video([textured_frame(number) for number in range(60)], options=options)
    with open_video(data) as video:
        assert len(video.index.entries) > 1
    check(data, [0.0, 0.71, 1.53])
    assert walks and len(walks[0][1]) < 3, "what was right is not decoded again"
