"""Tiling, patches and pooling against the golden values of model.md 4.1-4.3."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from molmo2core.examples import PADDING
from molmo2core.preprocessing.config import VisualGeometry
from molmo2core.preprocessing.image import (
    choose_tiling,
    image_crops,
    image_pooling,
    patch_owners,
    patches,
    pooled_grid,
    resize,
)
from molmo2core.preprocessing.lengths import num_image_tokens
from molmo2core.preprocessing.pooling import pooling_index
from molmo2core.preprocessing.video import video_pooling
from molmo2core.testing.pictures import noise

RELEASED = VisualGeometry()
TINY = VisualGeometry(crop_size=54, patch_size=6, overlap_margins=(1, 1))


@pytest.mark.parametrize(
    ("sizes", "tiling", "grid", "tokens"),
    [
        (((50, 50), (200, 200), (378, 378)), (1, 1), (14, 14), 410),
        (((354, 536),), (1, 2), (14, 23), 536),
        (((379, 379), (480, 640), (640, 480), (2000, 2000)), (2, 2), (23, 23), 752),
        (((768, 1024),), (2, 3), (23, 33), 982),
        (((1024, 768), (4000, 3000)), (3, 2), (33, 23), 992),
        (((720, 1280), (1080, 1920)), (2, 4), (23, 42), 1189),
        (((1920, 1080), (1000, 667)), (4, 2), (42, 23), 1208),
        (((300, 3000),), (1, 8), (14, 80), 1334),
        (((3000, 300),), (8, 1), (80, 14), 1400),
        # Thin images: sides shorter than the margins are clamped, as in training.
        (((100, 2000), (50, 3000)), (1, 8), (14, 80), 1334),
        (((10000, 100),), (8, 1), (80, 14), 1400),
        (((111, 400),), (1, 2), (14, 23), 536),
    ],
)
def test_golden_tilings(
    sizes: tuple[tuple[int, int], ...], tiling: tuple[int, int], grid: tuple[int, int], tokens: int
) -> None:
    """Catches wrong tie-breaking, swapped rows and columns, and margins left out of the size that is compared."""
    for height, width in sizes:
        assert choose_tiling(height, width, RELEASED, 8) == tiling
    assert pooled_grid(tiling, RELEASED) == grid
    assert num_image_tokens(tiling, RELEASED) == tokens


def test_longest_image_of_evaluation() -> None:
    """24 crops: 3680 tokens at most (model.md 4.3)."""
    tilings = [(i, j) for i in range(1, 25) for j in range(1, 25) if i * j <= 24]
    assert max((num_image_tokens(tiling, RELEASED), tiling) for tiling in tilings) == (3680, (24, 1))


@pytest.mark.parametrize(
    ("size", "rows", "missing", "total", "fingerprint", "last"),
    [
        ((378, 378), 392, 110, 1062153, "821e93968a5b2a20", [1457, -1, -1, -1]),
        ((354, 536), 518, 101, 2075571, "45e13a6fa90d4cbe", [2185, 2186, -1, -1]),
        ((480, 640), 725, 55, 4891990, "bb5454c25a1bb06a", [3616, 3617, 3643, 3644]),
        ((768, 1024), 955, 101, 8982701, "7f2f026e3c631564", [5075, -1, 5102, -1]),
        ((1080, 1920), 1162, 55, 14347704, "3764e5b2738bb162", [6532, 6533, 6559, 6560]),
        ((1920, 1080), 1162, 55, 14347704, "03af3434be918357", [6532, 6533, 6559, 6560]),
        ((300, 3000), 1316, 215, 16009596, "1c6ddba2c3b8c1d5", [6559, 6560, -1, -1]),
    ],
)
def test_golden_pooling(
    size: tuple[int, int], rows: int, missing: int, total: int, fingerprint: str, last: list[int]
) -> None:
    """Catches any wrong owner of an overlapped patch and any wrong order of windows."""
    index = image_pooling(choose_tiling(*size, RELEASED, 8), RELEASED)
    assert index.shape == (rows, RELEASED.max_pool) and (index[:, 4:] == PADDING).all()
    index = index[:, :4].astype("<i8")
    assert (index == PADDING).sum() == missing
    assert index[index >= 0].sum() == total
    assert hashlib.sha256(np.ascontiguousarray(index).tobytes()).hexdigest()[:16] == fingerprint
    assert index[196].tolist() == [729, 730, 756, 757]
    assert index[-1].tolist() == last


@pytest.mark.parametrize(
    ("size", "tiling", "grid", "tokens", "total", "fingerprint"),
    [
        ((378, 378), (1, 1), (14, 14), 410, 1062153, "821e93968a5b2a20"),
        ((480, 640), (2, 2), (23, 23), 752, 4891990, "bb5454c25a1bb06a"),
        ((768, 1024), (3, 4), (33, 42), 1619, 28125006, "1bb89af9a0a059a8"),
        ((1080, 1920), (4, 6), (42, 61), 2804, 97380528, "bb1a545505f45b5b"),
        ((1920, 1080), (6, 4), (61, 42), 2823, 97380528, "e2bfc1f43aa28d18"),
        ((2000, 2000), (4, 4), (42, 42), 2006, 46556244, "e7b7defc62e0dd9b"),
        ((4000, 3000), (6, 4), (61, 42), 2823, 97380528, "e2bfc1f43aa28d18"),
        ((300, 3000), (1, 11), (14, 109), 1740, 28025298, "8b4e0ae310843677"),
        ((6000, 400), (21, 1), (204, 14), 3260, 92386143, "4874c3988cbfcf74"),
        ((10_000, 300), (24, 1), (232, 14), 3680, 118986948, "0040a3954445c624"),
    ],
)
def test_golden_values_of_24_crops(
    size: tuple[int, int], tiling: tuple[int, int], grid: tuple[int, int], tokens: int, total: int, fingerprint: str
) -> None:
    """What inference uses.  Taken from transformers' own processor with max_crops 24 (indices; 5.23), and kept."""
    assert choose_tiling(*size, RELEASED, 24) == tiling
    assert pooled_grid(tiling, RELEASED) == grid
    assert num_image_tokens(tiling, RELEASED) == tokens
    index = image_pooling(tiling, RELEASED)[:, :4].astype("<i8")
    assert index[index >= 0].sum() == total
    assert hashlib.sha256(np.ascontiguousarray(index).tobytes()).hexdigest()[:16] == fingerprint


