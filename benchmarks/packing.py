"""How full packs are and how fast they are planned, beside the published packer, first fit and no packing.

    python benchmarks/packing.py [--draws 400000] [--sequences 4000]

Per stage a table: examples per sequence; tokens and crops used; examples per sequence as a share of the bounds below;
draws packed a second on one core.  Ways of packing:

    no packing       one example in each sequence
    knapsack of 48   the published packer (training_and_evaluation.md 1.8, data.md 3.2), written from its description:
                     of 48 examples at hand, the subset of the largest tokens + w * crops that fits, by dynamic
                     programming over tokens in 512 steps x crops; w is 1 in stage 1, else 30.  Of --sequences that it
                     packs, the second half is measured: at first, what is hard to place piles up in the pool
    first fit        one window of examples in order of arrival, each into the first of all sequences with room
    planned          this package, in windows of 2,048 and of 32,768 draws; epochs, shuffles, shares and the cutting of
                     long trees are part of the time

Bounds on examples per sequence: `budgets` are the budgets over the mean example; `large` also knows that examples of
more than half a sequence never share one (Martello and Toth's L2, for each budget): no packing can exceed it.  In stage
1, where a photograph takes 1,000 of 2,560 tokens, they differ by a quarter.  A stage's last line is its ratio: examples
per sequence, planned over unpacked; the last line of all is stage 2's.

The lengths.  Budgets, limits, geometry and shares of groups are those of the recipe `molmo2_4b`; tokens and crops of a
medium are computed from sizes and durations by the code that planning uses.  So these are published (data.md):

    budgets of sequences, frames at 2 a second, 8 crops, 24 for image pointing       3.1, 7.3
    shares of groups: 60/30/10 %, and the seven of stages 2 and 3                     7.2, 7.3
    tokens of a tiling, 81 tokens of a frame                                          0.1
    sets of 2 to 5 images, 2.73 on average                                            1.3, 8
    clips for pointing of at most 63 s; tracking: up to 10 frames/s, one expression   6.4, 6.5, 1.3
    image captions of about 200 words, long video captions of 924                     5.6, 8
    at most 60 points on an image; text of at most 2,304 and 4,096 tokens             1.3, 7.9
    4 annotations a tree                                                              2.6

Assumed are the distributions around them, as said in `roots` and `branch_lengths`.  One number is fitted: with
VIDEO_SECONDS the knapsack packs 3.8 examples in a sequence of stage 2, as published (3.6).  Stage 3 keeps it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from molmo2core.packing.config import PackingConfig
from molmo2core.packing.entries import DatasetLengths, build_entries
from molmo2core.packing.plan import PlannedPacks, plan_packs
from molmo2core.preprocessing.lengths import root_bound
from molmo2core.recipe.load import from_json
from molmo2core.recipe.sections import PlanSection
from molmo2core.stages import resolve

RECIPE = Path(__file__).parents[1] / "workflows/recipes/molmo2_4b.yaml"
STAGES = {"pretrain": "plan_pretrain", "sft": "plan_sft", "long_context": "plan_long_context"}
SAMPLES = 6000
"""Different samples of each part."""
VIDEO_SECONDS = 18.0
"""Median duration of a video; fitted, see above."""
TOKENS_PER_WORD = 1.3
POOL = 48
"""Examples that the published packer holds."""
WINDOWS = (2_048, 32_768)

Ints = npt.NDArray[np.int64]
Medium = Literal["image", "images", "video", "clip", "tracked", "none"]
Annotations = Literal["caption", "transcribed", "video_captions", "questions", "points", "track", "text"]


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part of a mixture's group."""

    share: float
    """Of the group's draws."""
    medium: Medium
    annotations: Annotations
    high_res: bool = False


