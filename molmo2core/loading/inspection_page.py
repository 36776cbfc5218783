"""Packs as one HTML page that needs no other file and no network."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape

from PIL import Image

from molmo2core.drawing import Picture, draw_marks, figure
from molmo2core.examples import ByteArray
from molmo2core.loading.inspection import (
    BranchView,
    ExampleView,
    PackView,
    TokenView,
    VisualView,
)
from molmo2core.loading.inspection_text import deviation_text, visible

_SIDE = 160  # pixels of a crop or frame
_NAMED_ROWS = 2.5  # percent of the picture's height
_REPEATED = 8  # equal tokens that are written out in a branch: a reply should be read as it is
_FAINTEST = 0.25  # how strongly the smallest loss weight is shaded
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; color: #1b1f24; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.25rem; margin-top: 2.5rem; border-top: 2px solid #1b1f24; }
h3 { font-size: 1.05rem; margin-bottom: .2rem; }
table { border-collapse: collapse; margin: .4rem 0; }
th, td { padding: .15rem .7rem; text-align: left; border-bottom: 1px solid #ddd; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
.strip { display: flex; flex-wrap: wrap; gap: .5rem; margin: .5rem 0; } figure { margin: 0; }
figcaption { font-size: .75rem; color: #555; max-width: 10rem; }
.example { border: 1px solid #ddd; border-radius: .4rem; padding: .2rem 1rem .6rem; margin: 1rem 0; }
.tokens { font: .82rem/1.7 ui-monospace, monospace; overflow-wrap: anywhere; margin: .3rem 0 .8rem; }
.tokens span { white-space: pre-wrap; border-radius: .15rem; box-shadow: inset -1px 0 0 #fff; }
.root { background: #e4e7eb; } .prompt { background: #d8e6fb; }
.target { outline: 1px dashed #b35900; }
.mask { position: relative; width: 24rem; margin: .4rem 0 .4rem 6.5rem; }
.mask img { display: block; width: 100%; image-rendering: pixelated; outline: 1px solid #999; }
.mask i { position: absolute; border: 0 solid #c33; opacity: .6; }
.mask span { position: absolute; transform: translateY(-50%); font-size: .7rem; line-height: 1; white-space: nowrap; }
.mask .of-example { right: calc(100% + 4.2rem); font-weight: 600; } .mask .of-branch { right: calc(100% + .4rem); }
.odd { background: #fdeaea; padding: .3rem .7rem; border-radius: .3rem; }
details > summary { cursor: pointer; color: #555; }
"""


def build_page(title: str, facts: Sequence[tuple[str, str]], packs: Sequence[PackView]) -> str:
    """The HTML text; whatever data hold is escaped."""
    rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in facts)
    return "\n".join(
        [
            "<!doctype html>",
            f'<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>',
            f"<style>{_STYLE}</style></head><body>",
            f"<h1>{escape(title)}</h1><table>{rows}</table>",
            '<p>Tokens: <span class="root">root</span>, which every branch sees; <span class="prompt">prompt</span>; '
            f"{_reply_span('reply', 1.0)}, the darker the more it weighs in the loss (hover for the numbers); "
            f'<span class="target">dashed</span>: the end of a branch, which is predicted but never read. '
            "Rings: points and tracks of the replies, with the number of the object.</p>",
            *(_pack(pack) for pack in packs),
            "</body></html>",
        ]
    )


def _pack(pack: PackView) -> str:
    budgets = _table(
        ("", "used", "budget", "fill"),
        [
            (name, str(used), str(budget), f"{used / max(budget, 1):.1%}")
            for name, used, budget in (
                ("tokens", pack.num_tokens, pack.packing.sequence_tokens),
                ("crops", pack.num_crops, pack.packing.crop_budget),
            )
        ],
    )
    lengths = _table(
        ("example", "tokens", "bound", "crops", "bound"),
        [(e.name, str(e.num_tokens), str(e.bound[0]), str(e.num_crops), str(e.bound[1])) for e in pack.examples],
    )
    odd = "".join(f'<p class="odd">Not as planned: {escape(deviation_text(d))}</p>' for d in pack.deviations)
    most = max((token.weight for e in pack.examples for b in e.branches for token in b.tokens), default=1.0) or 1.0
    return (
        f"<h2>{escape(pack.title)}</h2>{odd}{budgets}<p>Loss weight {pack.loss_weight:.3f}</p>{lengths}"
        "<details open><summary>who attends to whom: a row for each query, black where it sees a key; beside it the "
        "number of its example, and root or branch</summary>"
        f"{_mask(pack)}</details>"
        + "".join(_example(number, example, most) for number, example in enumerate(pack.examples))
    )


