"""Which microbatches of a refused step are to be looked at, and how.  Torch-free.

A microbatch is a mapping with its `rank`, its `loss` (text, since JSON knows no NaN) and its `packs`, each with its
number in the plan (`pack`) and its `examples` (`dataset/uid`).
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

REFUSED = "refused-step-{}.json"
"""File beside the metrics, by number of the step."""
_PLAN = "plan.json"
"""Reference of the plan that stages.train leaves beside the metrics."""
_NAMED = 6
"""Microbatches, packs and examples that a message names; the file has all."""

Microbatch = Mapping[str, Any]


def suspects(microbatches: Sequence[Microbatch], limit: float) -> list[Microbatch]:
    """Those whose loss is not finite; if all are, those with at least `limit`; if there are none, the highest."""
    losses = [float(microbatch["loss"]) for microbatch in microbatches]
    finite = all(map(math.isfinite, losses))
    chosen = [
        microbatch
        for microbatch, loss in zip(microbatches, losses, strict=True)
        if (loss >= limit if finite else not math.isfinite(loss))
    ]
    return chosen or [microbatches[losses.index(max(losses))]]


def described(microbatches: Sequence[Microbatch]) -> str:
    """For a person, and not too long."""
    return _shortened([_microbatch(microbatch) for microbatch in microbatches], "; ")


def inspect_command(folder: Path, stage: str, microbatches: Sequence[Microbatch]) -> str:
    """What shows their packs (stages/inspect_data.py).

    Args:
        folder: of the training.
    """
    plan = folder / _PLAN
    where = shlex.quote(str(plan)) if plan.is_file() else "PLAN"
    numbers = sorted({pack["pack"] for microbatch in microbatches for pack in microbatch["packs"]})
    packs = " ".join(f"--pack {number}" for number in numbers[:_NAMED])
    return f"python -m molmo2core.loading inspect {where} --recipe RECIPE --stage {stage} {packs}"


def _microbatch(microbatch: Microbatch) -> str:
    packs = microbatch["packs"]
    numbers = _shortened([str(pack["pack"]) for pack in packs], ", ")
    examples = _shortened([name for pack in packs for name in pack["examples"]], ", ")
    return f"loss {float(microbatch['loss']):.4g} on rank {microbatch['rank']}, pack {numbers}: {examples}"


def _shortened(parts: Sequence[str], separator: str) -> str:
    more = [f"and {len(parts) - _NAMED} more"] if len(parts) > _NAMED else []
    return separator.join([*parts[:_NAMED], *more])
