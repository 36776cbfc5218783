"""How fast packs are planned, and how full they are, beside no packing, first fit and the bound.

    python benchmarks/packing.py [--draws 50000]

Lengths imitate stage 2 of Molmo2 (data.md 3.6): 16,384 tokens and 128 crops per sequence; images, image sets, videos
and text in the shares of the mixture.  First fit takes examples as they arrive: with as many at hand as the planner's
window, and with all of them (no loader could hold so many open sequences).  The last line is the ratio that packing
is for: examples per sequence, planned packing over no packing.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import numpy.typing as npt

from molmo2core.packing.config import PackingConfig
from molmo2core.packing.plan import DatasetLengths, plan_packs

PACKING = PackingConfig(sequence_tokens=16_384, crop_budget=128)
SHARES = {"image": 0.32, "image_set": 0.09, "video": 0.50, "text": 0.09}
Ints = npt.NDArray[np.int64]


def imitated_lengths(kind: str, count: int, rng: np.random.Generator) -> DatasetLengths:
    """`count` samples of one kind with four branches on average."""
    match kind:
        case "image":
            crops = rng.integers(3, 10, count)
        case "image_set":
            crops = rng.integers(6, 46, count)
        case "video":
            crops = np.minimum(rng.lognormal(3.6, 0.9, count).astype(np.int64) + 2, 128)
        case _:
            crops = np.zeros(count, np.int64)
    per_crop = 83 + 9 if kind == "video" else 169
    branches = rng.integers(1, 8, count) if crops.any() else np.ones(count, np.int64)
    branch_tokens = rng.lognormal(4.3 if crops.any() else 6.4, 0.9, int(branches.sum())).astype(np.int64) + 10
    return DatasetLengths(
        dataset=kind,
        proportion=SHARES[kind],
        root_tokens=1 + crops * per_crop,
        crops=crops,
        branch_tokens=np.minimum(branch_tokens, 3000),
        branch_offsets=np.concatenate([[0], np.cumsum(branches)]),
        shard_samples=np.full(count // 100, 100, np.int64),
        uids=[""] * count,
    )


def first_fit(tokens: Ints, crops: Ints) -> int:
    """Sequences that first fit needs, in order of arrival."""
    free = np.zeros((len(tokens), 2), np.int64)
    count = 0
    for size in np.stack([tokens, crops], axis=1):
        fits = np.flatnonzero((free[:count] >= size).all(axis=1))
        if not len(fits):
            free[count] = PACKING.sequence_tokens, PACKING.crop_budget
            fits, count = np.array([count]), count + 1
        free[fits[0]] -= size
    return count


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=50_000, help="about how many examples are packed")
    draws = parser.parse_args().draws
    rng = np.random.default_rng(0)
    datasets = [imitated_lengths(kind, 20_000, rng) for kind in SHARES]
    started = time.perf_counter()
    planned = plan_packs(datasets, packing=PACKING, num_packs=max(draws // 4, 1), seed=0)
    seconds = time.perf_counter() - started

    entries = planned.plan.entries
    roots = np.concatenate([dataset.root_tokens for dataset in datasets])
    crops = np.concatenate([dataset.crops for dataset in datasets])[entries["sample"]]
    starts = np.cumsum([0] + [len(dataset.branch_tokens) for dataset in datasets])
    firsts = np.concatenate([d.branch_offsets[:-1] + start for d, start in zip(datasets, starts, strict=False)])
    before = np.concatenate([[0], np.cumsum(np.concatenate([dataset.branch_tokens for dataset in datasets]))])
    first = firsts[entries["sample"]]
    tokens = roots[entries["sample"]] + before[first + entries["stop_branch"]] - before[first + entries["first_branch"]]

    num_examples = len(entries)
    order = rng.permutation(num_examples)  # as they would arrive, without a plan
    windows = [order[start : start + PACKING.window] for start in range(0, num_examples, PACKING.window)]
    bound = max(tokens.sum() / PACKING.sequence_tokens, crops.sum() / PACKING.crop_budget)
    print(f"{num_examples} examples, mean {tokens.mean():.0f} tokens and {crops.mean():.1f} crops")
    print(f"planned in {seconds:.2f} s: {sum(planned.draws.values()) / seconds:,.0f} draws/s")
    print(f"{'':<20}{'sequences':>10}{'per sequence':>14}{'tokens used':>13}{'crops used':>12}{'of the bound':>14}")
    for name, count in (
        ("no packing", num_examples),
        ("first fit, window", sum(first_fit(tokens[part], crops[part]) for part in windows)),
        ("first fit, all", first_fit(tokens[order], crops[order])),
        ("planned", len(planned.plan)),
        ("bound", bound),
    ):
        print(
            f"{name:<20}{count:>10.0f}{num_examples / count:>14.2f}"
            f"{tokens.sum() / count / PACKING.sequence_tokens:>13.1%}"
            f"{crops.sum() / count / PACKING.crop_budget:>12.1%}{bound / count:>14.1%}"
        )
    print(f"ratio {num_examples / len(planned.plan):.2f}")


if __name__ == "__main__":
    main()
