"""Images as overlapping crops: choose a tiling, resize, cut (model.md 4.1).

The low-resolution view is crop 0; the high-resolution crops follow row-major and overlap by the geometry's margins.
All of them are windows of plain, aspect-ignoring resizes of the whole image.
"""

from __future__ import annotations

import numpy as np

from molmo2core.examples import ByteArray, FloatArray, IntArray
from molmo2core.preprocessing.config import ThinImages, VisualGeometry
from molmo2core.preprocessing.pooling import pooled_size, pooling_index


def resize(pixels: ByteArray, height: int, width: int) -> ByteArray:
    """Bilinear without antialiasing, aspect ratio not kept, rounded back to uint8.

    Args:
        pixels: [h, w, 3] uint8.

    Returns:
        [height, width, 3] uint8.
    """
    return pixels if pixels.shape[:2] == (height, width) else _interpolate(pixels.astype(np.float32), height, width)


def _interpolate(pixels: FloatArray, height: int, width: int) -> ByteArray:
    """`resize` of [h, w, 3] float32 that hold bytes.

    torch's kernel is used, because the released processors use it and a sum that ends in .5 rounds by the last bit of
    its float: four products added in torch's order, fused where the processor can.  Given channels last it writes the
    same bits as given planes, in half the time and without turning the image around.  The floats come from numpy, which
    asks for huge pages: for a large image a third of the time of torch's own conversion.
    """
    import torch  # here, so that planning, which needs only lengths, does without
    from torch.nn.functional import interpolate

    planes = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)  # in this order, or torch writes planes
    scaled = interpolate(planes, size=(height, width), mode="bilinear", align_corners=False, antialias=False)
    values: FloatArray = scaled[0].permute(1, 2, 0).numpy()
    return np.rint(values, out=values).astype(np.uint8)  # as torch rounds; numpy is three times as fast


