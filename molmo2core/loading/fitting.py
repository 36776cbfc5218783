"""Make an over-long pack fit, deterministically (used only when a planner's bound was wrong)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from molmo2core.errors import DataError
from molmo2core.examples import ROOT, TokenizedExample


def drop_last_branch(
    examples: Sequence[TokenizedExample], *, too_many_crops: bool
) -> tuple[list[TokenizedExample], str]:
    """`examples` without the last branch of the last one that has several, else without the last example.

    Args:
        examples: of one pack.
        too_many_crops: a branch has no crops, so a whole example goes.

    Returns:
        The remaining examples, and what was left out, in words.

    Raises:
        DataError: a single example of a single branch remains.
    """
    kept = list(examples)
    branched = [number for number, example in enumerate(kept) if len(example.tasks) > 1]
    if branched and not too_many_crops:
        example = kept[branched[-1]]
        last = len(example.tasks) - 1
        keep = (example.subsegment_ids < last) | (example.subsegment_ids == ROOT)
        kept[branched[-1]] = dataclasses.replace(
            example,
            tasks=example.tasks[:-1],
            **{
                name: getattr(example, name)[keep]
                for name in ("input_ids", "target_ids", "loss_weights", "position_ids", "subsegment_ids", "is_visual")
            },
        )
        return kept, f"branch {last} of {example.uid}"
    if len(kept) == 1:
        raise DataError(kept[0].uid, found=f"{len(kept[0].input_ids)} tokens", expected="fewer: it fits in no sequence")
    return kept[:-1], f"all of {kept[-1].uid}"
