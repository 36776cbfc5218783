"""A very small corpus for tests, rendered by the real renderer."""

from __future__ import annotations

from pathlib import Path

from molmo2core.manifest.config import DataConfig
from molmo2core.sources.config import ShapesConfig
from molmo2core.sources.shapes import DATASETS, make_corpus


def tiny_corpus(folder: Path, **sizes: int) -> DataConfig:
    """Render a corpus of every task into `folder` in about a second; return the data section that names its manifests.

    Args:
        folder: becomes a committed folder: manifests/, media/, tokenizer/.
        sizes: fields of ShapesConfig that shall differ from 15 images, 4 image sets, 12 videos, 5 texts.
    """
    config = ShapesConfig(**({"images": 15, "image_sets": 4, "videos": 12, "texts": 5} | sizes))
    make_corpus(folder, config)
    return DataConfig(manifests={name: str(folder / "manifests" / f"{name}.jsonl") for name in DATASETS})
