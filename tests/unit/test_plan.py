"""The planner's rules on small hand-made lengths."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from molmo2core.errors import DataError, RecipeError
from molmo2core.packing.config import PackingConfig
from molmo2core.packing.plan import DatasetLengths, cut_tree, pack_window, plan_packs, shuffled_samples
from molmo2core.packing.plan_files import read_plan, write_plan
from molmo2core.shards.mixture import MixtureGroup, resolve_proportions

PACKING = PackingConfig(sequence_tokens=100, crop_budget=8, window=64)


def lengths(name: str, trees: list[tuple[int, int, list[int]]], proportion: float = 1.0) -> DatasetLengths:
    """A dataset from (root tokens, crops, branch tokens) of each sample."""
    branches = [tokens for _, _, tree in trees for tokens in tree]
    return DatasetLengths(
        dataset=name,
        proportion=proportion,
        root_tokens=np.array([root for root, _, _ in trees], np.int64),
        crops=np.array([crops for _, crops, _ in trees], np.int64),
        branch_tokens=np.array(branches, np.int64),
        branch_offsets=np.cumsum([0, *(len(tree) for _, _, tree in trees)]),
        shard_samples=np.array([len(trees)], np.int64),
        uids=[f"{name}-{number}" for number in range(len(trees))],
    )


def test_long_tree_is_cut_between_branches_and_every_branch_is_trained_once() -> None:
    """Catches a cut that drops the tail (as the official code does), repeats a branch or forgets the root's tokens."""
    runs, missing = cut_tree(40, 2, [30, 30, 30, 59, 10], PACKING)
    assert runs == [(0, 2, 100), (2, 3, 70), (3, 4, 99), (4, 5, 50)]
    assert missing == []


def test_branch_that_fits_nowhere_is_left_out_and_its_neighbours_stay() -> None:
    """Catches a run that bridges the branch that was left out."""
    assert cut_tree(40, 2, [10, 61, 10], PACKING) == ([(0, 1, 50), (2, 3, 50)], [1])
    assert cut_tree(40, 9, [10], PACKING) == ([], [0])
    assert cut_tree(40, 2, [], PACKING) == ([], [-1])


def test_left_out_branches_are_listed_until_they_are_too_many() -> None:
    """Catches silent loss, and an error that names neither uid nor numbers."""
    trees = [(10, 1, [20])] * 39 + [(10, 1, [20, 95])]
    planned = plan_packs([lengths("a", trees)], packing=PACKING, num_packs=30, seed=0)
    (item,) = planned.left_out
    assert (item.uid, item.branch, item.tokens, item.crops) == ("a-39", 1, 105, 1)
    assert 39 in planned.plan.entries["sample"], "the branch that fits is still trained"
    with pytest.raises(DataError, match=r"2 of 4 samples .* a-1 \(branch 0\): 999 tokens, 1 crops") as error:
        plan_packs([lengths("a", [(10, 1, [20]), (979, 1, [20])] * 2)], packing=PACKING, num_packs=3, seed=0)
    assert "100 tokens and 8 crops" in str(error.value)


def test_text_goes_where_crops_have_run_out() -> None:
    """Catches packing by tokens alone: two media-heavy and two text entries make two packs, not three."""
    tokens, crops = np.array([40, 40, 60, 60]), np.array([8, 8, 0, 0])
    pack = pack_window(tokens, crops, PACKING)
    assert pack.max() == 1
    assert np.bincount(pack, tokens).max() <= 100
    assert np.bincount(pack, crops).max() <= 8


def test_plan_repeats_itself_and_follows_the_seed() -> None:
    """Catches hidden global randomness, and a seed that is not used."""
    data = [lengths("a", [(n, 1, [3]) for n in range(5, 45)])]
    first, again, other = (plan_packs(data, packing=PACKING, num_packs=9, seed=seed).plan for seed in (1, 1, 2))
    assert np.array_equal(first.entries, again.entries)
    assert np.array_equal(first.pack_offsets, again.pack_offsets)
    assert not np.array_equal(first.entries["sample"][:9], other.entries["sample"][:9])


def test_datasets_of_equal_length_are_shuffled_differently() -> None:
    """Catches a permutation that depends on seed, epoch and length only, as in the official loader."""
    trees = [(40, 1, [3])] * 30
    planned = plan_packs([lengths("a", trees, 0.5), lengths("b", trees, 0.5)], packing=PACKING, num_packs=30, seed=0)
    samples = planned.plan.entries["sample"]
    first, second = samples[samples < 30], samples[samples >= 30] - 30
    assert len(first) == len(second) == 30
    assert not np.array_equal(first, second)


