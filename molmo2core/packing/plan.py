"""Which draws form which pack, decided from lengths alone before training starts (DECISIONS D2).

    datasets' lengths -> entries of each sample -> seeded draws -> windows -> packs under two budgets -> plan

1. A sample whose message tree is longer than a sequence is cut between branches into several *entries*; every
   branch is in exactly one.  A branch that fits in no sequence even alone is left out and reported.
2. Draws: datasets take turns in the wanted proportions (never more than one draw off), each in its own order,
   reshuffled every epoch; a sample comes once per epoch of its dataset.
3. `window` draws are packed together in random order, those larger than half a pack first; each entry goes into the
   open pack whose remaining room has the direction most like its own size.  Packs are shuffled inside their window.
4. Windows follow until `num_packs` packs exist.  The last windows shrink, so that no draw is thrown away.

Everything is a pure function of the arguments.  A pack is what training counts: global batch b is packs
[b * G, (b + 1) * G), whatever the number of ranks and workers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from molmo2core.errors import DataError
from molmo2core.packing.config import PackingConfig

PLANNER = 1
"""Version of the planning rules: part of a plan's key."""
SHUFFLE_BLOCK = 1 << 16
"""Samples over which a shuffle spreads a shard, as in streaming's `py1e`: small datasets are shuffled entirely."""
MAX_LEFT_OUT_FRACTION = 0.05
"""More samples of one dataset than this with a branch that fits in no sequence are an error, not a footnote."""

ENTRY = np.dtype([("sample", "<u4"), ("first_branch", "<u2"), ("stop_branch", "<u2"), ("epoch", "<u4")])
"""One example of a pack: global sample id, half-open range of its branches, epoch of its dataset."""

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
class PackPlan:
    """The packs in training order."""

    entries: npt.NDArray[np.void]
    """[E] of ENTRY; may be memory-mapped."""
    pack_offsets: Ints
    """[num_packs + 1] entries of pack p: entries[pack_offsets[p]:pack_offsets[p + 1]]."""
    packing: PackingConfig

    def __len__(self) -> int:
        return len(self.pack_offsets) - 1

    def pack(self, index: int) -> npt.NDArray[np.void]:
        """Entries of one pack."""
        return self.entries[self.pack_offsets[index] : self.pack_offsets[index + 1]]


