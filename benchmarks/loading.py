"""How fast packs are loaded, from local disk and from S3, and how soon after resuming.

    python benchmarks/loading.py [--seconds 4] [--rounds 3]

Samples are photographs of 800 x 600 pixels (JPEG) with four questions each, preprocessed as for the released models:
up to 9 crops of 378 x 378 pixels; the tokenizer is the tests'.  "per core" divides by the processor time of main
process and workers together, their start included: where cores are free, workers scale as it does.  S3 is a server
(moto) in a process of its own on this machine; each run starts with an empty cache, and sees few samples twice.
Settings take turns in rounds; given are medians.

Resuming: a plan of 100,001 steps of 8 packs, mapped from its files, is gone on from at step 10 and at step 100,000; the
time is from asking for a loader (in this process) with the position to its first batch, which is the same at both: the
least of several in turns, since other programs only ever add to it.  The last line is the ratio of processor times.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from molmo2core import storage
from molmo2core.annotations import QuestionAnswer
from molmo2core.examples import Example, Media
from molmo2core.loading.dataloader import build_dataloader, pack_bytes
from molmo2core.packing.config import PackingConfig
from molmo2core.packing.plan import PackPlan
from molmo2core.preprocessing.config import PreprocessingConfig, VisualGeometry
from molmo2core.preprocessing.preprocessor import Preprocessor
from molmo2core.references import PackPlanRef, ShardsRef
from molmo2core.shards.reader import ExampleReader
from molmo2core.testing.pictures import grown_photograph, photographs
from molmo2core.testing.tiny_examples import write_tiny_shards
from molmo2core.testing.tiny_plan import plan_of_refs
from molmo2core.testing.tiny_tokenizer import tiny_tokenizer

SAMPLES, SIZE = 720, (800, 600)
GEOMETRY, LIMITS = VisualGeometry(), PreprocessingConfig()
PACKING = PackingConfig(sequence_tokens=8192, crop_budget=32, window=256)
SHARD_BYTES = 4 << 20
PREPROCESSOR = Preprocessor(geometry=GEOMETRY, config=LIMITS, tokenizer=tiny_tokenizer(), weighting="described", seed=0)
LAST_STEP, PACKS_PER_STEP = 100_000, 8
PACKS = 1980
"""Of the plan that is repeated: steps 10 and 100,000 then load the same packs."""
BUCKET = "s3://benchmark"


def make_shards(place: str) -> ShardsRef:
    """The photographs in turn, each file its own."""
    grown = [grown_photograph(photo, *SIZE) for photo in photographs().values()]
    questions = tuple(
        QuestionAnswer(task="image_qa", question=f"What is at the top left {n}?", answer="a red circle")
        for n in range(4)
    )
    examples = [
        Example(
            uid=str(number),
            dataset="photographs",
            split="train",
            media=Media(kind="image", files=(grown[number % len(grown)] + bytes(number),), sizes=(SIZE,)),
            annotations=questions,
        )
        for number in range(SAMPLES)
    ]
    return write_tiny_shards(examples, place, shard_bytes=SHARD_BYTES)


def reference_of(plan: PackPlan, shards: ShardsRef) -> PackPlanRef:
    """What a plan stage would hand over."""
    return PackPlanRef(uri="", digest="plan", stage="sft", num_packs=len(plan), parents=(shards,))


def processor_seconds() -> float:
    """Of this process and of those that it has waited for."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def load(plan: PackPlan, shards: ShardsRef, workers: int, seconds: float) -> tuple[float, float]:
    """Examples per second by the clock and per second of processor time, after the first pack."""
    with tempfile.TemporaryDirectory() as cache:
        reader = ExampleReader([shards], "train", Path(cache))
        used = processor_seconds()
        loader = build_dataloader(
            plan, reference_of(plan, shards), reader, PREPROCESSOR, global_batch_packs=1, num_workers=workers
        )
        batches = iter(loader)
        everything = next(batches)["num_examples"]
        started, examples = time.perf_counter(), 0
        while time.perf_counter() - started < seconds:
            examples += next(batches)["num_examples"]
        elapsed = time.perf_counter() - started
        batches.close()  # ends the workers, so that their time counts; what they hold ready is lost to the measure
        return examples / elapsed, (everything + examples) / (processor_seconds() - used)


