"""Lengths of samples -> the entries that packs are made of: whole message trees, or runs of their branches.

A tree that is longer than a sequence is cut between branches into several entries; every branch is in exactly one.  A
branch that fits in no sequence even alone is left out and named.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from molmo2core.errors import DataError
from molmo2core.packing.config import PackingConfig

MAX_LEFT_OUT_FRACTION = 0.05
"""More samples of one dataset than this with a branch that fits in no sequence are an error, not a footnote."""
MAX_BRANCHES = (1 << 16) - 1
"""Of one sample: what an entry's branch numbers can count."""

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class DatasetLengths:
    """Upper bounds of one dataset's N training samples under a stage's limits, and its share of draws."""

    dataset: str
    proportion: float
    root_tokens: Ints
    """[N] tokens of the root, BOS included."""
    crops: Ints
    """[N]"""
    branch_tokens: Ints
    """[T] tokens that each branch adds."""
    branch_offsets: Ints
    """[N+1]"""
    shard_samples: Ints
    """[shards] sums to N."""
    uids: Sequence[str]

    def __len__(self) -> int:
        return len(self.root_tokens)


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """A branch that fits in no sequence, or (`branch` -1) a sample without a branch that fits."""

    dataset: str
    uid: str
    branch: int
    tokens: int
    crops: int


@dataclass(frozen=True, kw_only=True, eq=False)
class EntryTable:
    """Entries of all samples of some datasets; 20 bytes for a sample with one entry."""

    offsets: Ints
    """[N+1] entries of sample i: rows offsets[i]:offsets[i + 1] of the columns below; none: the sample is not drawn."""
    first_branch: npt.NDArray[np.uint16]
    stop_branch: npt.NDArray[np.uint16]
    tokens: npt.NDArray[np.int32]
    """Root and branches."""
    crops: npt.NDArray[np.int32]
    left_out: tuple[LeftOut, ...]


def build_entries(datasets: Sequence[DatasetLengths], packing: PackingConfig) -> EntryTable:
    """Entries of all samples, counted through `datasets` in the given order.

    Raises:
        DataError: too many samples of a dataset hold a branch that fits in no sequence, a dataset with a positive
            proportion has no samples, or a sample has more branches than MAX_BRANCHES.
    """
    tables = [_dataset_entries(lengths, packing) for lengths in datasets]
    for lengths, table in zip(datasets, tables, strict=True):
        if lengths.proportion > 0:
            _check_left_out(lengths, table.left_out, packing)
    columns = ("first_branch", "stop_branch", "tokens", "crops")
    return EntryTable(
        offsets=offsets_of(np.concatenate([np.diff(table.offsets) for table in tables])),
        **{name: np.concatenate([getattr(table, name) for table in tables]) for name in columns},
        left_out=tuple(
            item
            for lengths, table in zip(datasets, tables, strict=True)
            if lengths.proportion > 0
            for item in table.left_out
        ),
    )


def _dataset_entries(lengths: DatasetLengths, packing: PackingConfig) -> EntryTable:
    """Whole trees where they fit, else consecutive branches together up to the budget."""
    num_branches = np.diff(lengths.branch_offsets)
    if num_branches.max(initial=0) > MAX_BRANCHES:
        sample = int(num_branches.argmax())
        raise DataError(
            f"dataset {lengths.dataset}, sample {lengths.uids[sample]}",
            found=f"{num_branches[sample]} annotations",
            expected=f"at most {MAX_BRANCHES}",
            mend="deliver them as several samples",
        )
    before = offsets_of(lengths.branch_tokens)
    whole = lengths.root_tokens + before[lengths.branch_offsets[1:]] - before[lengths.branch_offsets[:-1]]
    fits = (whole <= packing.sequence_tokens) & (lengths.crops <= packing.crop_budget) & (num_branches > 0)
    cut: dict[int, list[tuple[int, int, int]]] = {}
    left_out: list[LeftOut] = []
    for sample in np.flatnonzero(~fits).tolist():
        root, crops = int(lengths.root_tokens[sample]), int(lengths.crops[sample])
        branches = lengths.branch_tokens[lengths.branch_offsets[sample] : lengths.branch_offsets[sample + 1]].tolist()
        cut[sample], missing = cut_tree(root, crops, branches, packing)
        for branch in missing:
            tokens = root + (branches[branch] if branch >= 0 else 0)
            uid = lengths.uids[sample]
            left_out.append(LeftOut(dataset=lengths.dataset, uid=uid, branch=branch, tokens=tokens, crops=crops))
    counts = fits.astype(np.int64)
    counts[list(cut)] = [len(runs) for runs in cut.values()]
    offsets = offsets_of(counts)
    first, stop = np.zeros((2, offsets[-1]), np.uint16)
    tokens_of = np.zeros(offsets[-1], np.int32)
    stop[offsets[:-1][fits]], tokens_of[offsets[:-1][fits]] = num_branches[fits], whole[fits]
    for sample, runs in cut.items():
        for row, run in enumerate(runs, start=int(offsets[sample])):
            first[row], stop[row], tokens_of[row] = run
    return EntryTable(
        offsets=offsets,
        first_branch=first,
        stop_branch=stop,
        tokens=tokens_of,
        crops=np.repeat(lengths.crops, counts).astype(np.int32),
        left_out=tuple(left_out),
    )


def _check_left_out(lengths: DatasetLengths, left_out: Sequence[LeftOut], packing: PackingConfig) -> None:
    if not len(lengths):
        raise DataError(f"dataset {lengths.dataset}", found="no training samples")
    affected = len({item.uid for item in left_out})
    if affected > MAX_LEFT_OUT_FRACTION * len(lengths):
        worst = max(left_out, key=lambda item: (item.crops, item.tokens))
        raise DataError(
            f"dataset {lengths.dataset}",
            found=f"{affected} of {len(lengths)} samples do not fit in a sequence, e.g. {worst.uid} "
            f"(branch {worst.branch}): {worst.tokens} tokens, {worst.crops} crops",
            expected=f"at most {packing.sequence_tokens} tokens and {packing.crop_budget} crops",
            mend="raise packing.sequence_tokens or packing.crop_budget, or lower the preprocessing limits",
        )


def cut_tree(
    root_tokens: int, crops: int, branch_tokens: Sequence[int], packing: PackingConfig
) -> tuple[list[tuple[int, int, int]], list[int]]:
    """Cut one message tree into runs of consecutive branches that each fit in a sequence together with the root.

    Returns:
        Runs (first branch, stop branch, tokens with root), and the branches that fit nowhere (-1 for a tree
        without branches).
    """
    if not branch_tokens:
        return [], [-1]
    runs: list[tuple[int, int, int]] = []
    missing: list[int] = []
    for branch, tokens in enumerate(branch_tokens):
        if root_tokens + tokens > packing.sequence_tokens or crops > packing.crop_budget:
            missing.append(branch)
        elif runs and runs[-1][1] == branch and runs[-1][2] + tokens <= packing.sequence_tokens:
            runs[-1] = (runs[-1][0], branch + 1, runs[-1][2] + tokens)
        else:
            runs.append((branch, branch + 1, root_tokens + tokens))
    return runs, missing


def offsets_of(counts: Ints) -> Ints:
    """0 and the running sums of `counts`."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])


def ranges(counts: Ints) -> Ints:
    """0..counts[0]-1, 0..counts[1]-1, ..."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
