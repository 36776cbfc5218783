"""How fast media on disk become shards, beside a plain copy of the same files.

    python benchmarks/shard_writing.py [--megabytes 1000] [--kilobytes 250] [--rounds 3] [--s3]

Media are random bytes, as JPEGs are to a writer; each row has a caption of 60 words and four questions.  "copy" is
shutil.copyfile of each file.  Writers read the files, compare their checksums, bound the lengths of all annotations,
write shards with checksums and commit them; starting the processes is included.  All files are in the page cache and
nothing is synced to disk.  Rounds take turns; given is the median by the clock, and processor time over all processes.
"bounds" is the part of it that bounds the lengths of annotations, which grows with rows and not with bytes.
With --s3 the shards go to an S3 server (moto) on this machine, and the copy to the same server, file by file.
The last lines are the ratios: MB/s of shards over MB/s of the copy.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from molmo2core import storage
from molmo2core.examples import Example
from molmo2core.shards.config import ShardsConfig
from molmo2core.shards.manifest_parts import manifest_parts, measure_rows
from molmo2core.shards.parts import build_shards
from molmo2core.shards.writer import sample_lengths
from molmo2core.testing.tiny_tokenizer import tiny_tokenizer

ANNOTATIONS = [
    {"task": "image_caption", "text": "a red circle on the left of two blue squares " * 6},
    *({"task": "image_qa", "question": f"What colour is shape {n}?", "answer": "red"} for n in range(4)),
]


def make_corpus(folder: Path, megabytes: int, kilobytes: int) -> Path:
    """Media and their validated manifest."""
    rng = np.random.default_rng(0)
    (folder / "media").mkdir()
    lines, left = [], megabytes * 1_000_000
    while left > 0:
        content = rng.bytes(int(rng.uniform(0.4, 1.6) * kilobytes * 1000))
        name = folder / "media" / f"{len(lines)}.jpg"
        name.write_bytes(content)
        left -= len(content)
        row = {
            "id": str(len(lines)),
            "split": "train",
            "media": {"kind": "image", "files": [str(name)]},
            "annotations": ANNOTATIONS,
            "license": "CC0-1.0",
            "source": "benchmark",
            "measured": {"sizes": [[640, 480]], "sha256": [hashlib.sha256(content).hexdigest()]},
        }
        lines.append(json.dumps(row))
    manifest = folder / "benchmark.jsonl"
    manifest.write_text("\n".join(lines) + "\n")
    return manifest


def copy(manifest: Path, place: str) -> None:
    """Each file as it is."""
    files = sorted((manifest.parent / "media").iterdir())
    if storage.is_remote(place):
        for file in files:
            storage.write_bytes(storage.join(place, file.name), file.read_bytes())
        return
    Path(place).mkdir(parents=True)
    for file in files:
        shutil.copyfile(file, Path(place) / file.name)


def write(manifest: Path, place: str, writers: int) -> None:
    """As the stage does."""
    sizes = measure_rows(str(manifest), print)
    parts = manifest_parts(str(manifest), str(manifest.parent), sizes, ShardsConfig().shard_bytes)
    build_shards(storage.join(place, "x"), parts, tokenizer=tiny_tokenizer(), meta={}, writers=writers)


def processor_seconds() -> float:
    """Of this process and of those that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def bounding_seconds(examples: Iterable[Example]) -> float:
    """For one row."""
    held = list(examples)
    used = processor_seconds()
    for example in held:
        sample_lengths(example, tiny_tokenizer())
    return (processor_seconds() - used) / len(held)


@contextmanager
def s3_server() -> Iterator[str]:
    """A bucket on a server in a process of its own."""
    server = subprocess.Popen(
        [sys.executable, "-c", "from moto.server import main; main()", "-H", "127.0.0.1", "-p", "0"],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert server.stderr is not None
    try:
        address = next(line.split()[-1] for line in server.stderr if "Running on" in line)
        os.environ |= {
            "AWS_ENDPOINT_URL_S3": address,
            "AWS_ACCESS_KEY_ID": "x",
            "AWS_SECRET_ACCESS_KEY": "x",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        storage._client().create_bucket(Bucket="benchmark")
        server.stderr.close()
        yield "s3://benchmark"
    finally:
        server.terminate()
        server.wait()


@contextmanager
def local_place(folder: Path) -> Iterator[str]:
    """A folder beside the corpus."""
    yield str(folder / "out")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--kilobytes", type=int, default=250, help="of a medium, on average")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--s3", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        manifest = make_corpus(folder, options.megabytes, options.kilobytes)
        num_bytes = sum(file.stat().st_size for file in (folder / "media").iterdir())
        num_files = len(list((folder / "media").iterdir()))
        some = next(manifest_parts(str(manifest), str(folder), measure_rows(str(manifest), print), 1 << 24))
        spent = bounding_seconds(some.examples)
        with s3_server() if options.s3 else local_place(folder) as place:
            ways: dict[str, Callable[[str], None]] = {
                "copy": lambda to: copy(manifest, to),
                "1 writer": lambda to: write(manifest, to, 1),
                "2 writers": lambda to: write(manifest, to, 2),
            }
            seconds: dict[str, list[float]] = {name: [] for name in ways}
            processor: dict[str, list[float]] = {name: [] for name in ways}
            for number in range(options.rounds):
                for name, way in ways.items():
                    to = storage.join(place, f"{number}-{name.replace(' ', '-')}")
                    started, used = time.perf_counter(), processor_seconds()
                    way(to)
                    seconds[name].append(time.perf_counter() - started)
                    processor[name].append(processor_seconds() - used)
                    storage.remove_folder(to)
    print(f"{num_files} media, {num_bytes / 1e6:.0f} MB, {'S3 (moto)' if options.s3 else 'local disk'}")
    speeds = {name: num_bytes / 1e6 / statistics.median(taken) for name, taken in seconds.items()}
    for name, speed in speeds.items():
        used_seconds = statistics.median(processor[name])
        print(
            f"  {name:10s} {speed:7.1f} MB/s, {1000 * used_seconds / num_bytes * 1e9 / 1e3:.2f} s of processor per GB"
        )
    print(f"  bounds     {spent * num_files / num_bytes * 1e9:.2f} s of processor per GB, {1e3 * spent:.2f} ms a row")
    for name in ("1 writer", "2 writers"):
        print(f"shards by {name} over copy: {speeds[name] / speeds['copy']:.2f}")


if __name__ == "__main__":
    main()
