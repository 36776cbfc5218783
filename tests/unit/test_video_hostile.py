"""Hostile and damaged videos: a typed error or the right number of frames, in bounded time and memory.

All files are opened in one child process whose address space is limited and whose every case is timed; a crash, a hang
or an allocation of gigabytes ends it and names the case.  The child is this very file, run as a program.
"""

from __future__ import annotations

import io
import json
import os
import re
import resource
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, cast

import av
import numpy as np
import pytest

from molmo2core import video_file
from molmo2core.errors import DataError
from molmo2core.manifest.measure import measure_file
from molmo2core.testing.video_files import encode_video, level_frame, textured_frame
from molmo2core.video_decoding import decode_frames
from molmo2core.video_file import VideoTooLarge, check_cost, open_video

EXTRA_BYTES = 1 << 30
"""What the child may map beyond what its modules need."""
CASE_SECONDS = 10.0
TIMES = [k / 2 for k in range(9)]


def probe(folder: Path) -> None:
    """The child: one JSON line for each file, before and after it is opened."""
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + EXTRA_BYTES, size + EXTRA_BYTES))
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        print(json.dumps({"case": path.name}), flush=True)
        started = time.monotonic()
        facts = measure_file(data, "video")
        try:
            outcome, details = "frames", str(sum(1 for _ in decode_frames(data, TIMES, path.name)))
        except DataError as error:
            outcome, details = type(error).__name__, str(error)
        seconds = time.monotonic() - started
        line = {"case": path.name, "outcome": outcome, "details": details, "fault": facts.fault, "seconds": seconds}
        print(json.dumps(line | {"measured": facts.details or str(facts.duration_seconds)}), flush=True)


def run_child(folder: Path, seconds: float) -> dict[str, dict[str, Any]]:
    command = [sys.executable, __file__, str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    child = subprocess.run(command, capture_output=True, text=True, timeout=seconds, env=environment, check=False)
    lines = [json.loads(line) for line in child.stdout.splitlines()]
    assert child.returncode == 0, (lines[-1:], child.stderr[-2000:])
    found = {line["case"]: line for line in lines if "outcome" in line}
    slow = {name: line["seconds"] for name, line in found.items() if line["seconds"] > CASE_SECONDS}
    assert not slow and len(found) == len(list(folder.iterdir()))
    return found


def video(count: int = 60, **options: Any) -> bytes:
    return encode_video([textured_frame(number) for number in range(count)], **options)


MP4 = video(options={"g": "20"})
ONE_GROUP = {"g": "9999", "preset": "ultrafast", "sc_threshold": "0"}
CONTAINERS = {
    "mp4": MP4,
    "mkv": video(container="matroska", options={"g": "20"}),
    "ts": video(container="mpegts", options={"g": "20"}),
    "webm": video(container="webm", codec="libvpx", options={"g": "20"}),
    "avi": video(container="avi", codec="mpeg4", options={"g": "20"}),
    "gif": video(20, container="gif", codec="gif", pixel_format="rgb8", rate=10),
}


def box(data: bytes, name: bytes) -> int:
    """Where the content of an MP4's box begins."""
    return data.index(name) + 4


def patched(data: bytes, position: int, content: bytes) -> bytes:
    return data[:position] + content + data[position + len(content) :]


def long_header() -> bytes:
    """10^6 s in the headers (as much as fits into 32 bits), two seconds of frames."""
    data, million = MP4, 1_000_000
    for name, at, scale_at in ((b"mvhd", 16, 12), (b"mdhd", 16, 12)):
        scale = int.from_bytes(data[box(data, name) + scale_at :][:4], "big")
        data = patched(data, box(data, name) + at, min(million * scale, 2**32 - 2).to_bytes(4, "big"))
    scale = int.from_bytes(data[box(data, b"mvhd") + 12 :][:4], "big")
    data = patched(data, box(data, b"tkhd") + 20, (million * scale).to_bytes(4, "big"))
    return patched(data, box(data, b"elst") + 8, (million * scale).to_bytes(4, "big"))


def no_frames(container: str) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        stream = cast(Any, output.add_stream("libx264", rate=10))
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        output.start_encoding()
    return file.getvalue()


def sound_only() -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format="wav") as output:
        stream = cast(Any, output.add_stream("pcm_s16le", rate=8000, layout="mono"))
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        sound.sample_rate = 8000
        output.mux(stream.encode(sound))
    return file.getvalue()


