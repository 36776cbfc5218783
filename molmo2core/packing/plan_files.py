"""A plan as files: raw arrays that every loader worker maps into memory, numbers for people, a small picture.

Folder: `entries.npy`, `pack_offsets.npy`, `plan.json`, `fill.html`.
"""

from __future__ import annotations

import dataclasses
import html
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from molmo2core.errors import DataError
from molmo2core.packing.config import PackingConfig
from molmo2core.packing.plan import ENTRY, PackPlan, PlannedPacks

MAX_LISTED = 100
"""Left-out branches that `plan.json` lists; all are counted."""
BINS = 20


def write_plan(planned: PlannedPacks, proportions: Mapping[str, float], folder: Path) -> dict[str, Any]:
    """Write the folder; return its statistics, as in `plan.json`."""
    _save(folder / "entries.npy", planned.plan.entries)
    _save(folder / "pack_offsets.npy", planned.plan.pack_offsets)
    statistics = plan_statistics(planned, proportions)
    content = {"packing": dataclasses.asdict(planned.plan.packing), "statistics": statistics}
    (folder / "plan.json").write_text(json.dumps(content, indent=1, sort_keys=True))
    (folder / "fill.html").write_text(fill_page(planned, statistics))
    return statistics


def _save(path: Path, array: npt.NDArray[Any]) -> None:
    """By way of memory: writing straight to a file, numpy does not say why a disk takes no more."""
    content = io.BytesIO()
    np.save(content, array, allow_pickle=False)
    path.write_bytes(content.getbuffer())


def read_plan(folder: Path) -> PackPlan:
    """Map a plan's arrays into memory.

    Raises:
        DataError: a file is missing or does not belong to the others.
    """
    try:
        entries = np.load(folder / "entries.npy", mmap_mode="r", allow_pickle=False)
        pack_offsets = np.load(folder / "pack_offsets.npy", mmap_mode="r", allow_pickle=False)
        packing = PackingConfig(**json.loads((folder / "plan.json").read_text())["packing"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(str(folder), found=f"no pack plan ({error})", mend="plan again") from error
    if entries.dtype != ENTRY or pack_offsets[-1] != len(entries):
        raise DataError(str(folder), found=f"{entries.dtype}, {pack_offsets[-1]} entries of {len(entries)}")
    return PackPlan(entries=entries, pack_offsets=pack_offsets, packing=packing)


def plan_statistics(planned: PlannedPacks, proportions: Mapping[str, float]) -> dict[str, Any]:
    """How full the packs are (bounds, not real lengths) and what was drawn."""
    plan = planned.plan
    packs = max(len(plan), 1)
    draws = sum(planned.draws.values())
    fill_tokens = float(planned.tokens.sum()) / (packs * plan.packing.sequence_tokens)
    fill_crops = float(planned.crops.sum()) / (packs * max(plan.packing.crop_budget, 1))
    branches = plan.entries["stop_branch"].astype(np.int64) - plan.entries["first_branch"]
    return {
        "packs": len(plan),
        "examples": len(plan.entries),
        "examples_per_pack": len(plan.entries) / packs,
        "branches_per_pack": float(branches.sum()) / packs,
        "token_fill": fill_tokens,
        "crop_fill": fill_crops,
        "binding_fill": max(fill_tokens, fill_crops),
        "draws": {
            name: {"draws": count, "share": count / max(draws, 1), "wanted": proportions[name]}
            for name, count in planned.draws.items()
        },
        "num_left_out": len(planned.left_out),
        "left_out": [dataclasses.asdict(item) for item in planned.left_out[:MAX_LISTED]],
    }


def fill_page(planned: PlannedPacks, statistics: Mapping[str, Any]) -> str:
    """A page with one histogram for each budget; no script, no other file."""
    packing = planned.plan.packing
    histograms = "".join(
        f"<h2>{html.escape(name)}: {statistics[key]:.1%} of {budget}</h2>{_histogram(used / max(budget, 1))}"
        for name, key, used, budget in (
            ("tokens", "token_fill", planned.tokens, packing.sequence_tokens),
            ("crops", "crop_fill", planned.crops, packing.crop_budget),
        )
    )
    return (
        "<!doctype html><meta charset='utf-8'><title>Pack plan</title><style>body{font-family:sans-serif}</style>"
        f"<h1>{statistics['packs']} packs, {statistics['examples_per_pack']:.2f} examples each</h1>{histograms}"
    )


def _histogram(fill: npt.NDArray[np.float64]) -> str:
    """Bars over 0..100 % of a budget, as inline SVG."""
    counts, _ = np.histogram(fill, bins=BINS, range=(0.0, 1.0))
    highest = max(int(counts.max()), 1)
    bars = "".join(
        f"<rect x='{20 * n}' y='{100 - 100 * count / highest:.1f}' width='18' height='{100 * count / highest:.1f}'>"
        f"<title>{n * 100 // BINS}-{(n + 1) * 100 // BINS} %: {count} packs</title></rect>"
        for n, count in enumerate(counts.tolist())
    )
    return f"<svg width='{20 * BINS}' height='120' fill='#2a6'>{bars}<text y='116' fill='#000'>0-100 %</text></svg>"
