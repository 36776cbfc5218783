"""A message tree as one sequence (data.md 2.1-2.4).

    root                     branch 0                     branch 1
    BOS <vision>             prompt reply EOS prompt reply  prompt reply
    positions 0 .. R-1       R ...                        R ...
    subsegment ROOT          0                            1

The EOS that ends a branch is only a target: the input of the next branch follows the last reply token directly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from molmo2core.examples import ROOT, BoolArray, FloatArray, IntArray
from molmo2core.message_tree.config import Weighting
from molmo2core.message_tree.loss_weights import branch_weights
from molmo2core.message_tree.tree import Branch, MessageTree


@dataclass(frozen=True, kw_only=True, eq=False)
class LinearTree:
    """Arrays of length S as in examples.TokenizedExample."""

    input_ids: IntArray
    target_ids: IntArray
    loss_weights: FloatArray
    position_ids: IntArray
    subsegment_ids: IntArray
    is_visual: BoolArray


def linearize(tree: MessageTree, *, eos: int, visual: Sequence[int], weighting: Weighting) -> LinearTree:
    """Training form of `tree`; every branch ends with a reply.

    Args:
        tree: at least one branch.
        eos: id of the end token.
        visual: ids of the eight token kinds that attend in both directions.
        weighting: table of loss weights.
    """
    closed = [_tokens(branch, eos) for branch in tree.branches]
    num_targets = [int(is_target.sum()) for _, is_target in closed]
    weights = branch_weights(weighting, [branch.task for branch in tree.branches], num_targets)
    first = closed[0][0][:1]  # what the last root token predicts, at weight 0
    return _assemble(
        [tree.root_ids, *(ids[:-1] for ids, _ in closed)],
        target_ids=np.concatenate([tree.root_ids[1:], first, *(ids[1:] for ids, _ in closed)]),
        loss_weights=np.concatenate(
            [
                np.zeros(len(tree.root_ids)),
                *(is_target[1:] * weight for (_, is_target), weight in zip(closed, weights, strict=True)),
            ]
        ).astype(np.float32),
        visual=visual,
    )


def linearize_prompt(tree: MessageTree, *, eos: int, visual: Sequence[int]) -> LinearTree:
    """Inference form of a tree whose only branch ends with a prompt: all weights 0, targets meaningless."""
    (branch,) = tree.branches
    segments = [tree.root_ids, _tokens(branch, eos)[0]]
    length = sum(len(segment) for segment in segments)
    return _assemble(
        segments, target_ids=np.full(length, eos, np.int32), loss_weights=np.zeros(length, np.float32), visual=visual
    )


def _tokens(branch: Branch, eos: int) -> tuple[IntArray, BoolArray]:
    """All tokens of a branch, EOS after every reply, and which of them the model has to say."""
    ids: list[int] = []
    is_target: list[bool] = []
    for turn in branch.turns:
        turn_ids = [*turn.ids, eos] if turn.is_reply else turn.ids
        ids += turn_ids
        is_target += [turn.is_reply] * len(turn_ids)
    return np.array(ids, np.int32), np.array(is_target, np.bool_)


def _assemble(
    segments: Sequence[IntArray], *, target_ids: IntArray, loss_weights: FloatArray, visual: Sequence[int]
) -> LinearTree:
    """Positions, subsegments and visual flags of the root followed by branches 0, 1, ..."""
    root_length = len(segments[0])
    input_ids = np.concatenate(segments)
    starts = [0] + [root_length] * (len(segments) - 1)
    names = [ROOT, *range(len(segments) - 1)]
    return LinearTree(
        input_ids=input_ids,
        target_ids=target_ids,
        loss_weights=loss_weights,
        position_ids=np.concatenate(
            [np.arange(start, start + len(ids), dtype=np.int32) for start, ids in zip(starts, segments, strict=True)]
        ),
        subsegment_ids=np.repeat(np.array(names, np.int32), [len(ids) for ids in segments]),
        is_visual=np.isin(input_ids, visual),
    )
