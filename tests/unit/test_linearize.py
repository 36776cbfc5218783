"""The worked example of data.md 2.1, and the rule of attention on it."""

from __future__ import annotations

import numpy as np
import pytest

from molmo2core.examples import DOCUMENT, PADDING, ROOT
from molmo2core.message_tree.attention_rule import allowed
from molmo2core.message_tree.linearize import LinearTree, linearize, linearize_prompt
from molmo2core.message_tree.tree import Branch, EncodedTurn, MessageTree

EOS, VISUAL = 9, 904


def branch(*turns: tuple[int, ...]) -> Branch:
    return Branch(
        task="image_qa",
        turns=tuple(EncodedTurn(ids=ids, is_reply=bool(number % 2)) for number, ids in enumerate(turns)),
    )


def tree(*branches: Branch) -> MessageTree:
    return MessageTree(root_ids=np.array([EOS, VISUAL, VISUAL, VISUAL], np.int32), branches=branches)


def worked_example() -> LinearTree:
    two = tree(branch((11, 12), (21, 22, 23)), branch((31,), (41, 42)))
    return linearize(two, eos=EOS, visual=[VISUAL], weighting="released_code")


def test_worked_example() -> None:
    linear = worked_example()
    assert linear.input_ids.tolist() == [9, 904, 904, 904, 11, 12, 21, 22, 23, 31, 41, 42]
    assert linear.target_ids.tolist() == [904, 904, 904, 11, 12, 21, 22, 23, 9, 41, 42, 9]
    weights = [0.0] * 5 + [2 / 6**0.5] * 4 + [1.0] * 3
    np.testing.assert_allclose(linear.loss_weights, weights, rtol=1e-6)
    assert linear.position_ids.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 4, 5, 6]
    assert linear.subsegment_ids.tolist() == [ROOT] * 4 + [0] * 5 + [1] * 3
    assert linear.is_visual.tolist() == [False] + [True] * 3 + [False] * 8


def test_dtypes_are_the_contracts() -> None:
    linear = worked_example()
    ints = (linear.input_ids, linear.target_ids, linear.position_ids, linear.subsegment_ids)
    assert [array.dtype for array in ints] == [np.int32] * 4
    assert linear.loss_weights.dtype == np.float32 and linear.is_visual.dtype == np.bool_


def test_every_reply_of_a_conversation_is_trained_and_ends() -> None:
    """The first reply's EOS is an input and a target; the second one's only a target (data.md 2.5)."""
    linear = linearize(tree(branch((11,), (21,), (EOS, 12), (22,))), eos=EOS, visual=[VISUAL], weighting="none")
    assert linear.input_ids.tolist()[4:] == [11, 21, EOS, EOS, 12, 22]
    assert linear.target_ids.tolist()[4:] == [21, EOS, EOS, 12, 22, EOS]
    assert linear.loss_weights.tolist()[4:] == [1, 1, 0, 0, 1, 1]


def test_an_empty_reply_teaches_only_to_stop() -> None:
    linear = linearize(tree(branch((11, 12), ())), eos=EOS, visual=[VISUAL], weighting="described")
    assert linear.target_ids.tolist()[4:] == [12, EOS]
    assert linear.loss_weights.tolist()[4:] == [0, 4]


def test_prompt_has_no_loss_and_ends_where_the_answer_begins() -> None:
    linear = linearize_prompt(tree(branch((11,), (21,), (12, 13))), eos=EOS, visual=[VISUAL])
    assert linear.input_ids.tolist()[4:] == [11, 21, EOS, 12, 13]
    assert not linear.loss_weights.any()
    assert linear.position_ids.tolist() == list(range(9))


def test_who_may_attend_to_whom_in_a_pack() -> None:
    """Two packed examples and padding; catches a leak between branches, between examples and into padding."""
    linear = worked_example()
    length = len(linear.input_ids)
    subsegments = np.concatenate([linear.subsegment_ids, linear.subsegment_ids + DOCUMENT, [PADDING] * 2])
    visual = np.concatenate([linear.is_visual, linear.is_visual, [False] * 2])
    mask = allowed(subsegments, visual)
    one = mask[:length, :length]
    root, first, second = slice(0, 4), slice(4, 9), slice(9, 12)
    assert one[0].tolist() == [True] + [False] * 11, "BOS is text: it does not see the image after it"
    assert one[1:4, :4].all(), "visual tokens see each other in both directions"
    assert not one[root, 4:].any(), "the root sees no branch"
    assert one[first, root].all() and one[second, root].all()
    assert (one[first, first] == np.tri(5, dtype=bool)).all()
    assert not one[first, second].any() and not one[second, first].any()
    assert (mask[length : 2 * length, length : 2 * length] == one).all()
    assert not mask[:length, length:].any() and not mask[length:, :length].any()
    assert (mask[2 * length :] == np.eye(2 * length + 2, dtype=bool)[2 * length :]).all()


@pytest.mark.parametrize("gap_token", [5, VISUAL])
def test_text_between_images_stays_causal(gap_token: int) -> None:
    """A time stamp is not seen by earlier frames, while a later frame is (model.md 2.5)."""
    root = np.array([EOS, VISUAL, gap_token, VISUAL], np.int32)
    linear = linearize_prompt(MessageTree(root_ids=root, branches=(branch((11,)),)), eos=EOS, visual=[VISUAL])
    mask = allowed(linear.subsegment_ids, linear.is_visual)
    assert mask[1, 3], "frame 1 sees frame 2"
    assert mask[1, 2] == (gap_token == VISUAL)
