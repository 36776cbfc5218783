"""How fast videos become crops, and in how much memory, beside transformers' own Molmo2 video processor.

    python benchmarks/video_decoding.py [--rounds 3]

The clips are 720p H.264 at 30 frames per second, three B-frames, a photograph that the camera pans over with a moving
patch: 10, 60 and 600 s, with a key frame every 12 and every 250 frames.  Up to 128 frames at 2 per second are taken, by
number as transformers takes them, so that both sides give the same bytes (checked here); training's own times cost
the same.  Every way runs in processes of its own, pinned to one core: processor time of the best round, and peak
memory above what imports and the file take.

    ours                jump to what is needed, decode it, resize as it comes
    no jumping          the same, but decode from the start
    transformers, PyAV  its processor behind its PyAV reader
    ..., torchvision    its default reader without torchcodec, which holds every frame of the file: 10 s only
    needed, decoding    the frames that must be decoded, and nothing else: the decoder's own limit
    all, decoding       plain decoding of the whole file

Below the table: samples per second by the clock of two processes on two cores, 10 s clips.  The last line is the
geometric mean of transformers' (PyAV) seconds over ours.
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import av
import numpy as np

from molmo2core import video_decoding
from molmo2core.examples import ByteArray
from molmo2core.image_decoding import decode_image
from molmo2core.preprocessing.config import PreprocessingConfig, VisualGeometry
from molmo2core.preprocessing.frame_times import sampled_times, shown_instants
from molmo2core.preprocessing.video import frame_patches
from molmo2core.testing.pictures import grown_photograph, photographs
from molmo2core.video_file import open_video

RATE, HEIGHT, WIDTH, MAX_FRAMES = 30, 720, 1280, 128
CONFIG = PreprocessingConfig(max_frames=MAX_FRAMES, frame_sampling="as_native_processor")
CLIPS = [(10, 12), (10, 250), (60, 12), (60, 250), (600, 12), (600, 250)]
PART_SECONDS = 25
"""Longer clips repeat a part of this length: three groups of 250 frames."""


def make_part(seconds: int, group: int) -> bytes:
    """An encoded part of a clip."""
    picture = decode_image(grown_photograph(photographs()["temple"], 2400, 1400))
    output = io.BytesIO()
    with av.open(output, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=RATE)
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        stream.codec_context.options = {"preset": "veryfast", "bf": "3", "x264-params": f"keyint={group}:scenecut=0"}
        stream.codec_context.thread_type = "FRAME"  # one slice per frame, as most files have
        for number in range(seconds * RATE):
            y, x = round(300 + 250 * np.sin(number / 70)), round(500 + 450 * np.sin(number / 110))
            pixels = picture[y : y + HEIGHT, x : x + WIDTH].copy()
            y, x = number * 5 % (HEIGHT - 160), number * 9 % (WIDTH - 160)
            pixels[y : y + 160, x : x + 160] = (number % 255, 40, 200)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    return output.getvalue()


def repeated(part: bytes, times: int) -> bytes:
    """The part several times in one file, without encoding it again."""
    output = io.BytesIO()
    with av.open(output, "w", format="mp4") as container:
        stream: Any = None
        shift = 0
        for _ in range(times):
            with av.open(io.BytesIO(part)) as source:
                stream = stream or container.add_stream_from_template(source.streams.video[0])
                length = cast(int, source.streams.video[0].duration)
                for packet in source.demux(video=0):
                    if packet.size:
                        packet.pts, packet.dts = cast(int, packet.pts) + shift, cast(int, packet.dts) + shift
                        packet.stream = stream
                        container.mux(packet)
            shift += length
    return output.getvalue()


def instants(data: bytes) -> list[float]:
    """When the frames are shown that both sides take."""
    with open_video(data) as video:
        duration, fps = video.index.duration_seconds, video.index.fps
    return shown_instants(sampled_times(duration, CONFIG, fps=fps), CONFIG, fps)


def ours(data: bytes, _path: str, times: Sequence[float]) -> ByteArray:
    """The whole way, as the loader takes it."""
    return frame_patches(video_decoding.decode_frames(data, times), len(times), VisualGeometry())


def without_jumping(data: bytes, path: str, times: Sequence[float]) -> ByteArray:
    """The same with every frame decoded up to the last one that is shown."""
    video_decoding._promised_frames = lambda video, times: iter(())
    return ours(data, path, times)


def native(reader: str) -> Callable[[bytes, str, Sequence[float]], ByteArray]:
    """transformers' reader and processor."""

    def run(_data: bytes, path: str, _times: Sequence[float]) -> ByteArray:
        from transformers.models.molmo2.video_processing_molmo2 import Molmo2VideoProcessor
        from transformers.video_utils import load_video

        half = [0.5, 0.5, 0.5]
        processor = Molmo2VideoProcessor(
            num_frames=MAX_FRAMES, max_fps=2.0, do_rescale=True, do_normalize=True, image_mean=half, image_std=half
        )
        warnings.simplefilter("ignore")
        if reader == "torchvision":
            crops = processor(videos=[path], return_tensors="pt")
        else:
            frames, metadata = load_video(path, backend=reader, sample_indices_fn=processor.sample_frames)
            crops = processor(videos=[frames], video_metadata=[metadata], do_sample_frames=False, return_tensors="pt")
        return cast(ByteArray, crops["pixel_values_videos"].numpy())

    return run


