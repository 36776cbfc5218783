"""Who may attend to whom.  This is the one definition of the mask; fast masks are tested against it (model.md 2.5)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from molmo2core.examples import DOCUMENT, PADDING, BoolArray, IntArray


def allowed(subsegment_ids: IntArray, is_visual: BoolArray, queries: npt.ArrayLike | None = None) -> BoolArray:
    """Brute force over all pairs of one packed sequence.

    A token sees the past of its own branch and the root of its example; visual tokens of one example see each other
    in both directions.  Branches must appear in ascending id.  A padding token sees only itself, so that no row of
    the mask is empty, and nobody sees it.

    Args:
        subsegment_ids: [S] document * DOCUMENT + (ROOT or branch), or PADDING.
        is_visual: [S] one of the eight token kinds.
        queries: [Q] positions of the rows that are wanted; default all.

    Returns:
        [Q, S] whether query (row) may attend to key (column).
    """
    position = np.arange(len(subsegment_ids))
    rows = position if queries is None else np.asarray(queries)
    query, key = subsegment_ids[rows, None], subsegment_ids[None, :]
    causal = position[None, :] <= rows[:, None]
    same_example = query // DOCUMENT == key // DOCUMENT
    both_visual = is_visual[rows, None] & is_visual[None, :]
    real = (query != PADDING) & (key != PADDING)
    mask: BoolArray = real & (query <= key) & (causal | (both_visual & same_example))
    mask |= (query == PADDING) & (position[None, :] == rows[:, None])
    return mask
