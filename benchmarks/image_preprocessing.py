"""How fast images become crops, beside transformers' own Molmo2 image processor, on the same photographs.

    python benchmarks/image_preprocessing.py [--max-crops 8] [--seconds 3]

Both sides give the same bytes (checked here once per photograph).  "pixels" starts from a decoded picture, as each
side likes it best (transformers: a Pillow image or a tensor, the faster one); "file" starts from the JPEG, which
transformers reads either with Pillow or with torchvision, again the faster one.  Every process uses one thread.  The
table is one core: processor time, the median of interleaved rounds.  Below it, all photographs in turn in one process
and in two at once, by the clock.  The last line is the ratio that a loader sees: images per second from files, the
geometric mean over the photographs of ours over transformers', on one core.
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers.image_utils import load_image
from transformers.models.molmo2.image_processing_molmo2 import Molmo2ImageProcessor

from molmo2core.examples import ByteArray, IntArray
from molmo2core.image_decoding import decode_image
from molmo2core.preprocessing.config import VisualGeometry
from molmo2core.preprocessing.image import choose_tiling, image_crops, image_pooling
from molmo2core.testing.pictures import grown_photograph, photographs

GEOMETRY = VisualGeometry()
GROWN = {"1024 x 768": (1024, 768), "1920 x 1080": (1920, 1080), "4000 x 3000": (4000, 3000)}
ROUNDS = 7
NATIVE_FILE = ("native, file by Pillow", "native, file by torchvision")
HEADER = (
    f"{'ms, one core':<16}{'crops':>6}{'pixels':>9}{'native':>9}{'ratio':>7}{'file':>9}{'native':>9}{'ratio':>7}"
    f"{'decoding':>10}"
)
Work = Callable[[], object]


def pictures() -> dict[str, bytes]:
    """Photographs as they ship, and grown to usual sizes."""
    small = photographs()
    return small | {name: grown_photograph(small["temple"], *size) for name, size in GROWN.items()}


def crops_of(pixels: ByteArray, max_crops: int) -> tuple[ByteArray, IntArray]:
    """All that we do after decoding."""
    tiling = choose_tiling(pixels.shape[0], pixels.shape[1], GEOMETRY, max_crops)
    return image_crops(pixels, tiling, GEOMETRY), image_pooling(tiling, GEOMETRY)


def ways(data: bytes, path: str, max_crops: int) -> dict[str, Work]:
    """What is timed, by name; `ours` first."""
    native = Molmo2ImageProcessor(max_crops=max_crops)
    pixels = decode_image(data)
    image, tensor = Image.fromarray(pixels), torch.from_numpy(pixels.copy()).permute(2, 0, 1)
    return {
        "ours, pixels": lambda: crops_of(pixels, max_crops),
        "native, Pillow": lambda: native(images=[image], return_tensors="pt"),
        "native, tensor": lambda: native(images=[tensor], return_tensors="pt"),
        "ours, file": lambda: crops_of(decode_image(data), max_crops),
        "native, file by Pillow": lambda: native(
            images=[load_image(Image.open(io.BytesIO(data)))], return_tensors="pt"
        ),
        "native, file by torchvision": lambda: native(images=[path], return_tensors="pt"),
        "decoding": lambda: decode_image(data),
    }


def check_equal(data: bytes, path: str, max_crops: int) -> None:
    """Raise if the two sides differ in a byte or an index."""
    crops, pooling = crops_of(decode_image(data), max_crops)
    theirs = Molmo2ImageProcessor(max_crops=max_crops)(images=[path], return_tensors="pt")
    np.testing.assert_array_equal(crops, np.rint((theirs["pixel_values"].numpy() + 1) * 127.5))
    np.testing.assert_array_equal(pooling[:, :4], theirs["image_token_pooling"].numpy())


def median_seconds(works: dict[str, Work]) -> dict[str, float]:
    """Processor seconds of each, in rounds that take turns, so that a disturbed moment disturbs all."""
    found: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(ROUNDS + 1):  # the first one warms up
        for name, work in works.items():
            started = time.process_time()
            work()
            found[name].append(time.process_time() - started)
    return {name: statistics.median(seconds[1:]) for name, seconds in found.items()}


def images_per_second(folder: str, way: str, max_crops: int, seconds: float) -> float:
    """One process that takes all files in turn."""
    torch.set_num_threads(1)
    paths = sorted(Path(folder).iterdir())
    works = [ways(path.read_bytes(), str(path), max_crops)[way] for path in paths]
    for work in works:
        work()
    count, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        for work in works:
            work()
        count += len(works)
    return count / (time.perf_counter() - started)


def line(name: str, crops: str, spent: tuple[float, float, float, float], decoding: str) -> str:
    """Milliseconds ours and native, from pixels and from the file, with their ratios."""
    pixels, native, file, native_file = spent
    return (
        f"{name:<16}{crops:>6}{pixels:>9.2f}{native:>9.2f}{native / pixels:>7.2f}"
        f"{file:>9.2f}{native_file:>9.2f}{native_file / file:>7.2f}{decoding:>10}"
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-crops", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement of all photographs in turn")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        print(HEADER)
        rows: list[tuple[float, float, float, float]] = []
        for name, data in pictures().items():
            path = Path(folder) / f"{name.replace(' ', '')}.jpg"
            path.write_bytes(data)
            check_equal(data, str(path), options.max_crops)
            spent = {way: 1000 * s for way, s in median_seconds(ways(data, str(path), options.max_crops)).items()}
            rows.append(
                (
                    spent["ours, pixels"],
                    min(spent["native, Pillow"], spent["native, tensor"]),
                    spent["ours, file"],
                    min(spent[way] for way in NATIVE_FILE),
                )
            )
            crops = len(crops_of(decode_image(data), options.max_crops)[0])
            print(line(name, str(crops), rows[-1], f"{spent['decoding']:.2f}"))
        means = [statistics.geometric_mean(column) for column in zip(*rows, strict=True)]
        print(line("geometric mean", "", (means[0], means[1], means[2], means[3]), ""))
        for processes in (1, 2):
            rates = {}
            for way in ("ours, file", *NATIVE_FILE):
                with multiprocessing.get_context("spawn").Pool(processes) as pool:
                    jobs = [(folder, way, options.max_crops, options.seconds)] * processes
                    rates[way] = sum(pool.starmap(images_per_second, jobs))
            ours, native = rates["ours, file"], max(rates[way] for way in NATIVE_FILE)
            print(
                f"{processes} process(es), all in turn: {ours:.1f} images/s, transformers {native:.1f}, "
                f"ratio {ours / native:.2f}"
            )
        print(f"ratio {means[3] / means[2]:.2f}")


if __name__ == "__main__":
    main()
