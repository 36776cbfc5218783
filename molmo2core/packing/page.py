"""A page that shows how full the packs are and what was drawn; no script, no other file."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from molmo2core.packing.config import PackingConfig
from molmo2core.packing.entries import Ints

BINS = 40
"""Bars of a histogram, at most."""
_STYLE = """
body { font-family: sans-serif; margin: 2em; max-width: 60em; color: #222 }
svg { background: #f4f4f4 } text { font-size: 11px }
table { border-collapse: collapse } td, th { padding: .2em .8em; text-align: right } td:first-child { text-align: left }
.bar { background: #2a6; height: .8em } .wanted { background: #bbb; height: .3em }
"""


def fill_page(counts: Mapping[str, Ints], statistics: Mapping[str, Any], packing: PackingConfig) -> str:
    """The page.

    Args:
        counts: of statistics.PlanTally.
        statistics: of the same.
        packing: the budgets.
    """
    budgets = {"tokens": packing.sequence_tokens, "crops": packing.crop_budget}
    histograms = "".join(
        f"<h2>{name} of a pack{f', of {budgets[name]}' if name in budgets else ''}</h2>"
        f"{_histogram(counts[name], budgets.get(name, len(counts[name]) - 1))}<p>"
        + ", ".join(f"{key} {value:,.4g}" for key, value in statistics["per_pack"][name].items())
        + "</p>"
        for name in ("tokens", "crops", "examples", "branches")
    )
    return (
        f"<!doctype html><meta charset='utf-8'><title>Pack plan</title><style>{_STYLE}</style>"
        f"<h1>{statistics['packs']:,} packs, {statistics['examples_per_pack']:.2f} examples each</h1>"
        f"<p>{statistics['token_fill']:.1%} of the tokens and {statistics['crop_fill']:.1%} of the crops are used: "
        f"{statistics['bound_reached']:.1%} of what no packing can exceed. Lengths are upper bounds; what is really "
        f"used is logged in training. {statistics['num_left_out']} branches fit in no sequence.</p>"
        f"{histograms}<h2>Draws</h2>{_draws(statistics['draws'])}"
    )


def _histogram(counts: Ints, limit: int) -> str:
    """Bars over 0..limit, as inline SVG; every bar says what it counts."""
    width = max(1, -(-(limit + 1) // BINS))
    edges = np.arange(0, max(limit + 1, len(counts)), width)
    packs = np.add.reduceat(np.append(counts, np.zeros(max(0, int(edges[-1]) + 1 - len(counts)), np.int64)), edges)
    highest = max(int(packs.max()), 1)
    bars = "".join(
        f"<rect x='{16 * n}' y='{100 - 100 * count / highest:.1f}' width='14' height='{100 * count / highest:.1f}' "
        f"fill='#2a6'><title>{_range(int(edges[n]), width)}: {count:,} packs</title></rect>"
        for n, count in enumerate(packs.tolist())
    )
    right = 16 * len(packs)
    return (
        f"<svg width='{right}' height='120'>{bars}<text x='2' y='115'>0</text>"
        f"<text x='{right - 2}' y='115' text-anchor='end'>{limit:,}</text></svg>"
    )


def _range(first: int, width: int) -> str:
    return f"{first:,}" if width == 1 else f"{first:,} to {first + width - 1:,}"


def _draws(draws: Mapping[str, Mapping[str, float]]) -> str:
    """A table: drawn and wanted share of each dataset, the latter as a grey bar, and its epochs."""
    largest = max((facts["share"] for facts in draws.values()), default=0.0) or 1.0
    rows: Sequence[str] = [
        f"<tr><td>{html.escape(name)}</td><td>{facts['draws']:,}</td><td>{facts['share']:.2%}</td>"
        f"<td>{facts['wanted']:.2%}</td><td>{facts['samples']:,}</td><td>{facts['epochs']:.2f}</td>"
        f"<td style='width:15em'><div class='bar' style='width:{facts['share'] / largest:.1%}'></div>"
        f"<div class='wanted' style='width:{min(facts['wanted'] / largest, 1):.1%}'></div></td></tr>"
        for name, facts in sorted(draws.items(), key=lambda item: -item[1]["share"])
    ]
    return (
        "<table><tr><th>dataset</th><th>draws</th><th>share</th><th>wanted</th><th>samples</th><th>epochs</th><th></th>"
        f"</tr>{''.join(rows)}</table>"
    )
