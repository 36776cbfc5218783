"""Frames as crops and pooling rows (model.md 5.4); which frames is settled in frame_times.py."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from molmo2core.examples import ByteArray, IntArray
from molmo2core.preprocessing.config import VisualGeometry
from molmo2core.preprocessing.image import patches, resize
from molmo2core.preprocessing.pooling import pooled_size, pooling_index


def frame_patches(frames: Iterable[ByteArray], num_frames: int, geometry: VisualGeometry) -> ByteArray:
    """Each frame squashed to one crop, as soon as it is decoded: only one is held at its full size.

    Args:
        frames: `num_frames` arrays [height, width, 3] uint8; one that follows itself is not resized again.
        num_frames: how many.
        geometry: of crops.

    Returns:
        [frames, P, D] uint8.
    """
    crops = np.empty((num_frames, geometry.num_patches, geometry.patch_bytes), np.uint8)
    size, before = geometry.crop_size, None
    for number, frame in enumerate(frames):
        crops[number] = crops[number - 1] if frame is before else patches(resize(frame, size, size), geometry)
        before = frame
    return crops


def frame_grid(geometry: VisualGeometry) -> tuple[int, int]:
    """(rows, columns) of visual tokens of one frame."""
    rows, columns = (pooled_size(geometry.grid, size) for size in geometry.video_pooling)
    return rows, columns


def video_pooling(frames: int, geometry: VisualGeometry) -> IntArray:
    """Pooling rows of all frames in order: [V, K] indices into frames * P patches."""
    grid = np.arange(geometry.num_patches, dtype=np.int32).reshape(geometry.grid, geometry.grid)
    one = pooling_index(grid, geometry.video_pooling, geometry.max_pool)
    offsets = np.arange(frames, dtype=np.int32)[:, None, None] * geometry.num_patches
    shifted: IntArray = np.where(one >= 0, one + offsets, one).reshape(-1, one.shape[1]).astype(np.int32)
    return shifted
