"""Make an over-long pack fit, deterministically (used only when a planner's bound was wrong)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from molmo2core.errors import DataError
from molmo2core.examples import ROOT, TokenizedExample


def drop_last_branch(
    examples: Sequence[TokenizedExample], *, too_many_crops: bool
) -> tuple[int, TokenizedExample | None, str]:
    """Leave out the last branch of the last example that has several, else the last example.

    Args:
        examples: of one pack.
        too_many_crops: a branch has no crops, so a whole example goes.

    Returns:
        Which example changes, what remains of it (None: nothing), and what was left out, in words.

    Raises:
        DataError: a single example of a single branch remains.
    """
    branched = [number for number, example in enumerate(examples) if len(example.tasks) > 1]
    if branched and not too_many_crops:
        number = branched[-1]
        example = examples[number]
        last = len(example.tasks) - 1
        keep = (example.subsegment_ids < last) | (example.subsegment_ids == ROOT)
        remaining = dataclasses.replace(
            example,
            tasks=example.tasks[:-1],
            **{
                name: getattr(example, name)[keep]
                for name in ("input_ids", "target_ids", "loss_weights", "position_ids", "subsegment_ids", "is_visual")
            },
        )
        return number, remaining, f"branch {last}"
    if len(examples) == 1:
        raise DataError(
            examples[0].uid, found=f"{len(examples[0].input_ids)} tokens", expected="fewer: it fits in no sequence"
        )
    return len(examples) - 1, None, "all of it"
