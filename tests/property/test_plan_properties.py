"""What every plan keeps, whatever the lengths."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from molmo2core.packing.config import PackingConfig
from molmo2core.packing.plan import DatasetLengths, PlannedPacks, plan_packs

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
    num_draws = sum(planned.draws.values())
    for dataset in datasets:
        assert abs(planned.draws[dataset.dataset] - dataset.proportion * num_draws) <= len(datasets)


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
