"""The evaluation report: one HTML file without links to anywhere, for a person who decides about a model."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from molmo2core.drawing import Picture, figure
from molmo2core.evaluation.gate import Verdict
from molmo2core.evaluation.run import Answer

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 64rem; padding: 0 1rem; color: #1b1f24; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; } th, td { padding: .25rem .8rem; text-align: left; border-bottom: 1px solid #ddd; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
.verdict { padding: .7rem 1rem; border-radius: .4rem; }
.passed { background: #e3f5e8; } .refused { background: #fdeaea; }
.example { border: 1px solid #ddd; border-radius: .4rem; padding: .6rem 1rem; margin: 1rem 0; }
.strip { display: flex; flex-wrap: wrap; gap: .6rem; } figure { margin: 0; }
figcaption { font-size: .8rem; color: #555; }
dl { display: grid; grid-template-columns: 8rem 1fr; gap: .2rem .8rem; margin: .6rem 0; } dt { color: #555; }
dd { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; }
dd { font-family: ui-monospace, monospace; font-size: .85rem; }
.ring { color: #00a03c; } .cross { color: #dc1e1e; }
"""


@dataclass(frozen=True, kw_only=True)
class DrawnAnswer:
    """An answer with its medium."""

    answer: Answer
    pictures: Sequence[Picture]


def build_report(
    *,
    title: str,
    facts: Mapping[str, str],
    verdict: Verdict,
    metrics: Mapping[str, float],
    blind_metrics: Mapping[str, float],
    counts: Mapping[str, int],
    drawn: Sequence[DrawnAnswer],
) -> str:
    """The HTML text.  Everything that models or data wrote is escaped.

    Args:
        title: heading.
        facts: what was evaluated, label -> value.
        verdict: of the gate.
        metrics: of the model.
        blind_metrics: of the same model with blanked images.
        counts: questions asked by task.
        drawn: examples to show.
    """
    return "\n".join(
        [
            "<!doctype html>",
            f'<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>',
            f"<style>{STYLE}</style></head><body>",
            f"<h1>{escape(title)}</h1>",
            definitions(facts),
            "<h2>Gate</h2>",
            _verdict(verdict),
            "<h2>Held-out metrics</h2>",
            "<p>Blind: the same model and questions with every pixel grey. What it still gets right, it guesses.</p>",
            _metrics(metrics, blind_metrics, counts),
            "<h2>Examples</h2>",
            '<p><span class="ring">&#9711;</span> true, as wide as an answer may miss; '
            '<span class="cross">&#10005;</span> predicted. Numbers are objects of a track.</p>',
            *(_example(example) for example in drawn),
            "</body></html>",
        ]
    )


def choose_drawn(answers: Sequence[Answer], count: int) -> list[Answer]:
    """`count` answers, tasks taking turns, in the order in which they were asked."""
    by_task: defaultdict[str, list[Answer]] = defaultdict(list)
    for answer in answers:
        by_task[answer.question.task].append(answer)
    ranked = [(rank, i, answer) for i, group in enumerate(by_task.values()) for rank, answer in enumerate(group)]
    chosen = sorted(ranked, key=lambda entry: entry[:2])[:count]
    return [answer for _, _, answer in sorted(chosen, key=lambda entry: (entry[1], entry[0]))]


def _verdict(verdict: Verdict) -> str:
    if verdict.passed:
        return '<p class="verdict passed"><strong>Passed.</strong> Every rule is met.</p>'
    reasons = "".join(f"<li>{escape(reason)}</li>" for reason in verdict.reasons)
    return f'<div class="verdict refused"><strong>Refused.</strong><ul>{reasons}</ul></div>'


def _metrics(metrics: Mapping[str, float], blind_metrics: Mapping[str, float], counts: Mapping[str, int]) -> str:
    rows = []
    for name, value in metrics.items():
        task = name.partition("/")[0]
        questions = counts.get(task, "")
        numbers = (_number(value), _number(blind_metrics.get(name, math.nan)), str(questions))
        cells = "".join(f'<td class="number">{number}</td>' for number in numbers)
        rows.append(f"<tr><td>{escape(name)}</td>{cells}</tr>")
    head = '<tr><th>metric</th><th class="number">model</th><th class="number">blind</th>'
    return f'<table>{head}<th class="number">questions</th></tr>{"".join(rows)}</table>'


def _example(example: DrawnAnswer) -> str:
    answer = example.answer
    measures = ", ".join(f"{name} {_number(value)}" for name, value in answer.score.measures.items())
    title = f"{answer.question.task}: {answer.dataset}/{answer.uid}"
    text = {
        "prompt": answer.prompt,
        "truth": answer.truth,
        "answer": answer.answer,
        "blind answer": answer.blind_answer,
        "scores": measures + (" (answer not understood)" if answer.score.parse_failed else ""),
    }
    pictures = "".join(figure(picture) for picture in example.pictures)
    return (
        f'<section class="example"><strong>{escape(title)}</strong><div class="strip">{pictures}</div>'
        f"{definitions(text)}</section>"
    )


def definitions(entries: Mapping[str, str]) -> str:
    """A list of labels and texts, escaped."""
    lines: Iterable[str] = (f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in entries.items())
    return f"<dl>{''.join(lines)}</dl>"


def _number(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "-"