@dataclass(frozen=True, kw_only=True, eq=False)
class PlannedPacks:
    """A plan and what is worth knowing about it."""

    plan: PackPlan
    tokens: Ints
    """[num_packs] upper bound of each pack's tokens."""
    crops: Ints
    """[num_packs]"""
    draws: dict[str, int]
    """Draws by dataset; a tree cut into several entries is one draw."""
    left_out: tuple[LeftOut, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Stream:
    """One dataset's drawable samples and the entries each expands to."""

    lengths: DatasetLengths
    first_sample: int
    """Global id of the dataset's sample 0."""
    offsets: Ints
    """[N+1] entries of sample i: rows offsets[i]:offsets[i + 1] of the columns below; none: never drawn."""
    first_branch: Ints
    stop_branch: Ints
    tokens: Ints

    def drawable(self, samples: Ints) -> Ints:
        return samples[self.offsets[samples + 1] > self.offsets[samples]]


def plan_packs(
    datasets: Sequence[DatasetLengths], *, packing: PackingConfig, num_packs: int, seed: int
) -> PlannedPacks:
    """Plan `num_packs` packs.  Global sample ids count through `datasets` in the given order.

    Raises:
        DataError: too many samples of a dataset hold a branch that fits in no sequence, or a dataset with a positive
            proportion has no sample that fits.
    """
    streams, left_out = _build_streams(datasets, packing)
    draws = _Draws(streams, seed)
    rng = np.random.default_rng([seed, 1])
    entries: list[npt.NDArray[np.void]] = []
    pack_sizes: list[Ints] = []
    pack_tokens: list[Ints] = []
    pack_crops: list[Ints] = []
    wanted, count = num_packs, packing.window
    while wanted > 0:
        window, tokens, crops = draws.peek(count)
        assignment = pack_window(tokens, crops, packing)
        made = int(assignment.max()) + 1
        if made > wanted and count > 1:
            count = max(1, min(count - 1, count * wanted // made))
            continue
        draws.take(count)
        shuffled = rng.permutation(made)[assignment]
        order = np.argsort(shuffled, kind="stable")
        order = order[shuffled[order] < wanted]  # only ever cuts inside one over-long tree at the very end
        made = min(made, wanted)
        entries.append(window[order])
        pack_sizes.append(np.bincount(shuffled[order], minlength=made))
        pack_tokens.append(np.bincount(shuffled[order], tokens[order], minlength=made).astype(np.int64))
        pack_crops.append(np.bincount(shuffled[order], crops[order], minlength=made).astype(np.int64))
        wanted -= made
    return PlannedPacks(
        plan=PackPlan(
            entries=np.concatenate(entries) if entries else np.zeros(0, ENTRY),
            pack_offsets=_offsets(np.concatenate(pack_sizes) if pack_sizes else np.zeros(0, np.int64)),
            packing=packing,
        ),
        tokens=np.concatenate(pack_tokens) if pack_tokens else np.zeros(0, np.int64),
        crops=np.concatenate(pack_crops) if pack_crops else np.zeros(0, np.int64),
        draws={stream.lengths.dataset: int(taken) for stream, taken in zip(streams, draws.taken, strict=True)},
        left_out=left_out,
    )


def pack_window(tokens: Ints, crops: Ints, packing: PackingConfig) -> Ints:
    """Pack of each entry, numbered from 0 in order of opening; no pack exceeds a budget.

    Entries should come mixed: with those above half a pack first and the rest as they come, each put into the open
    pack, among those with room, whose free (tokens, crops) has the smallest angle to the entry's own, text-only
    entries go where crops have run out.  This reached 97.8 % of the bound on the lengths of benchmarks/packing.py in
    windows of 2048; largest entry first 96.1 %, first fit 96.5 %, best fit 96.3 %.
    """
    size = np.stack([tokens / packing.sequence_tokens, crops / max(packing.crop_budget, 1)], axis=1)
    free = np.tile(np.array([packing.sequence_tokens, packing.crop_budget], np.int64), (len(tokens), 1))
    share = np.ones((len(tokens), 2))
    pack = np.zeros(len(tokens), np.int64)
    num_open = 0
    for entry in np.argsort(size.max(axis=1) <= 0.5, kind="stable"):
        fits = np.flatnonzero((free[:num_open, 0] >= tokens[entry]) & (free[:num_open, 1] >= crops[entry]))
        if len(fits):
            room = share[fits]
            chosen = fits[np.argmax(room @ size[entry] / np.sqrt((room * room).sum(axis=1) + 1e-12))]
        else:
            chosen, num_open = num_open, num_open + 1
        free[chosen] -= (tokens[entry], crops[entry])
        share[chosen] -= size[entry]
        pack[entry] = chosen
    return pack


class _Draws:
    """An endless sequence of draws, looked at before they are taken."""

    def __init__(self, streams: Sequence[_Stream], seed: int) -> None:
        self._streams, self._seed = streams, seed
        self._shares = np.array([stream.lengths.proportion for stream in streams], np.float64)
        self.taken = np.zeros(len(streams), np.int64)
        """[datasets] draws so far."""
        self._orders: dict[tuple[int, int], Ints] = {}

    def peek(self, count: int) -> tuple[npt.NDArray[np.void], Ints, Ints]:
        """Entries, tokens and crops of the next `count` draws, mixed."""
        columns: list[tuple[npt.NDArray[np.void], Ints, Ints]] = []
        for index, (stream, wanted) in enumerate(zip(self._streams, self._counts(count), strict=True)):
            if wanted:
                samples, epochs = self._samples(index, int(self.taken[index]), int(wanted))
                num_entries = stream.offsets[samples + 1] - stream.offsets[samples]
                rows = np.repeat(stream.offsets[samples], num_entries) + _ranges(num_entries)
                entries = np.zeros(len(rows), ENTRY)
                entries["sample"] = stream.first_sample + np.repeat(samples, num_entries)
                entries["first_branch"], entries["stop_branch"] = stream.first_branch[rows], stream.stop_branch[rows]
                entries["epoch"] = np.repeat(epochs, num_entries)
                columns.append((entries, stream.tokens[rows], np.repeat(stream.lengths.crops[samples], num_entries)))
        entries, tokens, crops = (np.concatenate(parts) for parts in zip(*columns, strict=True))
        order = np.random.default_rng([self._seed, 3, *self.taken.tolist()]).permutation(len(entries))
        return entries[order], tokens[order], crops[order]

    def take(self, count: int) -> None:
        """Go past the next `count` draws."""
        self.taken += self._counts(count)
        self._orders = {}

    def _counts(self, count: int) -> Ints:
        """Draws of each dataset among the next `count`, so that totals stay within one of the wanted share."""
        target = self._shares * (self.taken.sum() + count)
        due = np.maximum(np.floor(target).astype(np.int64) - self.taken, 0)
        while due.sum() > count:  # an earlier rounding up is given back where the excess is largest
            excess = np.where(due > 0, self.taken + due - target, -np.inf)
            due[np.argmax(excess)] -= 1
        missing = count - int(due.sum())
        largest = np.argsort(-(np.where(self._shares > 0, target - self.taken - due, -np.inf)), kind="stable")
        due[largest[:missing]] += 1
        return due

    def _samples(self, index: int, start: int, count: int) -> tuple[Ints, Ints]:
        """Sample ids and epochs of draws start..start + count of one dataset."""
        samples, epochs = [], []
        while count:
            epoch, position = divmod(start, len(self._order(index, 0)))
            part = self._order(index, epoch)[position : position + count]
            samples.append(part)
            epochs.append(np.full(len(part), epoch, np.int64))
            start, count = start + len(part), count - len(part)
        return np.concatenate(samples), np.concatenate(epochs)

    def _order(self, index: int, epoch: int) -> Ints:
        if (index, epoch) not in self._orders:
            stream = self._streams[index]
            rng = np.random.default_rng([self._seed, 2, index, epoch])
            self._orders[index, epoch] = stream.drawable(shuffled_samples(stream.lengths.shard_samples, rng))
        return self._orders[index, epoch]


def shuffled_samples(shard_samples: Ints, rng: np.random.Generator) -> Ints:
    """A permutation of all samples in which samples of one shard lie within SHUFFLE_BLOCK of each other.

    Shards are put in random order; then each sample moves by up to half a block.
    """
    starts = _offsets(shard_samples)[:-1]
    order = rng.permutation(len(shard_samples))
    samples = np.repeat(starts[order], shard_samples[order]) + _ranges(shard_samples[order])
    return samples[
        np.argsort(np.arange(len(samples)) + rng.uniform(-SHUFFLE_BLOCK / 2, SHUFFLE_BLOCK / 2, len(samples)))
    ]


def _build_streams(
    datasets: Sequence[DatasetLengths], packing: PackingConfig
) -> tuple[list[_Stream], tuple[LeftOut, ...]]:
    streams: list[_Stream] = []
    left_out: list[LeftOut] = []
    first_sample = 0
    for lengths in datasets:
        stream, missing = _build_stream(lengths, first_sample, packing)
        if lengths.proportion > 0:
            affected = len({item.uid for item in missing})
            if affected > MAX_LEFT_OUT_FRACTION * len(lengths):
                worst = max(missing, key=lambda item: (item.crops, item.tokens))
                raise DataError(
                    f"dataset {lengths.dataset}",
                    found=f"{affected} of {len(lengths)} samples do not fit in a sequence, e.g. {worst.uid} "
                    f"(branch {worst.branch}): {worst.tokens} tokens, {worst.crops} crops",
                    expected=f"at most {packing.sequence_tokens} tokens and {packing.crop_budget} crops",
                    mend="raise packing.sequence_tokens or packing.crop_budget, or lower the preprocessing limits",
                )
            if not len(lengths):
                raise DataError(f"dataset {lengths.dataset}", found="no training samples")
            left_out.extend(missing)
        streams.append(stream)
        first_sample += len(lengths)
    return streams, tuple(left_out)


def _build_stream(
    lengths: DatasetLengths, first_sample: int, packing: PackingConfig
) -> tuple[_Stream, tuple[LeftOut, ...]]:
    """Whole trees where they fit, else consecutive branches together up to the budget."""
    num_branches = np.diff(lengths.branch_offsets)
    before = _offsets(lengths.branch_tokens)
    whole = lengths.root_tokens + before[lengths.branch_offsets[1:]] - before[lengths.branch_offsets[:-1]]
    fits = (whole <= packing.sequence_tokens) & (lengths.crops <= packing.crop_budget) & (num_branches > 0)
    cut: dict[int, list[tuple[int, int, int]]] = {}
    left_out: list[LeftOut] = []
    for sample in np.flatnonzero(~fits).tolist():
        branches = lengths.branch_tokens[lengths.branch_offsets[sample] : lengths.branch_offsets[sample + 1]].tolist()
        cut[sample], missing = cut_tree(int(lengths.root_tokens[sample]), int(lengths.crops[sample]), branches, packing)
        left_out += [
            LeftOut(
                dataset=lengths.dataset,
                uid=lengths.uids[sample],
                branch=branch,
                tokens=int(lengths.root_tokens[sample]) + (branches[branch] if branch >= 0 else 0),
                crops=int(lengths.crops[sample]),
            )
            for branch in missing
        ]
    counts = fits.astype(np.int64)
    counts[list(cut)] = [len(ranges) for ranges in cut.values()]
    offsets = _offsets(counts)
    first, stop, tokens = (np.zeros(offsets[-1], np.int64) for _ in range(3))
    stop[offsets[:-1][fits]], tokens[offsets[:-1][fits]] = num_branches[fits], whole[fits]
    for sample, ranges in cut.items():
        for row, values in enumerate(ranges, start=int(offsets[sample])):
            first[row], stop[row], tokens[row] = values
    stream = _Stream(
        lengths=lengths, first_sample=first_sample, offsets=offsets, first_branch=first, stop_branch=stop, tokens=tokens
    )
    return stream, tuple(left_out)


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


def _offsets(counts: Ints) -> Ints:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])


def _ranges(counts: Ints) -> Ints:
    """0..counts[0]-1, 0..counts[1]-1, ..."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
