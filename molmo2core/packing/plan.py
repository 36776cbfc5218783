"""Which draws form which pack, decided from lengths alone before training starts (DECISIONS D2).

    datasets' lengths -> entries of each sample -> seeded draws -> windows -> packs under two budgets -> plan

1. Samples become entries: whole message trees, or runs of branches where a tree is too long (entries.py).
2. Datasets are drawn from in the wanted proportions, each reshuffled every epoch (draws.py).
3. `window` draws are packed together (window.py), and their packs are shuffled.
4. Windows follow until `num_packs` packs exist.  The last windows shrink, so that no draw is thrown away.

Everything is a pure function of the arguments.  Planning holds the lengths of all samples and one window of draws; a
plan itself takes 12 bytes for each entry and 8 for each pack.  A pack is what training counts: global batch b is packs
[b * G, (b + 1) * G), whatever the number of ranks and workers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from molmo2core.errors import DataError
from molmo2core.packing.config import PackingConfig
from molmo2core.packing.draws import Draws
from molmo2core.packing.entries import DatasetLengths, EntryTable, Ints, LeftOut, build_entries, offsets_of, ranges
from molmo2core.packing.window import pack_window

PLANNER = 2
"""Version of the planning rules: part of a plan's key."""

ENTRY = np.dtype([("sample", "<u4"), ("first_branch", "<u2"), ("stop_branch", "<u2"), ("epoch", "<u4")])
"""One example of a pack: global sample id, half-open range of its branches, epoch of its dataset."""

_PACK = 1
_NONE = np.zeros(0, np.int64)


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
    """Consecutive packs of a plan, or all, and what is worth knowing about them."""

    plan: PackPlan
    tokens: Ints
    """[packs] upper bound of each pack's tokens."""
    crops: Ints
    """[packs]"""
    draws: dict[str, int]
    """Draws by dataset; a tree cut into several entries is one draw."""
    num_samples: dict[str, int]
    """Samples of each dataset that are drawn once an epoch."""
    left_out: tuple[LeftOut, ...]
    """What no pack of the plan holds."""


def plan_packs(
    datasets: Sequence[DatasetLengths], *, packing: PackingConfig, num_packs: int, seed: int
) -> PlannedPacks:
    """The windows of `plan_windows` as one, in memory."""
    pieces = list(plan_windows(datasets, packing=packing, num_packs=num_packs, seed=seed))
    names = pieces[0].draws
    return PlannedPacks(
        plan=PackPlan(
            entries=np.concatenate([piece.plan.entries for piece in pieces]),
            pack_offsets=offsets_of(np.concatenate([np.diff(piece.plan.pack_offsets) for piece in pieces])),
            packing=packing,
        ),
        tokens=np.concatenate([piece.tokens for piece in pieces]),
        crops=np.concatenate([piece.crops for piece in pieces]),
        draws={name: sum(piece.draws[name] for piece in pieces) for name in names},
        num_samples=pieces[0].num_samples,
        left_out=pieces[0].left_out,
    )


def plan_windows(
    datasets: Sequence[DatasetLengths], *, packing: PackingConfig, num_packs: int, seed: int
) -> Iterator[PlannedPacks]:
    """Plan `num_packs` packs, window by window.  Global sample ids count through `datasets` in the given order.

    Yields:
        The packs of each window, offsets and draws counted from its beginning.  The first has no packs, so that there
        is always one.

    Raises:
        DataError: too many samples of a dataset hold a branch that fits in no sequence, a dataset with a positive
            proportion has no samples, or a sample has too many branches.
    """
    if not any(lengths.proportion > 0 for lengths in datasets):
        raise DataError("mixture", found="no dataset with a positive proportion", expected="at least one")
    table = build_entries(datasets, packing)
    draws = Draws(datasets, table, seed)

    def piece(drawn: _Drawn, pack: Ints, num_packs: int, count: int) -> PlannedPacks:
        order = np.argsort(pack.astype(np.min_scalar_type(len(pack))), kind="stable")  # 16 bits sort much faster
        order = order[: np.searchsorted(pack[order], num_packs)]
        of_entries = pack[order]
        return PlannedPacks(
            plan=PackPlan(
                entries=drawn.entries[order],
                pack_offsets=offsets_of(np.bincount(of_entries, minlength=num_packs)),
                packing=packing,
            ),
            tokens=np.bincount(of_entries, drawn.tokens[order], minlength=num_packs).astype(np.int64),
            crops=np.bincount(of_entries, drawn.crops[order], minlength=num_packs).astype(np.int64),
            draws={lengths.dataset: 0 for lengths in datasets} | draws.take(count),
            num_samples=draws.num_samples,
            left_out=table.left_out,
        )

    yield piece(_expand(table, _NONE, _NONE), _NONE, 0, 0)
    wanted, count = num_packs, packing.window
    while wanted > 0:
        drawn = _expand(table, *draws.peek(count))
        rng = np.random.default_rng([seed, _PACK, draws.total])
        pack = pack_window(drawn.tokens, drawn.crops, packing, rng)
        made = int(pack.max()) + 1
        if made > wanted and count > 1:
            count = max(1, min(count - 1, count * wanted // made))
            continue
        made_here = min(made, wanted)  # fewer only if the very last draw is a tree cut into several entries
        yield piece(drawn, rng.permutation(made)[pack], made_here, count)
        wanted -= made_here


@dataclass(frozen=True, kw_only=True, eq=False)
class _Drawn:
    """Entries of some draws, with their sizes."""

    entries: npt.NDArray[np.void]
    tokens: npt.NDArray[np.int32]
    crops: npt.NDArray[np.int32]


def _expand(table: EntryTable, samples: Ints, epochs: Ints) -> _Drawn:
    first, num_entries = table.offsets[samples], table.offsets[samples + 1] - table.offsets[samples]
    rows = np.repeat(first, num_entries) + ranges(num_entries)
    entries = np.empty(len(rows), ENTRY)
    entries["sample"], entries["epoch"] = np.repeat(samples, num_entries), np.repeat(epochs, num_entries)
    entries["first_branch"], entries["stop_branch"] = table.first_branch[rows], table.stop_branch[rows]
    return _Drawn(entries=entries, tokens=table.tokens[rows], crops=table.crops[rows])
