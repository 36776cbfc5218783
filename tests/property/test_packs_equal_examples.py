"""What a pack computes is what its examples compute alone, and a branch of a tree what its conversation computes alone.

transformers knows neither packs nor trees, but plain conversations, on which tests/parity compares it with ours; these
tests lead from there to what is trained.  Needs torch and numpy only.

Tolerances: float32 sums run over other lengths.  Over 400 random packs logits of deviation 1.4 differ by at most
3.3e-6 between pack and example and 9.5e-6 between pack and branch, gradients by 3.1e-6 of the largest one.  What the
tests would catch differs by more than 0.1 (last test).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from molmo2core.checkpoints.native import our_logits
from molmo2core.examples import DOCUMENT, ROOT, TokenizedExample
from molmo2core.model.attention import AttentionMask
from molmo2core.model.loss import weighted_loss
from molmo2core.model.molmo2 import Molmo2
from molmo2core.packing.concat import pack_examples
from molmo2core.testing.tiny_model import TINY_CONFIGS, branch_alone, random_model, random_tree

LOGITS = 5e-5
GRADIENTS = 1e-5

KINDS = st.sampled_from(["qwen", "olmo", "4b"])


@functools.cache
def model_of(kind: str) -> Molmo2:
    return random_model(TINY_CONFIGS[kind], seed=1)


@st.composite
def trees(draw: st.DrawFn) -> TokenizedExample:
    """Up to two images and three frames, one to four branches; some without any visual input."""
    tree = random_tree(
        TINY_CONFIGS["qwen"],  # all kinds take the same inputs
        seed=draw(st.integers(0, 10_000)),
        images=draw(st.integers(0, 2)),
        frames=draw(st.integers(0, 3)),
        branches=draw(st.lists(st.integers(1, 9), min_size=1, max_size=4)),
    )
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    weights = rng.random(len(tree.input_ids)) * (tree.subsegment_ids != ROOT)
    return replace(
        tree,
        target_ids=rng.integers(0, 768, len(weights)).astype(np.int32),
        loss_weights=weights.astype(np.float32),
    )


def unrolled(tree: TokenizedExample) -> list[TokenizedExample]:
    return [branch_alone(tree, branch) for branch in range(len(tree.tasks))]


@settings(max_examples=60, deadline=None)
@given(kind=KINDS, packs=st.lists(st.lists(trees(), min_size=1, max_size=3), min_size=1, max_size=2))
@torch.no_grad()
def test_logits(kind: str, packs: list[list[TokenizedExample]]) -> None:
    """Packs of unequal length in one batch, against each example alone and each branch alone.  Would catch attention
    between examples or branches, pooling that reads another example's crops, positions that go on."""
    model = model_of(kind)
    together = our_logits(model, [pack_examples(pack, 9) for pack in packs], pad_id=0)
    for pack, logits in zip(packs, together, strict=True):
        parts = logits.split([len(tree.input_ids) for tree in pack])
        for tree, part in zip(pack, parts, strict=True):
            assert (part - our_logits(model, [tree], pad_id=0)[0]).abs().max() <= LOGITS
            for number, alone in enumerate(unrolled(tree)):
                of_branch = torch.from_numpy((tree.subsegment_ids == ROOT) | (tree.subsegment_ids == number))
                assert (part[of_branch] - our_logits(model, [alone], pad_id=0)[0]).abs().max() <= LOGITS


@settings(max_examples=25, deadline=None)
@given(kind=KINDS, pack=st.lists(trees(), min_size=1, max_size=3))
def test_gradients(kind: str, pack: list[TokenizedExample]) -> None:
    """Training on a pack of trees is training on every conversation in it.  Would catch whatever the logits hide: a
    root that learns from one branch only, features that get the gradient of another example."""
    model = model_of(kind)
    packed = gradients(model, [pack_examples(pack, 9)])
    alone = gradients(model, [conversation for tree in pack for conversation in unrolled(tree)])
    assert packed.keys() == alone.keys()
    largest = max(float(gradient.abs().max()) for gradient in alone.values())
    for name, gradient in packed.items():
        assert (gradient - alone[name]).abs().max() <= GRADIENTS * largest, name


def gradients(model: Molmo2, sequences: Sequence[TokenizedExample]) -> dict[str, Tensor]:
    """Of the sum of all weighted losses, one forward pass for each sequence."""
    model.zero_grad(set_to_none=True)
    for sequence in sequences:
        ids, positions, targets, subsegments, pooling = (
            torch.from_numpy(array).long()
            for array in (
                sequence.input_ids,
                sequence.position_ids,
                sequence.target_ids,
                sequence.subsegment_ids,
                sequence.pooling,
            )
        )
        hidden = model(
            input_ids=ids[None],
            position_ids=positions[None],
            mask=AttentionMask(subsegments[None], torch.from_numpy(sequence.is_visual)[None]),
            crops=torch.from_numpy(sequence.crops),
            pooling=pooling,
        )
        weights = torch.from_numpy(sequence.loss_weights)
        parts = weighted_loss(hidden[0], model.decoder.head_weight, targets, weights, 1e-4)
        parts.total.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_the_trees_are_interesting() -> None:
    """Guards the tests above against trees whose branches or examples do not matter: with the ids of a plain sequence
    logits differ."""
    model = model_of("qwen")
    tree = random_tree(model.config, seed=3, images=1, branches=(5, 6))
    pack = pack_examples([tree, tree], 9)
    with torch.no_grad():
        right = our_logits(model, [pack], pad_id=0)[0]
        for changed in (
            replace(pack, subsegment_ids=pack.subsegment_ids % DOCUMENT),
            replace(pack, subsegment_ids=pack.subsegment_ids // DOCUMENT * DOCUMENT),
            replace(pack, position_ids=np.arange(len(pack.position_ids), dtype=np.int32)),
        ):
            assert (right - our_logits(model, [changed], pad_id=0)[0]).abs().max() > 0.1
