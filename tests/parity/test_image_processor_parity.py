"""Our crops and pooling against transformers' own Molmo2 image processor: equal bytes, so no tolerance.

The oracle returns normalised floats; undoing its normalisation gives integers to within 1e-5 (measured: 7.6e-6),
which are compared exactly.  It does not clamp thin images, so the switch that reproduces this is on, except where the
two ways are compared.
"""

from __future__ import annotations

import functools
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.image_utils import load_image
from transformers.models.molmo2.image_processing_molmo2 import Molmo2ImageProcessor

from molmo2core.examples import ByteArray, IntArray
from molmo2core.image_decoding import decode_image
from molmo2core.preprocessing.config import VisualGeometry
from molmo2core.preprocessing.image import choose_tiling, image_crops, image_pooling
from molmo2core.testing.pictures import encoded, encoded_pictures, grown_photograph, noise, photographs

RELEASED = VisualGeometry()
TINY = VisualGeometry(crop_size=54, patch_size=6, overlap_margins=(1, 1))
UNEVEN = VisualGeometry(crop_size=60, patch_size=6, overlap_margins=(1, 2), image_pooling=(3, 2))
GEOMETRIES = {"released": RELEASED, "tiny": TINY, "uneven": UNEVEN}
SIZES = [(378, 378), (50, 50), (61, 97), (354, 536), (379, 379), (480, 640), (767, 1025), (1080, 1920), (1500, 200)]
"""(height, width)"""
EXTREMES = [
    (1, 1), (1, 2), (1, 700), (700, 1), (3, 5), (13, 15), (111, 400), (112, 112), (112, 2000), (113, 113), (100, 2000),
    (80, 6000), (6000, 80), (377, 379), (644, 910), (2239, 379), (3001, 1999),
]  # fmt: skip
PICTURES = encoded_pictures()


def native_image(
    image: object, geometry: VisualGeometry, max_crops: int
) -> tuple[ByteArray, IntArray, tuple[int, int]]:
    """Crops as bytes, pooling rows and pooled grid, from a path, a PIL image or a [3, h, w] tensor.

    A path is decoded by torchvision, which differs from transformers' `load_image` (Pillow, as in training) in rare
    kinds of files: it turns no WebP, reads no TIFF, BMP or AVIF, takes all frames, and leaves 16 bits as they are.
    """
    oracle = Molmo2ImageProcessor(
        max_crops=max_crops,
        patch_size=geometry.patch_size,
        overlap_margins=list(geometry.overlap_margins),
        pooling_size=list(geometry.image_pooling),
        size={"height": geometry.crop_size, "width": geometry.crop_size},
    )
    found = oracle(images=[image], return_tensors="pt")
    floats = (found["pixel_values"].numpy() * 0.5 + 0.5) * 255
    crops = np.rint(floats)
    assert np.abs(floats - crops).max() < 1e-4
    rows, columns = found["image_grids"][0, 2:].tolist()
    return crops.astype(np.uint8), found["image_token_pooling"].numpy(), (rows, columns)


def assert_same_as_native(
    pixels: ByteArray, image: object, geometry: VisualGeometry, max_crops: int
) -> tuple[int, int]:
    """Compare; returns the tiling."""
    crops, pooling, _ = native_image(image, geometry, max_crops)
    tiling = choose_tiling(pixels.shape[0], pixels.shape[1], geometry, max_crops, "as_released_processors")
    window = geometry.image_pooling[0] * geometry.image_pooling[1]
    np.testing.assert_array_equal(image_crops(pixels, tiling, geometry), crops)
    np.testing.assert_array_equal(image_pooling(tiling, geometry)[:, :window], pooling)
    return tiling


def planes(pixels: ByteArray) -> torch.Tensor:
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)


@functools.cache
def photograph(name: str) -> bytes:
    return photographs()[name] if name != "grown" else grown_photograph(photographs()["temple"], 4000, 3000)


