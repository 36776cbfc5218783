"""Which patches become which visual token (model.md 4.1 steps 6-8)."""

from __future__ import annotations

import numpy as np

from molmo2core.examples import PADDING, IntArray


def pooled_size(num_patches: int, window: int) -> int:
    """Visual tokens along a side of `num_patches` patches: the side is padded up to a multiple of the window."""
    return -(-num_patches // window)


def pooling_index(grid: IntArray, window: tuple[int, int], max_pool: int) -> IntArray:
    """Cut a grid of patch numbers into pooling windows.

    An uneven side is padded, the smaller half before; windows and the patches in them run row-major.

    Args:
        grid: [rows, columns] index of each patch.
        window: patches per visual token, (rows, columns).
        max_pool: K, to which shorter windows are filled with PADDING.

    Returns:
        [V, K] int32, PADDING where there is no patch.
    """
    rows, columns = (pooled_size(side, size) for side, size in zip(grid.shape, window, strict=True))
    missing = rows * window[0] - grid.shape[0], columns * window[1] - grid.shape[1]
    padded = np.pad(grid, [(m // 2, m - m // 2) for m in missing], constant_values=PADDING)
    windows = padded.reshape(rows, window[0], columns, window[1]).transpose(0, 2, 1, 3).reshape(rows * columns, -1)
    fill = max_pool - windows.shape[1]
    return np.pad(windows, [(0, 0), (0, fill)], constant_values=PADDING).astype(np.int32)
