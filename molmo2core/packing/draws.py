"""In which order samples are drawn: datasets in the wanted proportions, each reshuffled every epoch.

After any number of windows each dataset has been drawn within one draw of its share, and a sample comes once per epoch
of its dataset.  Nothing depends on the order in which datasets are given, nor on those that are never drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from zlib import crc32

import numpy as np
import numpy.typing as npt

from molmo2core.packing.entries import DatasetLengths, EntryTable, Ints, offsets_of, ranges

SHUFFLE_BLOCK = 1 << 16
"""Samples over which a shuffle spreads a shard, as in streaming's `py1e`; smaller datasets are shuffled entirely."""
SHARE_STEPS = 1 << 32
"""Proportions are taken as multiples of one part in so many: whole numbers, whose errors do not add up."""
_MIX, _ORDER = 3, 2


class Draws:
    """An endless sequence of draws, looked at before they are taken.

    Args:
        datasets: those with a positive proportion are drawn.
        table: entries of their samples; a sample without entries is never drawn.
        seed: of all shuffles.
    """

    def __init__(self, datasets: Sequence[DatasetLengths], table: EntryTable, seed: int) -> None:
        first_samples = offsets_of(np.array([len(lengths) for lengths in datasets]))
        by_name = sorted(range(len(datasets)), key=lambda index: datasets[index].dataset)
        drawn = [index for index in by_name if datasets[index].proportion > 0]
        self._streams = [_Stream(datasets[index], int(first_samples[index]), table, seed) for index in drawn]
        self._weights = np.array([max(1, round(datasets[index].proportion * SHARE_STEPS)) for index in drawn], np.int64)
        self._seed = seed
        self._taken = np.zeros(len(drawn), np.int64)

    @property
    def num_samples(self) -> dict[str, int]:
        """Samples of each drawn dataset that can be drawn."""
        return {stream.dataset: len(stream) for stream in self._streams}

    @property
    def total(self) -> int:
        """Draws taken so far."""
        return int(self._taken.sum())

    def peek(self, count: int) -> tuple[Ints, Ints]:
        """Global sample ids and epochs of the next `count` draws, mixed."""
        parts = [
            stream.draws(int(start), int(due))
            for stream, start, due in zip(self._streams, self._taken, self._due(count), strict=True)
        ]
        samples, epochs = (np.concatenate(columns) for columns in zip(*parts, strict=True))
        order = np.random.default_rng([self._seed, _MIX, self.total]).permutation(count)
        return samples[order], epochs[order]

    def take(self, count: int) -> dict[str, int]:
        """Go past the next `count` draws; returns how many each dataset gave."""
        due = self._due(count)
        self._taken += due
        for stream, taken in zip(self._streams, self._taken, strict=True):
            stream.forget(int(taken))
        return {stream.dataset: int(draws) for stream, draws in zip(self._streams, due, strict=True)}

    def _due(self, count: int) -> Ints:
        """Draws of each dataset among the next `count`, after which it has its share, rounded down or up.

        First all get what their share is rounded down, then the rest goes to those whose next draw is due first.  So
        there is always enough for everybody in time (earliest deadline first), which is not so for largest remainders.
        """
        wanted = self._weights * (self.total + count)  # in parts of a draw
        parts = int(self._weights.sum())
        due = np.maximum(wanted // parts - self._taken, 0)
        deadline = (self._taken + due + 1) / self._weights
        deadline[(self._taken + due) * parts >= wanted] = np.inf  # has its share rounded up
        due[np.argsort(deadline, kind="stable")[: count - int(due.sum())]] += 1
        return due


class _Stream:
    """The draws of one dataset.  Its epochs are shuffled in rounds: as many at once as make up a block."""

    def __init__(self, lengths: DatasetLengths, first_sample: int, table: EntryTable, seed: int) -> None:
        self.dataset = lengths.dataset
        self._shard_samples, self._first_sample = lengths.shard_samples, first_sample
        self._drawable = np.diff(table.offsets[first_sample : first_sample + len(lengths) + 1]) > 0
        self._num_drawable = int(self._drawable.sum())
        self._epochs_per_round = max(1, SHUFFLE_BLOCK // self._num_drawable)
        self._seed = [seed, _ORDER, crc32(lengths.dataset.encode())]
        self._rounds: dict[int, npt.NDArray[np.uint32]] = {}

    def __len__(self) -> int:
        return self._num_drawable

    def draws(self, start: int, count: int) -> tuple[Ints, Ints]:
        """Global sample ids and epochs of draws start..start + count."""
        per_round = self._epochs_per_round * len(self)
        rounds = range(start // per_round, -(-(start + count) // per_round))
        parts = [np.zeros(0, np.uint32), *(self._round(number) for number in rounds)]
        samples = np.concatenate(parts)[start % per_round :][:count]
        return self._first_sample + samples.astype(np.int64), np.arange(start, start + count) // len(self)

    def forget(self, taken: int) -> None:
        """Drop the rounds before draw `taken`."""
        present = taken // (self._epochs_per_round * len(self))
        self._rounds = {number: order for number, order in self._rounds.items() if number >= present}

    def _round(self, number: int) -> npt.NDArray[np.uint32]:
        if number not in self._rounds:
            rng = np.random.default_rng([*self._seed, number])
            if self._epochs_per_round > 1:
                samples = np.flatnonzero(self._drawable)
                order = rng.permuted(np.tile(samples, (self._epochs_per_round, 1)), axis=1).reshape(-1)
            else:
                order = shuffled_samples(self._shard_samples, rng)
                order = order[self._drawable[order]]
            self._rounds[number] = order.astype(np.uint32)
        return self._rounds[number]


def shuffled_samples(shard_samples: Ints, rng: np.random.Generator) -> Ints:
    """A permutation of all samples in which samples of one shard lie within SHUFFLE_BLOCK of each other.

    Shards are put in random order; then each sample moves by up to half a block.
    """
    starts = offsets_of(shard_samples)[:-1]
    order = rng.permutation(len(shard_samples))
    samples = np.repeat(starts[order], shard_samples[order]) + ranges(shard_samples[order])
    places = np.arange(len(samples)) + rng.uniform(-SHUFFLE_BLOCK / 2, SHUFFLE_BLOCK / 2, len(samples))
    return samples[np.argsort(places, kind="stable")]