@pytest.mark.parametrize("max_crops", [1, 8, 24])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_same_bytes_and_indices_as_transformers(name: str, max_crops: int) -> None:
    """Catches antialiasing, other rounding, other tilings and other orders of crops or windows."""
    geometry = GEOMETRIES[name]
    tilings = {
        assert_same_as_native(noise(*size), planes(noise(*size)), geometry, max_crops)
        for size in SIZES + (EXTREMES if max_crops == 8 else [])
    }
    assert len(tilings) >= min(3, max_crops), "the sizes exercise several tilings"


@settings(max_examples=120, deadline=None)  # small geometries: 4 ms each, both sides
@given(
    height=st.integers(1, 400),
    width=st.integers(1, 400),
    max_crops=st.integers(1, 24),
    geometry=st.sampled_from([TINY, UNEVEN]),
    low=st.integers(0, 253),
)
def test_same_bytes_at_any_size(height: int, width: int, max_crops: int, geometry: VisualGeometry, low: int) -> None:
    """Few grey levels make sums that end in exactly .5 frequent, where rounding would differ."""
    pixels = np.random.default_rng(height).integers(low, low + 3, (height, width, 3), dtype=np.uint8)
    assert_same_as_native(pixels, planes(pixels), geometry, max_crops)


@pytest.mark.parametrize("max_crops", [8, 24])
@pytest.mark.parametrize("name", ["portrait", "temple", "flower", "grown"])
def test_same_photographs(tmp_path: Path, name: str, max_crops: int) -> None:
    """From the encoded file, each side with its own decoding."""
    path = tmp_path / "photograph.jpg"
    path.write_bytes(photograph(name))
    assert_same_as_native(decode_image(photograph(name)), str(path), RELEASED, max_crops)


@pytest.mark.parametrize("name", PICTURES)
def test_same_pixels_from_every_kind_of_file(tmp_path: Path, name: str) -> None:
    """Catches a white matte, a forgotten orientation, another frame, and 16 bits scaled where the oracle cuts them."""
    pixels = decode_image(PICTURES[name])
    assert_same_as_native(pixels, load_image(Image.open(io.BytesIO(PICTURES[name]))), TINY, 8)
    if name.startswith(("JPEG,", "PNG,")):
        path = tmp_path / "picture"
        path.write_bytes(PICTURES[name])
        assert_same_as_native(pixels, str(path), TINY, 8)
    assert len(np.unique(pixels)) > 1 and pixels.dtype == np.uint8


def test_sixteen_bits_are_cut_not_scaled() -> None:
    """Training's and the oracle's way, and what it loses: nearly every grey of a 16-bit picture becomes white."""
    deep = np.linspace(0, 65535, 90 * 70).reshape(70, 90).astype(np.uint16)
    cut = decode_image(encoded(Image.fromarray(deep), "PNG"))[:, :, 0]
    np.testing.assert_array_equal(cut, np.minimum(deep, 255))
    scaled = np.rint(deep / 257)
    assert (cut == 255).mean() > 0.99 and (scaled == 255).mean() < 0.01


@pytest.mark.parametrize(
    ("size", "processors", "training"),
    [
        ((100, 2000), (1, 1), (1, 8)),
        ((50, 3000), (1, 1), (1, 8)),
        ((10_000, 100), (1, 1), (8, 1)),
        ((111, 400), (1, 1), (1, 2)),
        ((112, 2000), (1, 8), (1, 8)),
        ((90, 111), (1, 1), (1, 1)),
        ((112, 112), (1, 1), (1, 1)),
        ((113, 2000), (1, 8), (1, 8)),
    ],
)
def test_thin_images_both_ways(size: tuple[int, int], processors: tuple[int, int], training: tuple[int, int]) -> None:
    """model.md 4.1 step 2.  Training reads a thin image in crops along it; released processors squash it into one."""
    assert choose_tiling(*size, RELEASED, 8, "as_released_processors") == processors
    assert choose_tiling(*size, RELEASED, 8, "as_trained") == choose_tiling(*size, RELEASED, 8) == training
    _, _, grid = native_image(planes(noise(*size)), RELEASED, 8)
    assert grid == tuple((19 * count + 8 + 1) // 2 for count in processors)