def choose_tiling(
    height: int, width: int, geometry: VisualGeometry, max_crops: int, thin_images: ThinImages = "as_trained"
) -> tuple[int, int]:
    """(rows, columns) of crops: the smallest enlargement of the image that fits, else the least reduction.

    Args:
        height: of the image in pixels, like `width`.
        geometry: of crops.
        max_crops: rows * columns at most.
        thin_images: what becomes of sides that are not longer than the margins (model.md 4.1 step 2).
    """
    window, margin = _window(geometry)
    candidates = sorted(
        ((i, j) for i in range(1, max_crops + 1) for j in range(1, max_crops // i + 1)),
        key=lambda tiling: (tiling[0] * tiling[1], tiling[0]),
    )
    sides = np.array([height - margin, width - margin], np.float32)
    if thin_images == "as_trained":
        sides = np.maximum(sides, 1)
    with np.errstate(divide="ignore"):  # a side as long as the margins, unclamped, fits at any scale
        scales = (np.array(candidates, np.float32) * np.float32(window) / sides).min(axis=1)
    if (scales < 1).all():
        return candidates[int(scales.argmax())]
    return candidates[int(np.where(scales < 1, np.inf, scales).argmin())]


def pooled_grid(tiling: tuple[int, int], geometry: VisualGeometry) -> tuple[int, int]:
    """(rows, columns) of visual tokens of the high-resolution crops."""
    rows, columns = (
        pooled_size(side, size) for side, size in zip(_canvas(tiling, geometry), geometry.image_pooling, strict=True)
    )
    return rows, columns


def low_res_grid(geometry: VisualGeometry) -> tuple[int, int]:
    """(rows, columns) of visual tokens of the low-resolution view."""
    rows, columns = (pooled_size(geometry.grid, size) for size in geometry.image_pooling)
    return rows, columns


def image_crops(pixels: ByteArray, tiling: tuple[int, int], geometry: VisualGeometry) -> ByteArray:
    """The low-resolution view and the high-resolution crops.

    Args:
        pixels: [h, w, 3] uint8.
        tiling: from `choose_tiling`.

    Returns:
        [1 + rows * columns, P, D] uint8 patches.
    """
    (rows, columns), grid = tiling, geometry.grid
    height, width = (side * geometry.patch_size for side in _canvas(tiling, geometry))
    stride, size = _window(geometry)[0] // geometry.patch_size, geometry.crop_size
    source = pixels.astype(np.float32)
    low = _interpolate(source, size, size)
    canvas = _patch_grid(low if (height, width) == (size, size) else _interpolate(source, height, width), geometry)
    crops = np.empty((1 + rows * columns, grid, grid, *canvas.shape[2:]), np.uint8)
    crops[0] = _patch_grid(low, geometry)
    for number, (r, c) in enumerate(np.ndindex(rows, columns), start=1):
        crops[number] = canvas[stride * r : stride * r + grid, stride * c : stride * c + grid]
    return crops.reshape(len(crops), geometry.num_patches, geometry.patch_bytes)


def image_pooling(tiling: tuple[int, int], geometry: VisualGeometry) -> IntArray:
    """Pooling rows of the low-resolution view, then of the high-resolution crops.

    Returns:
        [V, K] indices into the (1 + rows * columns) * P patches of `image_crops`.
    """
    low = np.arange(geometry.num_patches, dtype=np.int32).reshape(geometry.grid, geometry.grid)
    high = patch_owners(tiling, geometry) + geometry.num_patches
    return np.concatenate([pooling_index(grid, geometry.image_pooling, geometry.max_pool) for grid in (low, high)])


def patch_owners(tiling: tuple[int, int], geometry: VisualGeometry) -> IntArray:
    """Number of the crop patch that shows each patch of the canvas; overlaps belong to the crop further inside.

    Crop (r, c) owns its patches less the margins on sides that touch another crop (model.md 4.1 step 6).

    Returns:
        [canvas rows, canvas columns] indices into rows * columns * P patches.
    """
    (crop_row, row), (crop_column, column) = (_owners_of_side(count, geometry) for count in tiling)
    crop = crop_row[:, None] * tiling[1] + crop_column[None, :]
    owners: IntArray = crop * geometry.num_patches + row[:, None] * geometry.grid + column[None, :]
    return owners


def patches(crop: ByteArray, geometry: VisualGeometry) -> ByteArray:
    """[crop_size, crop_size, 3] -> [P, D]: patches row-major; inside a patch row, column, channel (fastest)."""
    return _patch_grid(crop, geometry).reshape(geometry.num_patches, geometry.patch_bytes)


def _patch_grid(pixels: ByteArray, geometry: VisualGeometry) -> ByteArray:
    """[h, w, 3] -> [patch rows, patch columns, patch_size, patch_size * 3], a view."""
    size = geometry.patch_size
    rows, columns = pixels.shape[0] // size, pixels.shape[1] // size
    return pixels.reshape(rows, size, columns, size * 3).transpose(0, 2, 1, 3)


def _window(geometry: VisualGeometry) -> tuple[int, int]:
    """Pixels from one crop to the next, and pixels of both margins."""
    margin = sum(geometry.overlap_margins) * geometry.patch_size
    return geometry.crop_size - margin, margin


def _canvas(tiling: tuple[int, int], geometry: VisualGeometry) -> tuple[int, int]:
    """(rows, columns) of patches of the resized image that the crops cover."""
    margin = sum(geometry.overlap_margins)
    rows, columns = (count * (geometry.grid - margin) + margin for count in tiling)
    return rows, columns


def _owners_of_side(count: int, geometry: VisualGeometry) -> tuple[IntArray, IntArray]:
    """For each patch along one side of the canvas: which crop shows it, and its position in that crop."""
    before, after = geometry.overlap_margins
    crop, local = [], []
    for number in range(count):
        first = before if number > 0 else 0
        last = geometry.grid - (after if number < count - 1 else 0)
        local.append(np.arange(first, last, dtype=np.int32))
        crop.append(np.full(last - first, number, np.int32))
    return np.concatenate(crop), np.concatenate(local)
