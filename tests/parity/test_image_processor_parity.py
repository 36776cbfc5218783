"""Our crops and pooling against transformers' own Molmo2 image processor: equal bytes, so no tolerance.

The oracle returns normalised floats; undoing its normalisation gives integers to within 1e-5 (measured: 7.6e-6),
which are compared exactly.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers.models.molmo2.image_processing_molmo2 import Molmo2ImageProcessor

from molmo2core.preprocessing.config import VisualGeometry
from molmo2core.preprocessing.image import choose_tiling, image_crops, image_pooling

GEOMETRIES = {
    "released": VisualGeometry(),
    "tiny": VisualGeometry(crop_size=54, patch_size=6, overlap_margins=(1, 1)),
    "uneven": VisualGeometry(crop_size=60, patch_size=6, overlap_margins=(1, 2), image_pooling=(3, 2)),
}
SIZES = [(378, 378), (50, 50), (61, 97), (354, 536), (379, 379), (480, 640), (767, 1025), (1080, 1920), (1500, 200)]


@pytest.mark.parametrize("max_crops", [1, 8, 24])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_same_bytes_and_indices_as_transformers(name: str, max_crops: int) -> None:
    """Catches antialiasing, other rounding, other tilings and other orders of crops or windows."""
    geometry = GEOMETRIES[name]
    oracle = Molmo2ImageProcessor(
        max_crops=max_crops,
        patch_size=geometry.patch_size,
        overlap_margins=list(geometry.overlap_margins),
        pooling_size=list(geometry.image_pooling),
        size={"height": geometry.crop_size, "width": geometry.crop_size},
    )
    tilings = set()
    for height, width in SIZES:
        pixels = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
        expected = oracle(images=[torch.from_numpy(pixels).permute(2, 0, 1)], return_tensors="pt")
        floats = (expected["pixel_values"].numpy() * 0.5 + 0.5) * 255
        assert np.abs(floats - np.rint(floats)).max() < 1e-4

        tiling = choose_tiling(height, width, geometry, max_crops)
        window = geometry.image_pooling[0] * geometry.image_pooling[1]
        tilings.add(tiling)
        np.testing.assert_array_equal(image_crops(pixels, tiling, geometry), np.rint(floats).astype(np.uint8))
        np.testing.assert_array_equal(
            image_pooling(tiling, geometry)[:, :window], expected["image_token_pooling"].numpy()
        )
    assert len(tilings) >= min(3, max_crops), "the sizes exercise several tilings"