IMAGE_POINTS = (Part(share=1.0, medium="image", annotations="points"),)
GROUPS: dict[str, dict[str, tuple[Part, ...]]] = {
    "pretrain": {
        "captions": (Part(share=1.0, medium="image", annotations="transcribed"),),
        "image_pointing": IMAGE_POINTS,
        "text": (Part(share=1.0, medium="none", annotations="text"),),
    },
    "sft": {
        "image_qa": (  # 9 of 32 datasets are sets (data.md 7.4)
            Part(share=23 / 32, medium="image", annotations="questions"),
            Part(share=9 / 32, medium="images", annotations="questions"),
        ),
        "video_qa": (Part(share=1.0, medium="video", annotations="questions"),),
        "video_pointing": (Part(share=1.0, medium="clip", annotations="points"),),
        "tracking": (Part(share=1.0, medium="tracked", annotations="track"),),
        "captions": (  # six datasets, video captions 1.5 times (data.md 7.3)
            Part(share=2 / 6.5, medium="image", annotations="questions"),
            Part(share=1 / 6.5, medium="image", annotations="caption"),
            Part(share=1 / 6.5, medium="images", annotations="questions"),
            Part(share=1 / 6.5, medium="video", annotations="questions"),
            Part(share=1.5 / 6.5, medium="video", annotations="video_captions"),
        ),
        "image_pointing": (  # five datasets, one of them sets
            Part(share=4 / 5, medium="image", annotations="points", high_res=True),
            Part(share=1 / 5, medium="images", annotations="points"),
        ),
        "text": (Part(share=1.0, medium="none", annotations="text"),),
    },
}
GROUPS["long_context"] = GROUPS["sft"]
IMAGES_OF_SET = {2: 0.55, 3: 0.24, 4: 0.14, 5: 0.07}  # 2.73 on average
BRANCHES = 5.2
"""Mean number of questions, or of things pointed at, of one medium.  With one text, one track, one image caption or
three video captions that makes 4 annotations a tree in stage 2."""


def roots(part: Part, count: int, section: PlanSection, rng: np.random.Generator) -> Ints:
    """Tokens and crops [count, 2] of media.

    Photographs and pages of 0.1 to 4 megapixels (log-normal around 0.6), sides 1 : 1 to 16 : 9 either way; videos of
    log-normal duration, tracked ones of 10 s and 6 frames a second.
    """

    def size() -> tuple[int, int]:
        pixels = float(np.clip(rng.lognormal(np.log(0.6e6), 0.7), 0.1e6, 4e6))
        ratio = float(rng.choice([9 / 16, 2 / 3, 3 / 4, 1, 4 / 3, 3 / 2, 16 / 9]))
        return round((pixels * ratio) ** 0.5), round((pixels / ratio) ** 0.5)

    def one() -> tuple[int, int]:
        limits = (section.geometry, section.preprocessing)
        match part.medium:
            case "none":
                return root_bound("none", (), 0.0, 0, *limits)
            case "image":
                return root_bound("image", [size()], 0.0, 0, *limits, high_res=part.high_res)
            case "images":
                sizes = [size() for _ in range(rng.choice(list(IMAGES_OF_SET), p=list(IMAGES_OF_SET.values())))]
                return root_bound("images", sizes, 0.0, 0, *limits)
            case "tracked":
                seconds = round(float(rng.lognormal(np.log(10), 0.7)), 1)
                return root_bound("video", (), seconds, 0, *limits, fps=6.0, grid_fps=6.0)
            case _:
                seconds = round(float(rng.lognormal(np.log(VIDEO_SECONDS), 1.1)), 1) + 0.5
                return root_bound("video", (), min(seconds, 63.0) if part.medium == "clip" else seconds, 0, *limits)

    return np.array([one() for _ in range(count)], np.int64).reshape(-1, 2)


def branch_lengths(annotations: Annotations, longest_text: int, rng: np.random.Generator) -> list[int]:
    """Tokens of one medium's annotations, prompts included: log-normal around what the match says."""

    def around(median: float, spread: float = 0.5) -> int:
        return 12 + int(rng.lognormal(np.log(median), spread))

    match annotations:
        case "caption":
            return [around(200 * TOKENS_PER_WORD, 0.3)]
        case "transcribed":
            return [around(200 * TOKENS_PER_WORD, 0.3) for _ in range(2)]
        case "video_captions":
            return [around(words * TOKENS_PER_WORD, 0.3) for words in (150, 500, 924)]
        case "questions":
            return [around(60, 0.9) for _ in range(rng.geometric(1 / BRANCHES))]
        case "points":
            return [12 + 10 * min(int(rng.geometric(1 / 6)), 60) for _ in range(min(rng.geometric(1 / BRANCHES), 20))]
        case "track":
            return [around(600, 0.8)]
        case "text":
            return [min(around(150, 1.2), longest_text) + around(350, 0.9)]