def external_reference() -> bytes:
    """A QuickTime file whose samples are said to lie in another file."""
    url = b"\x00\x00\x00\x0curl \x00\x00\x00\x01"  # 1: in this file
    name = b"file:///etc/hostname\x00"
    entry = (12 + len(name)).to_bytes(4, "big") + b"url \x00\x00\x00\x00" + name
    assert MP4.count(url) == 1
    data, grown = MP4.replace(url, entry), len(entry) - len(url)
    for parent in (b"dref", b"dinf", b"minf", b"mdia", b"trak", b"moov"):
        start = data.index(parent) - 4
        data = patched(data, start, (int.from_bytes(data[start : start + 4], "big") + grown).to_bytes(4, "big"))
    return data


def hostile() -> dict[str, bytes]:
    """Name -> content; what is expected of each stands in the tests below."""
    rng = np.random.default_rng(0)
    cases = {
        "empty": b"",
        "text": b"no video at all " * 100,
        "zeros": bytes(100_000),
        "noise": rng.integers(0, 256, 100_000, dtype=np.uint8).tobytes(),
        "no frames in mp4": no_frames("mp4"),
        "no frames in mkv": no_frames("matroska"),
        "sound only": sound_only(),
        "long mp4 header": long_header(),
        "long mkv header": CONTAINERS["mkv"].replace(b"00:00:02.0", b"99:00:00.0"),
        "long gap": encode_video([level_frame(k) for k in range(4)], starts=[0, 1, 2, 1e6], container="matroska"),
        "one frame": video(1),
        "one pixel": encode_video([level_frame(0, 1, 1)] * 30, container="matroska", codec="ffv1", pixel_format="bgra"),
        "1000 frames per second": encode_video(
            [level_frame(k % 60) for k in range(4000)], rate=1000, options={"preset": "ultrafast"}
        ),
        "one group of 3000": encode_video([level_frame(k % 60) for k in range(3000)], options=ONE_GROUP),
        "huge gif": patched(CONTAINERS["gif"], 6, b"\xff\xff\xff\xff"),
        "huge mp4": patched(MP4, box(MP4, b"avc1") + 24, b"\xff\xff\xff\xff"),
        "billions of samples": patched(MP4, box(MP4, b"stsz") + 8, b"\xff\xff\xff\xf0"),
        "billions of equal samples": patched(MP4, box(MP4, b"stsz") + 4, b"\x00\x00\x00\x01\xff\xff\xff\xf0"),
        "billions of durations": patched(MP4, box(MP4, b"stts") + 8, b"\xff\xff\xff\xf0"),
        "index outside": patched(MP4, box(MP4, b"stco") + 8, b"\x7f\xff\xff\xff"),
        "index at the start": patched(MP4, box(MP4, b"stco") + 8, b"\x00\x00\x00\x00"),
        "no index in avi": CONTAINERS["avi"][: CONTAINERS["avi"].rindex(b"idx1")],
        "no cues in mkv": CONTAINERS["mkv"].replace(b"\x1c\x53\xbb\x6b", b"\x1c\x53\xbb\x6c"),
        "external reference": external_reference(),
        "still picture": b"\x89PNG\r\n\x1a\n" + bytes(100),
        "raw stream": video(container="h264"),
        "m3u8": b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:///etc/hostname\n#EXT-X-ENDLIST\n",
        "concat": b"ffconcat version 1.0\nfile '/etc/hostname'\n",
        "dash": b"<?xml version='1.0'?><MPD xmlns='urn:mpeg:dash:schema:mpd:2011' type='static'><Period><AdaptationSet>"
        b"<Representation id='1' mimeType='video/mp4'><BaseURL>file:///etc/hostname</BaseURL></Representation>"
        b"</AdaptationSet></Period></MPD>",
    }
    for name, data in CONTAINERS.items():
        for part in range(1, 16):
            cases[f"cut {name} {part:02}"] = data[: len(data) * part // 16]
        for seed in range(12):
            damaged, places = bytearray(data), np.random.default_rng(seed).integers(200, len(data) - 8, 6)
            for place in places.tolist():
                damaged[place : place + 4] = np.random.default_rng(place).bytes(4)
            cases[f"damaged {name} {seed:02}"] = bytes(damaged)
    header = MP4.index(b"moov")
    for seed in range(60):
        damaged, places = bytearray(MP4), np.random.default_rng(seed).integers(header, len(MP4), 3)
        for place in places.tolist():
            damaged[place] = 255 - damaged[place]
        cases[f"header {seed:02}"] = bytes(damaged)
    return cases


@pytest.fixture(scope="module")
def probed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("hostile")
    for name, data in hostile().items():
        (folder / name).write_bytes(data)
    return run_child(folder, seconds=120.0)


REFUSED = {
    "empty": "do not decode",
    "text": "do not decode",
    "zeros": "do not decode",
    "noise": "do not decode",
    "no frames in mp4": "no video stream",
    "no frames in mkv": "do not decode",
    "sound only": "a raw stream or in another container",
    "huge gif": "do not decode|65535 x 65535",
    "still picture": "a still picture, a playlist",
    "raw stream": "a still picture, a playlist, a raw stream",
    "m3u8": "do not decode",
    "concat": "a still picture, a playlist",
    "dash": "do not decode",
}
SEEN = ("one frame", "one pixel", "1000 frames per second", "one group of 3000", "no index in avi", "no cues in mkv")


@pytest.mark.parametrize("name", REFUSED)
def test_refused(probed: dict[str, dict[str, Any]], name: str) -> None:
    """A DataError that names the file and says why, and validation quarantines it."""
    found = probed[name]
    assert found["outcome"] in ("DataError", "VideoTooLarge") and found["fault"], found
    assert re.match(rf"^{name}: .*({REFUSED[name]})", found["details"]), found


@pytest.mark.parametrize("name", SEEN)
def test_odd_but_good(probed: dict[str, dict[str, Any]], name: str) -> None:
    found = probed[name]
    assert (found["outcome"], found["details"], found["fault"]) == ("frames", "9", ""), found


def test_headers_that_lie(probed: dict[str, dict[str, Any]]) -> None:
    """Frames tell how long a video is; a header that says more means that something is missing."""
    assert (probed["long mp4 header"]["fault"], probed["long mp4 header"]["measured"]) == ("", "2.0")
    assert probed["long mkv header"]["fault"] == "broken_file" and "truncated" in probed["long mkv header"]["measured"]
    assert probed["long mkv header"]["outcome"] == "frames", "what is there can be seen, in no more time"
    assert probed["long gap"]["outcome"] == "VideoTooLarge" and probed["long gap"]["fault"] == "oversized_file"
    for name in ("billions of samples", "billions of equal samples", "billions of durations", "index outside"):
        assert probed[name]["outcome"] in ("DataError", "VideoTooLarge", "frames"), probed[name]
        assert probed[name]["fault"] or probed[name]["outcome"] == "frames"


def test_cut_files(probed: dict[str, dict[str, Any]]) -> None:
    """Cut at many places: never anything but frames or a DataError; an MP4 whose end is missing is always noticed."""
    cut = {name: found for name, found in probed.items() if name.startswith("cut")}
    assert len(cut) == 15 * len(CONTAINERS)
    assert {found["outcome"] for found in cut.values()} <= {"DataError", "frames"}
    assert all(found["fault"] == "broken_file" for name, found in cut.items() if name.startswith("cut mp4"))
    noticed = [name for name, found in cut.items() if found["fault"]]
    assert len(noticed) > len(cut) / 2, noticed


def test_damaged_files(probed: dict[str, dict[str, Any]]) -> None:
    damaged = [found for name, found in probed.items() if name.startswith(("damaged", "header"))]
    assert {found["outcome"] for found in damaged} <= {"DataError", "VideoTooLarge", "frames"}
    assert sum(found["outcome"] == "DataError" for found in damaged) > len(damaged) / 3, "damage is mostly noticed"


def test_damage_between_key_frame_and_shown_frame() -> None:
    """What FFmpeg notices and patches up is refused where it leads to what is shown, and harmless elsewhere."""
    with open_video(MP4) as opened:
        assert opened.kept is not None
        places = {packet.pts: (cast(int, packet.pos), packet.size) for packet in opened.kept}
    position, size = places[sorted(places)[20]]  # a key frame at 0.67 s
    noticed = 0
    for seed in range(12):
        bad = patched(MP4, position + size // 2, np.random.default_rng(seed).bytes(size // 3))
        assert sum(1 for _ in decode_frames(bad, [0.0, 0.4, 1.5])) == 3
        with av.open(io.BytesIO(bad)) as container:
            is_noticed = any(frame.is_corrupt for frame in container.decode(video=0))
        noticed += is_noticed
        if is_noticed:
            with pytest.raises(DataError, match=r"^d/7: a damaged frame at 0\.67 s"):
                list(decode_frames(bad, [0.0, 0.73], "d/7"))
        else:
            assert sum(1 for _ in decode_frames(bad, [0.0, 0.73])) == 2
    assert 0 < noticed < 12, "both cases occurred"


def test_nothing_else_is_read(tmp_path: Path) -> None:
    """References to a pipe (opening it would hang) and to a server (that would notice) lead nowhere."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.05)
        port = server.getsockname()[1]
        folder = tmp_path / "cases"
        folder.mkdir()
        for number, address in enumerate((str(pipe), f"file://{pipe}", f"http://127.0.0.1:{port}/x.mp4")):
            for name, text in {
                "m3u8": f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{address}\n#EXT-X-ENDLIST\n",
                "concat": f"ffconcat version 1.0\nfile '{address}'\n",
                "sdp": f"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video {port} RTP/AVP 96\n"
                "a=rtpmap:96 H264/90000\n",
            }.items():
                (folder / f"{name} {number}").write_bytes(text.encode())
        (folder / "reference").write_bytes(external_reference().replace(b"/etc/hostname", str(pipe).encode()[:13]))
        found = run_child(folder, seconds=30.0)
        with pytest.raises(TimeoutError):
            server.accept()
    assert all(line["outcome"] == "DataError" for name, line in found.items() if name != "reference")


def test_work_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    """Too many pixels to decode are refused before the first; what can be jumped over does not count."""
    check_cost(216_000, 1280 * 720, "v")
    with pytest.raises(VideoTooLarge, match=r"^v: 218000 frames of 921600 pixels to decode"):
        check_cost(218_000, 1280 * 720, "v")
    with open_video(video(options={"g": "12", "sc_threshold": "0"})) as opened:
        index = opened.index
        assert (index.most_packets(1), index.most_packets(2), index.most_packets(384)) == (12, 24, 60)
    with open_video(CONTAINERS["avi"]) as opened:
        assert opened.index.most_packets(1) == 60
    monkeypatch.setattr(video_file, "MAX_DECODED_PIXELS", 30 * 64 * 48)
    assert sum(1 for _ in decode_frames(MP4, [0.0, 0.7])) == 2
    assert measure_file(MP4, "video").fault == "oversized_file"
    for data in (MP4, CONTAINERS["avi"]):
        with pytest.raises(VideoTooLarge, match="to decode"):
            list(decode_frames(data, TIMES))
    monkeypatch.setattr(video_file, "MAX_PACKETS", 59)
    with pytest.raises(VideoTooLarge, match="more than 59 frames"):
        list(decode_frames(MP4, [0.0]))


def test_a_frame_that_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The header promises small frames, the stream holds large ones: the decoder refuses them."""
    monkeypatch.setattr(video_file, "MAX_FRAME_PIXELS", 64 * 48)
    small = video(10, container="mpegts", options={"x264-params": "repeat-headers=1"})
    frames = [textured_frame(number, 96, 128) for number in range(10)]
    large = encode_video(frames, container="mpegts", options={"x264-params": "repeat-headers=1"})
    assert sum(1 for _ in decode_frames(small, [0.0, 0.3])) == 2
    with pytest.raises(DataError):
        list(decode_frames(small + large, [0.0, 0.5]))
    with pytest.raises(VideoTooLarge, match="128 x 96"):
        list(decode_frames(large, [0.0]))


if __name__ == "__main__":
    probe(Path(sys.argv[1]))
