"""Packs as text for a terminal."""

from __future__ import annotations

from molmo2core.examples import ROOT, Deviation
from molmo2core.loading.inspection import PackView


def describe(view: PackView) -> str:
    """The pack as text: the numbers of every branch, its prompt and its reply."""
    lines = [
        f"{view.title}: {len(view.examples)} examples, "
        f"{_share(view.num_tokens, view.packing.sequence_tokens)} tokens, "
        f"{_share(view.num_crops, view.packing.crop_budget)} crops, loss weight {view.loss_weight:.2f}"
    ]
    lines += [f"  not as planned: {deviation_text(deviation)}" for deviation in view.deviations]
    for number, example in enumerate(view.examples):
        part = f", annotations {example.part[0]} to {example.part[1] - 1} of its tree" if example.part else ""
        lines += [
            f"  example {number}: {visible(example.name)} (sample {example.sample}, epoch {example.epoch}{part})",
            f"    {example.medium}{', drawn for high resolution' if example.high_res else ''}",
            f"    {example.num_tokens} tokens (bound {example.bound[0]}), {example.num_crops} crops "
            f"(bound {example.bound[1]}); root of {example.root_length} tokens, subsegment {ROOT} of document {number}",
        ]
        for branch in example.branches:
            weights = ", ".join(f"{weight:g}" for weight in branch.weights)
            lines.append(
                f"    branch {branch.number}: annotation {branch.annotation}, {branch.task} ({branch.style}), "
                f"{branch.num_tokens} tokens at positions {branch.positions[0]}-{branch.positions[1]}, "
                f"{branch.num_targets} targets of weight {weights}, in all {branch.total_weight:.3f}"
            )
            lines += [f"      {role}: {visible(text)}" for role, text in branch.turns]
            if branch.unseen:
                lines.append(f"      points where nothing is shown: {', '.join(branch.unseen)}")
    return "\n".join(lines)


def deviation_text(deviation: Deviation) -> str:
    """In one line."""
    instead = f"; {deviation.by} stands in" if deviation.by else ""
    return visible(f"{deviation.dataset}/{deviation.uid} {deviation.kind}: {deviation.why}{instead}")


def visible(text: str) -> str:
    """`text` in one line of printable characters: a terminal obeys others."""
    escaped = text.replace("\\", "\\\\")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in escaped)


def _share(used: int, budget: int) -> str:
    return f"{used} of {budget} ({used / max(budget, 1):.1%})"