def _mask(pack: PackView) -> str:
    """The picture, with red lines where examples begin and the names of its rows."""
    share = 100 / max(pack.num_tokens, 1)
    marks, first = [], 0
    for number, example in enumerate(pack.examples):
        if number:
            marks.append(f'<i style="top:{first * share:.2f}%;left:0;right:0;border-top-width:1px"></i>')
            marks.append(f'<i style="left:{first * share:.2f}%;top:0;bottom:0;border-left-width:1px"></i>')
        parts = [("root", example.root_length), *((f"branch {b.number}", b.num_tokens) for b in example.branches)]
        marks.append(_row_name("of-example", f"{number}", first, sum(length for _, length in parts), share))
        for name, length in parts:
            marks.append(_row_name("of-branch", name, first, length, share))
            first += length
    picture = f'<img alt="attention" src="data:image/png;base64,{_mask_png(pack.mask)}">'
    return f'<div class="mask">{picture}{"".join(marks)}</div>'


def _row_name(kind: str, name: str, first: int, length: int, share: float) -> str:
    """Beside the middle of its rows, if they are high enough for a line of text."""
    if length * share < _NAMED_ROWS:
        return ""
    return f'<span class="{kind}" style="top:{(first + length / 2) * share:.2f}%">{name}</span>'


def _example(number: int, example: ExampleView, most: float) -> str:
    part = f", annotations {example.part[0]} to {example.part[1] - 1} of its tree" if example.part else ""
    facts = (
        f"{example.medium}; {'high resolution drawn; ' if example.high_res else ''}sample {example.sample}, "
        f"epoch {example.epoch}{part}; root of {example.root_length} tokens"
    )
    visuals = "".join(figure(_picture(visual)) for visual in example.visuals)
    return (
        f'<section class="example"><h3>{number}: {escape(example.name)}</h3>'
        f'<p>{escape(facts)}</p><div class="strip">{visuals}</div>'
        f'<details><summary>root</summary><div class="tokens">{_tokens(example.root, most)}</div></details>'
        + "".join(_branch(branch, most) for branch in example.branches)
        + "</section>"
    )


def _branch(branch: BranchView, most: float) -> str:
    weights = ", ".join(f"{weight:g}" for weight in branch.weights)
    unseen = (
        f'<p class="odd">Points where nothing is shown: {escape(", ".join(branch.unseen))}</p>' if branch.unseen else ""
    )
    return (
        f"<div>branch {branch.number}: annotation {branch.annotation}, {escape(branch.task)} ({escape(branch.style)}); "
        f"positions {branch.positions[0]}-{branch.positions[1]}; {branch.num_targets} targets of weight {weights}, "
        f'in all {branch.total_weight:.3f}</div>{unseen}<div class="tokens">{_tokens(branch.tokens, most)}</div>'
    )


def _tokens(tokens: Sequence[TokenView], most: float) -> str:
    return "".join(_token(token, most) for token in tokens)


def _token(token: TokenView, most: float) -> str:
    if token.role != "root" and token.count <= _REPEATED:
        text = escape(visible(token.text) * token.count)
    else:
        text = escape(visible(token.text) + (f" ×{token.count}" if token.count > 1 else ""))
    weight = f", loss weight {token.weight:g}" if token.weight else ""
    title = f"position {token.position}, id {token.id}{weight}"
    if token.role == "reply":
        return _reply_span(text, token.weight / most, title, token.is_only_target)
    return f'<span class="{token.role}" title="{title}">{text}</span>'


def _reply_span(text: str, share: float, title: str = "", is_only_target: bool = False) -> str:
    shade = _FAINTEST + (1 - _FAINTEST) * share
    kind = "reply target" if is_only_target else "reply"
    return f'<span class="{kind}" style="background: rgb(255 150 40 / {shade:.2f})" title="{title}">{text}</span>'


def _picture(visual: VisualView) -> Picture:
    return Picture(caption=visual.caption, jpeg=draw_marks(visual.pixels, visual.marks, _SIDE))


def _mask_png(mask: ByteArray) -> str:
    written = io.BytesIO()
    Image.fromarray(255 - mask).save(written, "PNG")
    return base64.b64encode(written.getvalue()).decode()


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join(
        f"<tr><td>{escape(first)}</td>" + "".join(f'<td class="number">{escape(cell)}</td>' for cell in rest) + "</tr>"
        for first, *rest in rows
    )
    return f"<table><tr>{cells}</tr>{body}</table>"