def needed_alone(data: bytes, _path: str, times: Sequence[float]) -> None:
    """Decode what is needed and drop it."""
    with open_video(data) as video:
        runs = video_decoding._runs(video.index, video_decoding._targets(video.index, times))
        for _ in video_decoding._run_frames(video, runs):
            pass


def all_alone(data: bytes, _path: str, _times: Sequence[float]) -> None:
    """Decode everything and drop it."""
    with av.open(io.BytesIO(data)) as container:
        container.streams.video[0].thread_count = 1
        for _ in container.decode(video=0):
            pass


WAYS: dict[str, Callable[[bytes, str, Sequence[float]], object]] = {
    "ours": ours,
    "no jumping": without_jumping,
    "transformers, PyAV": native("pyav"),
    "transformers, torchvision": native("torchvision"),
    "needed, decoding": needed_alone,
    "all, decoding": all_alone,
}


def measured(way: str, path: str, rounds: int, core: int) -> tuple[float, float, float]:
    """Of the best round in this process: processor seconds, seconds by the clock; and peak bytes of all."""
    import torch

    torch.set_num_threads(1)
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[core]})
    if way.startswith("transformers"):
        import transformers.models.molmo2.video_processing_molmo2  # noqa: F401
    data = Path(path).read_bytes()
    times = instants(data)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = peak_bytes()
    spent, clock = [], []
    for _ in range(rounds):
        started, started_clock = time.process_time(), time.perf_counter()
        WAYS[way](data, path, times)
        spent.append(time.process_time() - started)
        clock.append(time.perf_counter() - started_clock)
    return min(spent), min(clock), peak_bytes() - before


def peak_bytes() -> int:
    """Most memory that this process has held at once."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def in_processes(way: str, path: str, rounds: int, count: int = 1) -> list[tuple[float, float, float]]:
    """`measured` in fresh processes, one per core."""
    with multiprocessing.get_context("spawn").Pool(count) as pool:
        return pool.starmap(measured, [(way, path, rounds, core) for core in range(count)])


def check_equal(path: Path) -> None:
    """Raise if transformers gives other bytes."""
    data = path.read_bytes()
    found, expected = ours(data, str(path), instants(data)), native("pyav")(b"", str(path), [])
    np.testing.assert_array_equal(found, np.rint((expected * 0.5 + 0.5) * 255))


def clips(folder: Path) -> Iterator[tuple[str, Path]]:
    """Name and file of each clip."""
    parts = {group: make_part(PART_SECONDS, group) for group in {group for _, group in CLIPS}}
    for seconds, group in CLIPS:
        path = folder / f"{seconds}-{group}.mp4"
        whole = make_part(seconds, group) if seconds < PART_SECONDS else repeated(parts[group], seconds // PART_SECONDS)
        path.write_bytes(whole)
        yield f"{seconds} s, key frame every {group}, {8 * len(whole) / seconds / 1e6:.1f} Mbit/s", path


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        for name, path in clips(Path(folder)):
            seconds_of_clip = int(path.stem.split("-")[0])
            print(name, flush=True)
            if seconds_of_clip <= 60:
                check_equal(path)
            spent: dict[str, float] = {}
            for way in WAYS:
                if way.endswith("torchvision") and seconds_of_clip > 10:
                    continue
                ((spent[way], _, memory),) = in_processes(way, str(path), 1 if seconds_of_clip > 60 else rounds)
                rate = seconds_of_clip * RATE / spent[way]
                ratio = spent[way] / spent["ours"]
                print(f"  {way:<26}{spent[way]:>8.3f} s{rate:>9.0f} frames/s{memory / 2**20:>8.0f} MiB{ratio:>8.2f}")
            ratios.append(spent["transformers, PyAV"] / spent["ours"])
        for path in (Path(folder) / "10-12.mp4", Path(folder) / "10-250.mp4"):
            rates = {
                way: sum(1 / clock for _, clock, _ in in_processes(way, str(path), rounds, 2))
                for way in ("ours", "transformers, PyAV")
            }
            line = ", ".join(f"{way} {rate:.2f}" for way, rate in rates.items())
            print(f"two processes, {path.stem}: {line} samples/s")
    print(f"ratio {statistics.geometric_mean(ratios):.2f}")


if __name__ == "__main__":
    main()