def test_golden_frame_pooling() -> None:
    index = video_pooling(3, RELEASED)
    assert index.shape == (3 * 81, 9) and (index >= 0).all()
    assert index[0].tolist() == [0, 1, 2, 27, 28, 29, 54, 55, 56]
    assert index.sum() == 2390391
    assert hashlib.sha256(index.astype("<i8").tobytes()).hexdigest()[:16] == "5e9b0b53613b49d8"


def test_golden_owners() -> None:
    """Inner margins belong to the neighbour (model.md 4.1 step 6)."""
    owners = patch_owners((1, 2), RELEASED)
    assert owners.shape == (27, 46)
    assert owners[0].tolist() == [*range(23), *range(733, 756)]
    assert owners[26].tolist() == [*range(702, 725), *range(1435, 1458)]


def test_uneven_windows_are_padded_after_first() -> None:
    """One missing row goes below, two are shared; a mix-up would shift every feature."""
    index = pooling_index(np.arange(4).reshape(1, 4), (3, 2), 9)
    assert index.tolist() == [
        [-1, -1, 0, 1, -1, -1, -1, -1, -1],
        [-1, -1, 2, 3, -1, -1, -1, -1, -1],
    ]


def test_patches_are_row_major_with_channel_fastest() -> None:
    pixels = np.arange(54 * 54 * 3, dtype=np.uint32).reshape(54, 54, 3)
    cut = patches(pixels, TINY)
    assert cut.shape == (81, 108)
    assert cut[0, :6].tolist() == [0, 1, 2, 3, 4, 5]
    assert cut[0, 18] == pixels[1, 0, 0]
    assert cut[1, 0] == pixels[0, 6, 0]
    assert cut[9, 0] == pixels[6, 0, 0]


def test_owned_patches_rebuild_the_canvas() -> None:
    """The patches that pooling uses, put back in place, are the resized image: no patch from a wrong crop."""
    tiling = (2, 3)
    height, width = (count * 42 + 12 for count in tiling)  # so large that resizing changes nothing
    pixels = noise(height, width)
    crops = image_crops(pixels, tiling, TINY)
    owned = crops[1:].reshape(-1, TINY.patch_bytes)[patch_owners(tiling, TINY)]
    rows, columns = owned.shape[:2]
    rebuilt = owned.reshape(rows, columns, 6, 6, 3).transpose(0, 2, 1, 3, 4).reshape(height, width, 3)
    assert (rebuilt == pixels).all()


def test_low_resolution_view_is_the_only_crop_twice_when_the_tiling_is_one() -> None:
    """(1, 1) is no special case: two equal crops (model.md 4.4)."""
    crops = image_crops(noise(20, 30), (1, 1), TINY)
    assert crops.shape == (2, 81, 108) and crops.dtype == np.uint8
    assert (crops[0] == crops[1]).all()


def test_halves_round_to_even_bytes() -> None:
    """Enlarged twice, neighbours 0 and 1 meet at 0.25 and 0.75; shrunk to half, 0 and 1 at 0.5, 1 and 2 at 1.5."""
    line = np.array([0, 1, 1, 2, 2, 3], np.uint8)[None, :, None].repeat(2, axis=0).repeat(3, axis=2)
    assert resize(line, 1, 3)[0, :, 0].tolist() == [0, 2, 2]
    assert resize(line, 2, 12)[0, :4, 0].tolist() == [0, 0, 1, 1]
    assert resize(line, 2, 6) is line
