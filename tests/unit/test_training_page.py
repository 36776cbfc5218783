"""The page of a training's curves."""

from __future__ import annotations

import math
import re
from typing import Any

from molmo2core.training.page import POINTS, charts, training_page

STEPS = 1000


def line(step: int) -> dict[str, Any]:
    return {
        "step": step,
        "loss": 2 + 6 * math.exp(-step / 100),
        "z": 0.01,
        "loss_by_task": {"<b>": 3.0} if step % 2 else {"text": 1.0},
        "gradient_norm": {"decoder": 0.0 if step == 7 else 2.0},
        "learning_rate": {"decoder": 1e-5},
        "fill": {"tokens": 0.9, "crops": 0.5},
        "tokens": 100,
        "examples": 3,
    }


TIMES = {"seconds": 1.0, "waits": {"for_data": 0.1, "for_device": 0.2}, "memory": {"host": 3.0}}
TIMES |= {"speed": {"tokens_per_second": 100.0, "mfu": 0.4, "hfu": 0.5}}


def points_of(page: str, name: str) -> list[tuple[float, float]]:
    (found,) = re.findall(rf"<polyline points='([^']*)'[^>]*><title>{name}</title>", page)
    return [(float(x), float(y)) for x, y in (place.split(",") for place in found.split())]


def test_curves_are_thinned_means_inside_their_frame() -> None:
    """Would catch a page that grows with the steps, curves upside down, and a norm of 0 on a logarithmic axis."""
    page = training_page("sft", [line(step) for step in range(1, STEPS + 1)])
    assert len(page) < 60_000
    assert "1,000 steps, 3,000 examples, 100,000 tokens" in page
    loss = points_of(page, "loss")
    assert len(loss) == STEPS / 4 <= POINTS
    assert loss == sorted(loss), "a falling loss goes down, where y is larger, to the right"
    curves = re.findall("<polyline points='([0-9., ]+)'", page)
    assert len(curves) == page.count("<polyline") > 5, "numbers alone"
    assert all(0 <= float(place.split(",")[1]) <= 200 for curve in curves for place in curve.split())


def test_a_page_shows_what_its_lines_have_and_is_the_same_each_time() -> None:
    """A committed page has no times, or its digest and that of all that follows would change from run to run."""
    lines = [line(step) for step in range(1, 20)]
    timed = [one | TIMES for one in lines]
    page = training_page("sft", lines)
    assert page == training_page("sft", lines)
    for title in ("Seconds", "Memory", "Tokens per second", "peak", "held out"):
        assert title not in page
    timed_page = training_page("sft", timed, [{"step": 10, "loss": 4.0, "loss_by_task": {"text": 5.0}}])
    for title in ("Seconds", "Memory", "Tokens per second", "peak", "held out"):
        assert title in timed_page
    assert len(points_of(timed_page, "held out: loss")) == 2, "one value is a dot"
    drawn = {name for chart in charts(timed, []) for name in chart.series}
    assert drawn >= {"loss", "z", "tokens", "mfu", "hfu", "for_data", "host", "text", "decoder"}


def test_numbers_that_cannot_be_drawn_are_left_out() -> None:
    """Gradients of a part that nothing reaches are 0, on a logarithmic axis; a held-out loss may be no number."""
    lines = [line(step) | {"gradient_norm": {"decoder": 0.0}} for step in (1, 2)]
    page = training_page("sft", lines, [{"step": 1, "loss": math.nan, "loss_by_task": {}}])
    assert "nan" not in page and "Gradient norm" in page and "held out" not in page


def test_names_are_escaped() -> None:
    page = training_page("<script>", [line(1), line(2)])
    assert "<script>" not in page and "<b> <b>" not in page and "&lt;b&gt;" in page


def test_a_training_without_steps_has_a_page_all_the_same() -> None:
    assert "0 steps" in training_page("sft", [])
