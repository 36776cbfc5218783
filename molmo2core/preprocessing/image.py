"""Images as overlapping crops: decode, choose a tiling, resize, cut (model.md 4.1).

The low-resolution view is crop 0; the high-resolution crops follow row-major and overlap by the geometry's margins.
All of them are windows of plain, aspect-ignoring resizes of the whole image.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageOps

from molmo2core.errors import DataError
from molmo2core.examples import ByteArray, IntArray
from molmo2core.preprocessing.config import VisualGeometry
from molmo2core.preprocessing.pooling import pooled_size, pooling_index


def decode_image(data: bytes, where: str = "image") -> ByteArray:
    """RGB pixels as displayed: EXIF orientation applied, alpha dropped.

    Returns:
        [height, width, 3] uint8.

    Raises:
        DataError: the bytes are no complete image.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            pixels = np.array(ImageOps.exif_transpose(image).convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(
            where, found=f"{len(data)} bytes that do not decode: {error}", expected="a complete image"
        ) from error
    return pixels


def resize(pixels: ByteArray, height: int, width: int) -> ByteArray:
    """Bilinear without antialiasing, aspect ratio not kept, rounded back to uint8.

    torch's kernel is used, because the released processors use it and ties round differently in others.

    Args:
        pixels: [h, w, 3] uint8.

    Returns:
        [height, width, 3] uint8.
    """
    import torch  # here, so that planning, which needs only lengths, does without
    from torch.nn.functional import interpolate

    source = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))[None].float()
    scaled = interpolate(source, size=(height, width), mode="bilinear", align_corners=False, antialias=False)
    result: ByteArray = scaled[0].round_().clamp_(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
    return result


def choose_tiling(height: int, width: int, geometry: VisualGeometry, max_crops: int) -> tuple[int, int]:
    """(rows, columns) of crops: the smallest enlargement of the image that fits, else the least reduction.

    Sides shorter than the margins count as one pixel, as in training; the released processors do not clamp, so thin
    images can get another tiling there (model.md 4.1 step 2).
    """
    window, margin = _window(geometry)
    candidates = sorted(
        ((i, j) for i in range(1, max_crops + 1) for j in range(1, max_crops + 1) if i * j <= max_crops),
        key=lambda tiling: (tiling[0] * tiling[1], tiling[0]),
    )
    sides = np.array([max(1, height - margin), max(1, width - margin)], np.float32)
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
    rows, columns = tiling
    stride, size = _window(geometry)[0], geometry.crop_size
    height, width = (side * geometry.patch_size for side in _canvas(tiling, geometry))
    canvas = resize(pixels, height, width)
    crops = [resize(pixels, size, size)] + [
        canvas[stride * r : stride * r + size, stride * c : stride * c + size]
        for r in range(rows)
        for c in range(columns)
    ]
    return np.stack([patches(crop, geometry) for crop in crops])


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
    grid, size = geometry.grid, geometry.patch_size
    return crop.reshape(grid, size, grid, size, 3).transpose(0, 2, 1, 3, 4).reshape(grid * grid, geometry.patch_bytes)


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
