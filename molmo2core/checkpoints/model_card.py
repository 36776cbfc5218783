"""The model card of an exported folder: what it is, what it was made from, what to know."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from molmo2core.model.molmo2 import Molmo2

_UNKNOWN = "not recorded"


@dataclass(frozen=True, kw_only=True)
class Lineage:
    """Where weights come from; empty where it is not known."""

    checkpoint_digest: str = ""
    recipe_fingerprint: str = ""
    stage: str = ""
    step: int = 0
    datasets: tuple[tuple[str, str], ...] = ()
    """(name, content digest) of each dataset that a plan could draw from."""
    base_models: tuple[tuple[str, str], ...] = ()
    """(part, address) of the weights that training started from; empty for random ones."""
    metrics: tuple[tuple[str, float], ...] = ()
    """(name, value) of what was measured before the export."""


def model_card(model: Molmo2, dtype: str, lineage: Lineage) -> str:
    """Content of `README.md`."""
    decoder = model.config.decoder
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    stage = f"{lineage.stage}, {lineage.step}" if lineage.stage else _UNKNOWN
    facts = (
        ("decoder", f"{decoder.num_layers} layers, width {decoder.width}, {decoder.vocab_size} tokens"),
        (
            "vision encoder",
            f"{model.config.vision_encoder.num_layers} blocks, crops of {model.config.geometry.crop_size} pixels",
        ),
        ("recipe fingerprint", _code(lineage.recipe_fingerprint)),
        ("training stage, step", stage),
        ("checkpoint digest", _code(lineage.checkpoint_digest)),
        *((f"started from: {part}", _code(uri)) for part, uri in lineage.base_models),
    )
    return f"""\
---
library_name: transformers
pipeline_tag: image-text-to-text
---
# Molmo2, {num_parameters:,} parameters

A video-language model that points and tracks, in the released Molmo2 format ({dtype}). transformers 5.23 or newer
loads it without remote code: `AutoModelForImageTextToText.from_pretrained(folder)` and
`AutoProcessor.from_pretrained(folder)`.

{_table(("", ""), facts)}

## Data
{_table(("dataset", "content digest (sha256)"), ((name, _code(digest)) for name, digest in lineage.datasets))}

## Measured in training
{_table(("metric", "value"), ((name, f"{value:.4g}") for name, value in lineage.metrics))}

Metrics of the evaluation stand in the registry, with the model version that was made from this folder.

## To know
- transformers samples video frames without the last instant that training always includes.
- The chat template puts a space before past assistant turns, as the released one does; training has none.
"""


def _code(text: str) -> str:
    return f"`{text}`" if text else _UNKNOWN


def _table(head: tuple[str, str], rows: Iterable[tuple[str, str]]) -> str:
    lines = [f"| {name} | {value} |" for name, value in rows]
    return "\n".join([f"| {head[0]} | {head[1]} |", "| --- | --- |", *lines]) if lines else f"{_UNKNOWN.capitalize()}."
