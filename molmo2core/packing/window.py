"""Packs of one window: many entries at hand, two budgets, as few packs as possible.

The largest entries come first, each in a pack of its own, a batch of packs at a time.  To fill them up, each is dealt
candidates of all sizes from the entries that are left; these are tried in TRIES random orders, taking whatever still
fits, and the order that fills most of the scarcer budget is kept.  Scarcer is the budget that what is left asks more
packs of, so that a batch that takes much of one makes the other one matter.  Packs and tries are numpy rows: Python
runs once per candidate of a batch.  benchmarks/packing.py measures how full and how fast.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from molmo2core.packing.config import PackingConfig
from molmo2core.packing.entries import Ints

TRIES = 16
"""Orders in which a pack's candidates are tried."""
CANDIDATES = 12
"""Candidates of a pack ..."""
CANDIDATES_PER_ENTRY = 3
"""... and so many more for each entry that the packs still to come hold on average."""
DISORDER = 2.0
"""How far orders stray from large to small; 0 is not at all."""
BATCHES = 4
"""A batch is one of so many parts of the packs still to come: candidates stay plentiful ..."""
MIN_BATCH, MAX_BATCH = 8, 512
"""... within these numbers of packs."""
MAX_KEY = np.iinfo(np.uint16).max
"""Sizes are compared in so many steps: numpy sorts 16 bits several times faster."""

AnyInts = npt.NDArray[np.integer[Any]]
Int32s = npt.NDArray[np.int32]


def pack_window(tokens: AnyInts, crops: AnyInts, packing: PackingConfig, rng: np.random.Generator) -> Ints:
    """Pack of each entry, numbered from 0 without gaps; no pack exceeds a budget.

    Args:
        tokens: [E] each at most `packing.sequence_tokens`.
        crops: [E] each at most `packing.crop_budget`.
        packing: the budgets.
        rng: deals candidates and orders.
    """
    budgets = np.array([packing.sequence_tokens, max(packing.crop_budget, 1)], np.int32)
    sizes = np.stack([tokens, crops]).astype(np.int32)
    room_beside = 1 - (sizes / budgets[:, None]).max(axis=0)
    left = np.argsort((room_beside * MAX_KEY).astype(np.uint16), kind="stable")  # ties: the same on all machines
    sizes = sizes[:, left]
    pack = np.zeros(len(tokens), np.int64)
    num_packs = 0
    while len(left):
        wanted = sizes.sum(axis=1) / budgets  # packs that each budget asks for
        to_come = max(float(wanted.max()), 1.0)
        batch = min(int(np.clip(to_come / BATCHES, min(MIN_BATCH, to_come), MAX_BATCH)), len(left))
        dealt = _deal(len(left), batch, len(left) / to_come, rng)
        chosen, in_pack = _fill(sizes, batch, dealt, budgets, int(wanted.argmax()), rng)
        pack[left[:batch]] = num_packs + np.arange(batch)
        pack[left[chosen]] = num_packs + in_pack
        num_packs += batch
        remains = np.ones(len(left), bool)
        remains[:batch] = remains[chosen] = False
        kept = np.flatnonzero(remains)
        left, sizes = left[kept], sizes.take(kept, axis=1)
    return pack


def _deal(num_entries: int, batch: int, entries_per_pack: float, rng: np.random.Generator) -> Ints:
    """Candidates [candidates, batch] of each pack among entries batch..num_entries - 1, none dealt twice.

    Entries go from large to small.  They are cut into as many parts as there are candidates; each pack gets one of
    each part, and which one is turned by chance, so that no pack gets the largest of all.
    """
    candidates = min(CANDIDATES + int(CANDIDATES_PER_ENTRY * entries_per_pack), num_entries // batch - 1)
    spacing = (num_entries - batch) / max(candidates * batch, 1)
    turned = (np.arange(batch) + rng.integers(0, batch, (candidates, 1))) % batch
    places = np.arange(candidates)[:, None] * batch + turned + rng.random()
    return batch + (places * spacing).astype(np.int64)


def _fill(
    sizes: Int32s, batch: int, dealt: Ints, budgets: Int32s, scarcer: int, rng: np.random.Generator
) -> tuple[Ints, Ints]:
    """Which candidates fill up packs 0..batch - 1, each of which holds the entry of its number, and their packs."""
    candidates = len(dealt)
    large_first = np.linspace(0, 1, candidates) + DISORDER * rng.random((TRIES, candidates))
    tried = np.argsort(large_first, axis=1, kind="stable")
    tokens, crops = sizes[:, dealt]  # [candidates, batch]
    free = np.repeat((budgets[:, None] - sizes[:, :batch])[:, None], TRIES, axis=1)
    free_tokens, free_crops = free  # [TRIES, batch]
    taken = np.empty((candidates, TRIES, batch), bool)
    for turn in range(candidates):
        more_tokens, more_crops = tokens[tried[:, turn]], crops[tried[:, turn]]  # [TRIES, batch]
        fits = np.logical_and(free_tokens >= more_tokens, free_crops >= more_crops, out=taken[turn])
        free_tokens -= more_tokens * fits
        free_crops -= more_crops * fits
    other = 1 - scarcer  # breaks ties
    best = (free[scarcer].astype(np.int64) * (budgets[other] + 1) + free[other]).argmin(axis=0)
    turns, in_pack = np.nonzero(taken[:, best, np.arange(batch)])
    return dealt[tried[best[in_pack], turns], in_pack], in_pack