def imitated_lengths(stage: str, section: PlanSection, rng: np.random.Generator) -> list[DatasetLengths]:
    """Lengths of every part of the stage's groups; a branch that would fit in no sequence is cut to fit."""
    packing = section.packing
    total = sum(group.rate for group in section.mixture.values())
    found: list[DatasetLengths] = []
    for name, group in section.mixture.items():
        for number, part in enumerate(GROUPS[stage][name]):
            media = roots(part, SAMPLES, section, rng)
            longest = 2304 if stage == "pretrain" else 4096
            trees = [branch_lengths(part.annotations, longest, rng) for _ in range(SAMPLES)]
            counts = [len(tree) for tree in trees]
            room = np.repeat(packing.sequence_tokens - media[:, 0], counts)
            found.append(
                DatasetLengths(
                    dataset=f"{name}-{number}",
                    proportion=part.share * group.rate / total,
                    root_tokens=media[:, 0],
                    crops=media[:, 1],
                    branch_tokens=np.minimum(np.concatenate([np.array(tree, np.int64) for tree in trees]), room),
                    branch_offsets=np.cumsum([0, *counts]),
                    shard_samples=np.full(SAMPLES // 100, 100, np.int64),
                    uids=[""] * SAMPLES,
                )
            )
    return found


def sizes_of(planned: PlannedPacks, datasets: Sequence[DatasetLengths]) -> Ints:
    """Tokens and crops [E, 2] of the plan's entries."""
    table = build_entries(datasets, planned.plan.packing)
    entries = planned.plan.entries
    of_branch = np.zeros((len(table.offsets) - 1, int(table.stop_branch.max()) + 1), np.int64)
    rows = np.repeat(np.arange(len(of_branch)), np.diff(table.offsets))
    of_branch[rows, table.first_branch] = np.arange(len(rows))
    row = of_branch[entries["sample"], entries["first_branch"]]
    return np.stack([table.tokens[row], table.crops[row]], axis=1).astype(np.int64)


def knapsack_packs(sizes: Ints, packing: PackingConfig, image_weight: int) -> Iterator[Ints]:
    """The published packer over an endless stream: places in `sizes` of each pack's examples."""
    step = max(1, packing.sequence_tokens // 512)
    room = packing.sequence_tokens // step
    pool: list[int] = []
    table = np.zeros((POOL + 1, room + 1, packing.crop_budget + 1), np.float32)
    for arrived in cycle(range(len(sizes))):
        if -(-sizes[arrived, 0] // step) >= room:
            yield np.array([arrived])
        elif len(pool) < POOL:
            pool.append(arrived)
        else:
            tokens, crops = -(-sizes[pool, 0] // step), sizes[pool, 1]
            values = sizes[pool, 0] + image_weight * crops
            for item, (t, c, value) in enumerate(zip(tokens.tolist(), crops.tolist(), values.tolist(), strict=True)):
                table[item + 1] = table[item]
                with_it = table[item, : room + 1 - t, : packing.crop_budget + 1 - c] + np.float32(value)
                np.maximum(table[item + 1, t:, c:], with_it, out=table[item + 1, t:, c:])
            t, c, chosen = room, packing.crop_budget, []
            for item in reversed(range(POOL)):
                if table[item + 1, t, c] != table[item, t, c]:
                    chosen.append(item)
                    t, c = t - int(tokens[item]), c - int(crops[item])
            yield np.array([pool[item] for item in chosen])
            pool = [place for item, place in enumerate(pool) if item not in chosen] + [arrived]


def first_fit(sizes: Ints, packing: PackingConfig) -> int:
    """Sequences that first fit needs, in order of arrival."""
    free = np.zeros((len(sizes), 2), np.int64)
    count = 0
    for size in sizes:
        fits = np.flatnonzero((free[:count] >= size).all(axis=1))
        if not len(fits):
            free[count] = packing.sequence_tokens, packing.crop_budget
            fits, count = np.array([count]), count + 1
        free[fits[0]] -= size
    return count


def least_sequences(sizes: Ints, budget: int) -> float:
    """Martello and Toth's L2: sequences of one budget that these sizes need in any packing, at least."""
    ordered = np.sort(sizes)[::-1]
    before = np.concatenate([[0], np.cumsum(ordered)])

    def larger_than(limit: float) -> int:
        return int(np.searchsorted(-ordered, -limit))

    half = larger_than(budget / 2)
    bounds = [before[-1] / budget]
    for limit in np.unique(ordered[ordered <= budget / 2]):
        alone = larger_than(budget - limit)  # nothing of `limit` or more fits beside them
        stop = int(np.searchsorted(-ordered, -limit, side="right"))
        beside = (half - alone) * budget - (before[half] - before[alone])
        bounds.append(half + max(0.0, (before[stop] - before[half] - beside) / budget))
    return float(max(bounds))


def compare(stage: str, section: PlanSection, *, draws: int, sequences: int) -> float:
    """Print one stage's table; returns its ratio."""
    packing = section.packing
    budgets = np.array([packing.sequence_tokens, packing.crop_budget])
    datasets = imitated_lengths(stage, section, np.random.default_rng(0))
    plans: dict[int, tuple[PlannedPacks, float]] = {}
    for window in WINDOWS:
        each = plan_packs(datasets, packing=replace(packing, window=window), num_packs=100, seed=0)
        num_packs = int(draws * 100 / sum(each.draws.values()))
        seconds = []
        for _ in range(3):
            started = time.process_time()
            planned = plan_packs(datasets, packing=replace(packing, window=window), num_packs=num_packs, seed=0)
            seconds.append(time.process_time() - started)
        plans[window] = planned, sum(planned.draws.values()) / min(seconds)
    planned, _ = plans[max(WINDOWS)]
    sizes = sizes_of(planned, datasets)
    trees = sum(planned.draws.values())
    branches = (planned.plan.entries["stop_branch"].astype(int) - planned.plan.entries["first_branch"]).sum()
    mean = sizes.mean(axis=0)
    by_budgets = 1 / (mean / budgets).max()
    by_size = len(sizes) / max(least_sequences(sizes[:, axis], int(budgets[axis])) for axis in (0, 1))
    print(
        f"\n{stage}: {packing.sequence_tokens:,} tokens, {packing.crop_budget} crops; {trees:,} draws of "
        f"{branches / trees:.1f} annotations, {mean[0]:,.0f} tokens and {mean[1]:.1f} crops on average"
    )
    print(f"{'':<18}{'examples':>9}{'tokens':>8}{'crops':>8}{'of bound':>10}{'of bound':>10}{'draws/s':>12}")
    print(f"{'':<18}{'/sequence':>9}{'used':>8}{'used':>8}{'budgets':>10}{'large':>10}{'/core':>12}")

    def row(
        name: str, per_sequence: float, rate: float | None = None, used: npt.NDArray[np.float64] | None = None
    ) -> None:
        used = mean * per_sequence / budgets if used is None else used
        print(
            f"{name:<18}{per_sequence:>9.2f}{used[0]:>8.1%}{used[1]:>8.1%}{per_sequence / by_budgets:>10.1%}"
            f"{per_sequence / by_size:>10.1%}{f'{rate:,.0f}' if rate else '':>12}",
            flush=True,
        )

    row("no packing", 1.0)
    arrival = sizes[np.random.default_rng(1).permutation(len(sizes))]  # as they would come without a plan
    packer = knapsack_packs(arrival, packing, 1 if stage == "pretrain" else 30)
    for _ in range(sequences // 2):
        next(packer)
    started = time.process_time()
    measured = [next(packer) for _ in range(sequences // 2)]
    seconds_taken = time.process_time() - started
    for pack in measured:
        assert (arrival[pack].sum(axis=0) <= budgets).all()
    packed = np.concatenate(measured)
    filled = arrival[packed].sum(axis=0) / len(measured) / budgets
    row(f"knapsack of {POOL}", len(packed) / len(measured), len(packed) / seconds_taken, filled)
    started = time.process_time()
    at_hand = arrival[: max(WINDOWS)]
    needed = first_fit(at_hand, packing)
    row("first fit", len(at_hand) / needed, len(at_hand) / (time.process_time() - started))
    for size, (planned, rate) in plans.items():
        row(f"planned, {size:,}", len(planned.plan.entries) / len(planned.plan), rate)
    row("bound: large", by_size)
    row("bound: budgets", by_budgets)
    ratio = len(planned.plan.entries) / len(planned.plan)
    print(f"{stage}: ratio {ratio:.2f}")
    return ratio


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=400_000, help="about how many draws are planned in each stage")
    parser.add_argument("--sequences", type=int, default=4000, help="that the knapsack packs; half of them measured")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    options = parser.parse_args()
    sections = resolve.run(RECIPE.read_text(), overrides=[])
    ratios = {
        stage: compare(
            stage,
            from_json(sections[STAGES[stage]], PlanSection),
            draws=options.draws,
            sequences=options.sequences,
        )
        for stage in options.stages
    }
    print(f"ratio {ratios.get('sft', max(ratios.values())):.2f}")


if __name__ == "__main__":
    main()
