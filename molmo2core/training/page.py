"""A page with the curves of one training; no script, no other file.

The same lines give the same page, to the byte: a committed page is made from lines without times, so that it is no
reason for another digest.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

Line = Mapping[str, Any]
Series = dict[str, list[tuple[int, float]]]
"""Name -> (step, value)."""

PAGE = "training.html"
POINTS = 300
"""Of a curve, at most: each is the mean of as many steps as it takes."""
_WIDTH, _HEIGHT, _LEFT = 720, 200, 64
_HUE = 137  # degrees of the golden angle: neighbours in a list are far apart, however many there are
_STYLE = """
body { font-family: sans-serif; margin: 2em; max-width: 60em; color: #222 }
svg { background: #f4f4f4; display: block } text { font-size: 11px; fill: #444 }
line { stroke: #ccc } polyline { fill: none; stroke-width: 1.5; stroke-linecap: round }
polyline:hover { stroke-width: 3 }
.legend span { margin-right: 1.2em; white-space: nowrap } .legend b { font-variant-numeric: tabular-nums }
"""


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Curves over steps, in one frame."""

    title: str
    series: Series
    logarithmic: bool = False


def training_page(title: str, metrics: Sequence[Line], validations: Sequence[Line] = ()) -> str:
    """The page.

    Args:
        title: heading.
        metrics: lines of a metrics file, or of a part of them; fields that are missing are not drawn.
        validations: lines of callbacks/validation_file.py.
    """
    last = metrics[-1]["step"] if metrics else 0
    drawn = "".join(_drawn(chart, last) for chart in charts(metrics, validations) if chart.series)
    tokens, examples = (sum(line[name] for line in metrics) for name in ("tokens", "examples"))
    return (
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{html.escape(title)}</title>"
        f"<style>{_STYLE}</style><h1>{html.escape(title)}</h1>"
        f"<p>{last:,} steps, {examples:,} examples, {tokens:,} tokens. Curves are means of {_steps_per_point(last)} "
        "steps; beside a name stands its last value. docs/training.md says what each number is.</p>"
        f"{drawn}</html>\n"
    )


def charts(metrics: Sequence[Line], validations: Sequence[Line]) -> list[Chart]:
    """What is drawn, in order."""
    held_out = {f"held out: {name}": points for name, points in _series(validations, "loss").items()}
    return [
        Chart(title="Loss", series=_series(metrics, "loss") | held_out),
        Chart(title="Loss by task", series=_series(metrics, "loss_by_task")),
        Chart(title="Loss by task, held out", series=_series(validations, "loss_by_task")),
        Chart(title="z-loss", series=_series(metrics, "z")),
        Chart(title="Gradient norm before clipping", series=_series(metrics, "gradient_norm"), logarithmic=True),
        Chart(title="Learning rate", series=_series(metrics, "learning_rate")),
        Chart(title="Share of the packs' budgets that is used", series=_series(metrics, "fill")),
        Chart(title="Seconds: a step, and waits", series=_series(metrics, "seconds") | _series(metrics, "waits")),
        Chart(title="Tokens per second", series=_only(_series(metrics, "speed"), "tokens_per_second")),
        Chart(title="Share of the GPUs' peak", series=_only(_series(metrics, "speed"), "mfu", "hfu")),
        Chart(title="Memory, GiB", series=_series(metrics, "memory")),
    ]


def _series(lines: Iterable[Line], name: str) -> Series:
    """A number by its own name, the numbers of a mapping by theirs."""
    series: Series = {}
    for line in lines:
        value = line.get(name, {})
        for key, number in (value if isinstance(value, Mapping) else {name: value}).items():
            if math.isfinite(number):
                series.setdefault(key, []).append((line["step"], float(number)))
    return series


def _only(series: Series, *names: str) -> Series:
    return {name: series[name] for name in names if name in series}


def _drawn(chart: Chart, last_step: int) -> str:
    curves = {name: _thinned(points, _steps_per_point(last_step)) for name, points in sorted(chart.series.items())}
    values = [value for points in curves.values() for _, value in points if not chart.logarithmic or value > 0]
    low, high = (min(values), max(values)) if values else (1.0, 1.0)
    height = _scale(low, high, chart.logarithmic)
    frame = "".join(
        f"<line x1='{_LEFT}' y1='{y:.1f}' x2='{_WIDTH}' y2='{y:.1f}'/><text x='{_LEFT - 4}' y='{y + 4:.1f}' "
        f"text-anchor='end'>{value:.3g}</text>"
        for value, y in ((value, height(value)) for value in dict.fromkeys((high, low)))
    )
    lines, legend = "", ""
    for number, (name, points) in enumerate(curves.items()):
        colour = f"hsl({number * _HUE % 360} 65% 40%)"
        places = " ".join(
            f"{_LEFT + (_WIDTH - _LEFT) * step / max(last_step, 1):.1f},{height(value):.1f}"
            for step, value in (points if len(points) > 1 else points * 2)  # a line to itself is a dot
        )
        label = html.escape(name)
        lines += f"<polyline points='{places}' stroke='{colour}'><title>{label}</title></polyline>"
        legend += f"<span style='color:{colour}'>{label} <b>{chart.series[name][-1][1]:.4g}</b></span>"
    note = ", logarithmic" if chart.logarithmic else ""
    return (
        f"<h2>{html.escape(chart.title)}{note}</h2><svg width='{_WIDTH}' height='{_HEIGHT + 20}'>{frame}{lines}"
        f"<text x='{_LEFT}' y='{_HEIGHT + 16}'>0</text><text x='{_WIDTH - 4}' y='{_HEIGHT + 16}' "
        f"text-anchor='end'>step {last_step:,}</text></svg><p class='legend'>{legend}</p>"
    )


def _scale(low: float, high: float, logarithmic: bool) -> Callable[[float], float]:
    """From a value to pixels from the top; what is not above 0 stands at the bottom of a logarithmic one."""
    measure = (lambda value: math.log(max(value, low))) if logarithmic else float
    bottom = measure(low)
    extent = measure(high) - bottom or 1.0
    return lambda value: 8 + (_HEIGHT - 16) * (1 - (measure(value) - bottom) / extent)


def _steps_per_point(last_step: int) -> int:
    return max(1, math.ceil(last_step / POINTS))


def _thinned(points: Sequence[tuple[int, float]], steps: int) -> list[tuple[float, float]]:
    """Means of the points of each `steps` steps, at their mean step."""
    if steps == 1:
        return [(float(step), value) for step, value in points]
    groups: dict[int, list[tuple[int, float]]] = {}
    for step, value in points:
        groups.setdefault((step - 1) // steps, []).append((step, value))
    return [(fmean(step for step, _ in group), fmean(value for _, value in group)) for group in groups.values()]
