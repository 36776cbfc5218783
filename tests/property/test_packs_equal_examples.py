"""What a pack computes is what its examples compute alone, and a branch of a tree what its conversation computes alone.

transformers knows neither packs nor trees, but plain conversations, on which tests/parity compares it with ours; these
tests lead from there to what is trained.  Needs torch and numpy only.

Tolerances: sums run over other lengths.  In float64 logits of steep random models are equal to 1e-12 of their norm; in
float32, over 60 random pairs of packs, they differ by at most 8.8e-7 of it (searching, Hypothesis finds 1.03e-6 for an
example of three tokens), at initial weights by at most 6.5e-7.  Over 400 packs float32 gradients differ by 3.1e-6 of
the largest one; over 40, losses by 2.4e-7 of themselves.  What the tests would catch differs by more than 0.1 (last
test).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from molmo2core.checkpoints.native import our_logits
from molmo2core.examples import DOCUMENT, PADDING, ROOT, TokenizedExample
from molmo2core.message_tree.attention_rule import allowed
from molmo2core.model.attention import AttentionMask
from molmo2core.model.initialization import build_model
from molmo2core.model.loss import weighted_loss
from molmo2core.model.molmo2 import Molmo2
from molmo2core.packing.concat import pack_examples
from molmo2core.testing.tiny_model import TINY_CONFIGS, branch_alone, random_model, random_tree

LOSSES = 1e-6
"""Of a loss."""
LOGITS = 1e-12
"""In float64, of their norm."""
LOGITS_IN_FLOAT32 = 1e-6
"""At initial weights, of their norm."""
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


@functools.cache
def precise_model_of(kind: str) -> Molmo2:
    return random_model(TINY_CONFIGS[kind], seed=1).double()


@settings(max_examples=60, deadline=None)
@given(kind=KINDS, packs=st.lists(st.lists(trees(), min_size=1, max_size=3), min_size=1, max_size=2))
@torch.no_grad()
def test_logits(kind: str, packs: list[list[TokenizedExample]]) -> None:
    """Packs of unequal length in one batch, against each example alone and each branch alone.  Would catch attention
    between examples or branches, pooling that reads another example's crops, positions that go on."""
    assert largest_distance(precise_model_of(kind), packs) <= LOGITS


@torch.no_grad()
def test_logits_in_float32() -> None:
    """The same in the precision of training, and with the weights that it starts from."""
    model = build_model(TINY_CONFIGS["qwen"], seed=0)
    for seed in range(20):
        pack = [random_tree(TINY_CONFIGS["qwen"], seed=seed + part, images=part, branches=[3, 9]) for part in range(3)]
        found = largest_distance(model, [pack])
        assert 0 < found <= LOGITS_IN_FLOAT32


def largest_distance(model: Molmo2, packs: Sequence[Sequence[TokenizedExample]]) -> float:
    """Between logits of each pack and those of its examples, and of their branches, alone; of their norm."""
    together = our_logits(model, [pack_examples(list(pack), 9) for pack in packs], pad_id=0)
    found = [0.0]
    for pack, logits in zip(packs, together, strict=True):
        parts = logits.split([len(tree.input_ids) for tree in pack])
        for tree, part in zip(pack, parts, strict=True):
            alone = our_logits(model, [tree], pad_id=0)[0]
            found.append(float((part - alone).norm() / alone.norm()))
            for number, conversation in enumerate(unrolled(tree)):
                of_branch = torch.from_numpy((tree.subsegment_ids == ROOT) | (tree.subsegment_ids == number))
                expected = our_logits(model, [conversation], pad_id=0)[0]
                found.append(float((part[of_branch] - expected).norm() / expected.norm()))
    return max(found)


@settings(max_examples=25, deadline=None)
@given(kind=KINDS, pack=st.lists(trees(), min_size=1, max_size=3))
def test_losses_and_gradients(kind: str, pack: list[TokenizedExample]) -> None:
    """Training on a pack of trees is training on every conversation in it.  Would catch whatever the logits hide: a
    root that learns from one branch only, features that get the gradient of another example, a weight counted twice."""
    model = model_of(kind)
    loss, packed = gradients(model, [pack_examples(pack, 9)])
    of_trees, _ = gradients(model, [pack_examples([tree], 9) for tree in pack])
    of_conversations, alone = gradients(model, [conversation for tree in pack for conversation in unrolled(tree)])
    assert loss > 0
    assert loss == pytest.approx(of_trees, rel=LOSSES)
    assert loss == pytest.approx(of_conversations, rel=LOSSES)
    assert packed.keys() == alone.keys()
    largest = max(float(gradient.abs().max()) for gradient in alone.values())
    for name, gradient in packed.items():
        assert (gradient - alone[name]).abs().max() <= GRADIENTS * largest, name


def gradients(model: Molmo2, sequences: Sequence[TokenizedExample]) -> tuple[float, dict[str, Tensor]]:
    """The sum of all weighted losses, one forward pass for each sequence, and its gradients."""
    model.zero_grad(set_to_none=True)
    total = 0.0
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
        total += float(parts.total.detach())
    return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@settings(max_examples=30, deadline=None)
@given(pack=st.lists(trees(), min_size=1, max_size=3), padding=st.integers(0, 3))
def test_the_mask_is_the_rule(pack: list[TokenizedExample], padding: int) -> None:
    """Pair by pair in words, on labels that are counted off and not read from ids.

    Catches branches or examples that see each other, roots that see branches, text that sees ahead, visual tokens that
    do not, and padding that is seen.
    """
    labels: list[tuple[int, int, bool] | None] = []  # example, branch (-1: root), visual
    for number, tree in enumerate(pack):
        lengths = [int((tree.subsegment_ids == branch).sum()) for branch in range(len(tree.tasks))]
        root = len(tree.input_ids) - sum(lengths)
        labels += [(number, -1, bool(tree.is_visual[place])) for place in range(root)]
        labels += [(number, branch, False) for branch, length in enumerate(lengths) for _ in range(length)]
    labels += [None] * padding
    packed = pack_examples(pack, 9)
    mask = allowed(
        np.pad(packed.subsegment_ids, (0, padding), constant_values=PADDING), np.pad(packed.is_visual, (0, padding))
    )
    assert mask.shape == (len(labels), len(labels))
    for query, of_query in enumerate(labels):
        for key, of_key in enumerate(labels):
            if of_query is None or of_key is None:
                expected = query == key
            else:
                (example, branch, visual), (other, its_branch, is_visual) = of_query, of_key
                in_reach = example == other and its_branch in (-1, branch)
                expected = in_reach and (key <= query or (visual and is_visual))
            assert mask[query, key] == expected, (query, key)


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
