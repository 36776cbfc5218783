"""`python -m molmo2core.model`: the named sizes and how many values each part of them has (model.md 1.5)."""

from __future__ import annotations

from typing import get_args

import torch

from molmo2core.model.config import ModelConfig, Size, named_config
from molmo2core.model.molmo2 import Molmo2

PARTS = ("vision_encoder", "connector", "decoder")


def num_values(config: ModelConfig) -> dict[str, int]:
    """Values of each part, of all parts as `total`, and as `stored` those of an exported file, which holds a tied head
    as a copy.  Nothing is allocated."""
    with torch.device("meta"):
        model = Molmo2(config)
    counts = {part: sum(p.numel() for p in model.get_submodule(part).parameters()) for part in PARTS}
    total = sum(counts.values())
    head = model.decoder.head_weight.numel() if config.decoder.tie_embeddings else 0
    return counts | {"total": total, "stored": total + head}


def main() -> None:
    """Print the table."""
    columns = (*PARTS, "total", "stored")
    print(f"{'size':<6}" + "".join(f"{name:>16}" for name in columns))
    for size in get_args(Size):
        counts = num_values(named_config(size))
        print(f"{size:<6}" + "".join(f"{counts[name]:>16,}" for name in columns))


if __name__ == "__main__":
    main()