def long_plan(plan: PackPlan, folder: Path) -> PackPlan:
    """`plan` over and over, up to the last step, mapped from files."""
    packs = (LAST_STEP + 1) * PACKS_PER_STEP
    times = -(-packs // len(plan))
    sizes = np.tile(np.diff(plan.pack_offsets), times)[:packs]
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    np.save(folder / "entries.npy", np.tile(plan.entries, times)[: offsets[-1]])
    np.save(folder / "offsets.npy", offsets)
    return PackPlan(
        entries=np.load(folder / "entries.npy", mmap_mode="r"),
        pack_offsets=np.load(folder / "offsets.npy", mmap_mode="r"),
        packing=plan.packing,
    )


def seconds_to_first_batch(plan: PackPlan, shards: ShardsRef, step: int, cache: Path) -> tuple[float, float]:
    """From a checkpoint's position to a batch: by the clock, and of processor time."""
    reader = ExampleReader([shards], "train", cache)
    started, used = time.perf_counter(), time.process_time()
    loader = build_dataloader(
        plan, reference_of(plan, shards), reader, PREPROCESSOR, global_batch_packs=PACKS_PER_STEP, num_workers=0
    )
    loader.dataset.load_state_dict(loader.dataset.state_dict(step * PACKS_PER_STEP, True))
    next(iter(loader))
    return time.perf_counter() - started, time.process_time() - used


@contextmanager
def s3_server() -> Iterator[None]:
    """An S3 server of its own process, and its address in the environment."""
    server = subprocess.Popen(
        [sys.executable, "-c", "from moto.server import main; main()", "-H", "127.0.0.1", "-p", "0"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert server.stderr is not None
    try:
        address = next(line.split()[-1] for line in server.stderr if "Running on" in line)
        keys = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1"}
        os.environ |= {"AWS_ENDPOINT_URL_S3": address, "S3_ENDPOINT_URL": address} | keys
        storage._client().create_bucket(Bucket=BUCKET.removeprefix("s3://"))
        server.stderr.close()
        yield
    finally:
        server.terminate()
        server.wait()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=4, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary, s3_server():
        folder = Path(temporary)
        shards = {"local disk": make_shards(str(folder / "local")), "S3 (moto)": make_shards(BUCKET)}
        plan = plan_of_refs(
            [shards["local disk"]],
            {"photographs": 1.0},
            packing=PACKING,
            num_packs=PACKS,
            geometry=GEOMETRY,
            limits=LIMITS,
        ).plan
        speeds: dict[tuple[str, int], list[tuple[float, float]]] = {}
        for _ in range(options.rounds):
            for place, reference in shards.items():
                for workers in (0, 1, 2):
                    found = load(plan, reference, workers, options.seconds)
                    speeds.setdefault((place, workers), []).append(found)
        long = long_plan(plan, folder)
        waits: dict[int, list[tuple[float, float]]] = {10: [], LAST_STEP: []}
        for _ in range(2 * options.rounds + 1):
            for step, taken in waits.items():
                taken.append(seconds_to_first_batch(long, shards["local disk"], step, folder / "cache"))
    print(
        f"{len(plan.entries) / len(plan):.2f} samples and at most {pack_bytes(PACKING, GEOMETRY) / 1e6:.1f} MB a pack"
    )
    print(f"{'':<12}{'workers':>8}{'samples/s':>11}{'per core':>10}")
    for (place, workers), found in speeds.items():
        clock, processor = (statistics.median(values) for values in zip(*found, strict=True))
        print(f"{place:<12}{workers:>8}{clock:>11.1f}{processor:>10.1f}")
    for place in shards:
        one, two = ([statistics.median(s) for s in zip(*speeds[place, workers], strict=True)] for workers in (1, 2))
        print(f"{place}: 2 workers over 1: {two[0] / one[0]:.2f}, per core {two[1] / one[1]:.2f}")
    least = {step: [min(values) for values in zip(*taken, strict=True)] for step, taken in waits.items()}
    for step, (clock, processor) in least.items():
        print(f"first batch after resuming at step {step:>7,}: {clock:.3f} s, {processor:.3f} s of processor")
    print(f"step 100,000 over step 10: {least[LAST_STEP][1] / least[10][1]:.2f}")


if __name__ == "__main__":
    main()
