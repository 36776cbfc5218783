"""What every plan keeps, whatever the lengths."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from molmo2core.packing.config import PackingConfig
from molmo2core.packing.draws import Draws
from molmo2core.packing.entries import DatasetLengths, build_entries
from molmo2core.packing.plan import PlannedPacks, plan_packs, plan_windows
from molmo2core.packing.window import pack_window

TOKENS, CROPS = 64, 6
Tree = tuple[int, int, list[int]]
TREES = st.lists(
    st.tuples(st.integers(1, 24), st.integers(0, CROPS), st.lists(st.integers(1, 40), min_size=1, max_size=6)),
    min_size=1,
    max_size=25,
)


def build(name: str, trees: list[Tree], proportion: float) -> DatasetLengths:
    shards = [len(trees)] if len(trees) < 2 else [1, len(trees) - 1]
    return DatasetLengths(
        dataset=name,
        proportion=proportion,
        root_tokens=np.array([root for root, _, _ in trees], np.int64),
        crops=np.array([crops for _, crops, _ in trees], np.int64),
        branch_tokens=np.array([tokens for *_, tree in trees for tokens in tree], np.int64),
        branch_offsets=np.cumsum([0, *(len(tree) for *_, tree in trees)]),
        shard_samples=np.array(shards, np.int64),
        uids=[f"{name}-{number}" for number in range(len(trees))],
    )


@settings(max_examples=150, deadline=None)
@given(
    mixture=st.lists(st.tuples(TREES, st.integers(0, 5)), min_size=1, max_size=3).filter(
        lambda datasets: any(rate for _, rate in datasets)
    ),
    window=st.integers(1, 40),
    num_packs=st.integers(1, 60),
    seed=st.integers(0, 1000),
)
def test_every_plan_keeps_budgets_epochs_and_shares(
    mixture: list[tuple[list[Tree], int]], window: int, num_packs: int, seed: int
) -> None:
    """Catches a pack over budget, a lost, repeated or early branch, a draw thrown away, and shares that drift."""
    total = sum(rate for _, rate in mixture)
    datasets = [build(f"d{n}", trees, rate / total) for n, (trees, rate) in enumerate(mixture)]
    packing = PackingConfig(sequence_tokens=TOKENS, crop_budget=CROPS, window=window)
    planned = plan_packs(datasets, packing=packing, num_packs=num_packs, seed=seed)
    plan = planned.plan
    assert len(plan) == num_packs
    assert np.diff(plan.pack_offsets).min() >= 1

    trees = [tree for dataset, _ in mixture for tree in dataset]
    for number in range(num_packs):
        tokens = crops = 0
        for entry in plan.pack(number):
            root, tree_crops, branches = trees[entry["sample"]]
            assert entry["first_branch"] < entry["stop_branch"] <= len(branches)
            tokens += root + sum(branches[entry["first_branch"] : entry["stop_branch"]])
            crops += tree_crops
        assert (tokens, crops) == (planned.tokens[number], planned.crops[number])
        assert tokens <= TOKENS
        assert crops <= CROPS

    check_epochs(planned, datasets)
    drawn = Counter(dict.fromkeys(planned.draws, 0))
    for piece in plan_windows(datasets, packing=packing, num_packs=num_packs, seed=seed):
        drawn.update(piece.draws)
        for dataset in datasets:
            assert abs(drawn[dataset.dataset] - dataset.proportion * drawn.total()) <= 1


def check_epochs(planned: PlannedPacks, datasets: list[DatasetLengths]) -> None:
    """Every branch of a dataset comes once in each epoch before the last; in the last at most once.

    Only at the very end of the plan may one tree be incomplete: the last draw, if it was cut into several entries.
    """
    entries = planned.plan.entries
    first = 0
    for dataset in datasets:
        mine = entries[(entries["sample"] >= first) & (entries["sample"] < first + len(dataset))]
        seen = Counter(
            (int(entry["epoch"]), int(entry["sample"]) - first, branch)
            for entry in mine
            for branch in range(entry["first_branch"], entry["stop_branch"])
        )
        assert set(seen.values()) <= {1}
        draws = {(epoch, sample) for epoch, sample, _ in seen}
        assert len(draws) == planned.draws[dataset.dataset], "a draw was thrown away"
        last = max((epoch for epoch, _ in draws), default=0)
        for epoch in range(last):
            assert {sample for e, sample in draws if e == epoch} == set(range(len(dataset)))
        num_branches = np.diff(dataset.branch_offsets)
        missing = sum(int(num_branches[sample]) for _, sample in draws) - len(seen)
        incomplete = [draw for draw in draws if sum(seen[(*draw, b)] for b in range(10)) < num_branches[draw[1]]]
        assert missing == 0 or len(incomplete) == 1
        first += len(dataset)


@settings(max_examples=40, deadline=None)
@given(
    trees=st.lists(TREES, min_size=2, max_size=4),
    order=st.randoms(use_true_random=False),
    num_packs=st.integers(1, 30),
    seed=st.integers(0, 1000),
)
def test_order_of_datasets_and_those_switched_off_change_nothing(
    trees: list[list[Tree]], order: random.Random, num_packs: int, seed: int
) -> None:
    """Catches shuffles seeded by a dataset's place: a dataset more would silently change all the others' order."""
    packing = PackingConfig(sequence_tokens=TOKENS, crop_budget=CROPS, window=16)
    datasets = [build(f"d{n}", rows, 1 / len(trees)) for n, rows in enumerate(trees)]
    moved = [*datasets, build("off", trees[0], 0.0)]
    order.shuffle(moved)

    def named(given: list[DatasetLengths]) -> tuple[list[tuple[str, int, int, int]], list[int]]:
        plan = plan_packs(given, packing=packing, num_packs=num_packs, seed=seed).plan
        uids = [uid for lengths in given for uid in lengths.uids]
        entries = [
            (uids[entry["sample"]], int(entry["first_branch"]), int(entry["stop_branch"]), int(entry["epoch"]))
            for entry in plan.entries
        ]
        return entries, plan.pack_offsets.tolist()

    assert named(moved) == named(datasets)


@settings(max_examples=100, deadline=None)
@given(
    weights=st.lists(st.floats(1e-3, 1), min_size=1, max_size=20),
    counts=st.lists(st.integers(1, 30), min_size=1, max_size=40),
)
def test_every_prefix_is_within_one_draw_of_the_shares(weights: list[float], counts: list[int]) -> None:
    """Catches shares that are right at the end only, for any sizes of windows; draws given back; draws lost."""
    datasets = [build(f"d{n}", [(1, 0, [1])] * 3, weight / sum(weights)) for n, weight in enumerate(weights)]
    draws = Draws(datasets, build_entries(datasets, PackingConfig(sequence_tokens=4, crop_budget=1)), seed=0)
    taken: Counter[str] = Counter()
    for count in counts:
        samples, _ = draws.peek(count)
        given_now = draws.take(count)
        by_dataset = Counter(f"d{sample // 3}" for sample in samples.tolist())
        assert {name: drawn for name, drawn in given_now.items() if drawn} == dict(by_dataset)
        taken.update(given_now)
        for dataset in datasets:
            assert abs(taken[dataset.dataset] - dataset.proportion * taken.total()) <= 1 + 1e-6
    assert taken.total() == sum(counts)


@settings(max_examples=100, deadline=None)
@given(
    largest=st.sampled_from([1, 3, 40, 100]),
    count=st.integers(1, 400),
    crops=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_window_is_packed_within_budgets(largest: int, count: int, crops: bool, seed: int) -> None:
    """Catches an entry that is lost or taken twice, empty packs, overfull ones, and hundreds where a few would do."""
    rng = np.random.default_rng(seed)
    tokens, many = rng.integers(1, largest + 1, count), rng.integers(0, 9, count) * crops
    pack = pack_window(tokens, many, PackingConfig(sequence_tokens=100, crop_budget=8), rng)
    held = np.bincount(pack, minlength=0)
    assert len(pack) == count
    assert held.min() >= 1
    assert np.bincount(pack, tokens).max() <= 100
    assert np.bincount(pack, many).max() <= 8
    assert len(held) <= 1 + 2 * (tokens.sum() / 100 + many.sum() / 8)