def test_shuffle_keeps_shards_together_when_there_are_many() -> None:
    """Catches a full shuffle, for which every step would touch every shard."""
    counts = np.full(400, 1000)
    order = shuffled_samples(counts, np.random.default_rng(0))
    assert np.array_equal(np.sort(order), np.arange(400_000))
    assert len(np.unique(order[:2000] // 1000)) < 100
    assert len(np.unique(np.diff(order))) > 1000


def test_plan_files_are_mapped_and_complete(tmp_path: Path) -> None:
    """Catches a plan that is read into each worker, and statistics that disagree with the arrays."""
    planned = plan_packs([lengths("a", [(20, 3, [15, 5])] * 10)], packing=PACKING, num_packs=7, seed=0)
    statistics = write_plan(planned, {"a": 1.0}, tmp_path)
    plan = read_plan(tmp_path)
    assert isinstance(plan.entries, np.memmap)
    assert len(plan) == 7
    assert np.array_equal(plan.entries, planned.plan.entries)
    assert plan.packing == PACKING
    assert json.loads((tmp_path / "plan.json").read_text())["statistics"] == json.loads(json.dumps(statistics))
    assert statistics["examples_per_pack"] == len(plan.entries) / 7
    assert statistics["branches_per_pack"] == 2 * statistics["examples_per_pack"]
    assert statistics["token_fill"] == pytest.approx(0.4 * statistics["examples_per_pack"])
    assert "<rect" in (tmp_path / "fill.html").read_text()
    (tmp_path / "pack_offsets.npy").unlink()
    with pytest.raises(DataError, match="no pack plan"):
        read_plan(tmp_path)


def test_mixture_is_normalised_over_groups_and_by_roots_within() -> None:
    """Catches rates that are taken for shares, and size-proportional drawing within a group (data.md 7.1)."""
    mixture = {
        "images": MixtureGroup(rate=0.6, datasets=("a", "b")),
        "text": MixtureGroup(rate=0.3, datasets=("c",)),
        "off": MixtureGroup(rate=0.0, datasets=("missing",)),
        "more": MixtureGroup(rate=0.3, datasets=("a",)),
    }
    shares = resolve_proportions(mixture, {"a": 100, "b": 400, "c": 5, "d": 9})
    assert shares == pytest.approx({"a": 0.5 / 3 + 0.25, "b": 1 / 3, "c": 0.25, "d": 0.0})


@pytest.mark.parametrize(
    ("group", "error", "words"),
    [
        (MixtureGroup(rate=1.0, datasets=("a", "gone", "empty")), DataError, "no training samples of gone, empty"),
        (MixtureGroup(rate=-1.0, datasets=("a",)), RecipeError, "mixture.g.rate: -1.0"),
        (MixtureGroup(rate=float("nan"), datasets=("a",)), RecipeError, "mixture.g.rate: nan"),
        (MixtureGroup(rate=0.0, datasets=("a",)), RecipeError, "no group with a positive rate"),
    ],
)
def test_impossible_mixture_is_refused_by_name(group: MixtureGroup, error: type[Exception], words: str) -> None:
    """Catches a missing dataset whose share silently goes to the others."""
    with pytest.raises(error, match=words):
        resolve_proportions({"g": group}, {"a": 3, "empty": 0})


def test_dataset_without_share_is_never_drawn_but_keeps_its_ids() -> None:
    """Catches ids that shift when a rate is set to 0: the reader indexes all datasets."""
    trees = [(20, 1, [5])] * 4
    planned = plan_packs([lengths("a", trees, 0.0), lengths("b", trees)], packing=PACKING, num_packs=2, seed=0)
    assert planned.draws == {"a": 0, "b": len(planned.plan.entries)}
    assert planned.plan.entries["sample"].min() == 4


def test_single_sample_and_window_of_one() -> None:
    """Catches empty windows and endless loops at the smallest sizes."""
    planned = plan_packs([lengths("a", [(90, 8, [5])])], packing=replace(PACKING, window=1), num_packs=3, seed=0)
    assert planned.plan.entries["epoch"].tolist() == [0, 1, 2]
    assert planned.plan.pack_offsets.tolist() == [0, 1, 2, 3]
