"""The tables of DECISIONS D4 and the published code's rule (data.md 4)."""

from __future__ import annotations

from math import sqrt

import pytest

from molmo2core.annotations import TASKS
from molmo2core.message_tree.loss_weights import branch_weights


def test_none_counts_every_target_once() -> None:
    assert branch_weights("none", TASKS, [7] * len(TASKS)) == [1.0] * len(TASKS)


@pytest.mark.parametrize(
    ("task", "described", "released"),
    [
        ("video_caption", 0.1, 0.1),
        ("image_caption", 0.2, 2 / sqrt(16)),
        ("image_pointing", 0.2, 0.2),
        ("image_counting", 0.2, 0.2),
        ("multi_image_pointing", 0.2, 0.2),
        ("multi_image_counting", 0.2, 0.2),
        ("video_pointing", 0.2, 0.2),
        ("video_counting", 0.2, 0.2),
        ("tracking", 0.2, 0.2),
        ("image_qa", 4 / sqrt(16), 2 / sqrt(16)),
        ("multi_image_qa", 4 / sqrt(16), 2 / sqrt(16)),
        ("video_qa", 4 / sqrt(16), 2 / sqrt(16)),
        ("subtitle_qa", 4 / sqrt(16), 2 / sqrt(16)),
        ("text", 4 / sqrt(16), 2 / sqrt(16)),
    ],
)
def test_a_single_branch(task: str, described: float, released: float) -> None:
    """Catches a task in the wrong family; image captions are where description and code differ."""
    assert branch_weights("described", [task], [16]) == [described]
    assert branch_weights("released_code", [task], [16]) == [released]


def test_released_code_divides_by_branches_and_forgets_the_last_end() -> None:
    """The worked output of data.md 2.1: replies of 3 and 2 tokens in a tree of two."""
    weights = branch_weights("released_code", ["image_qa", "image_qa"], [4, 3])
    assert weights == [2 / sqrt(3 * 2), 2 / sqrt(2 * 2)]
    assert round(weights[0], 3) == 0.816


def test_described_is_independent_of_the_other_branches() -> None:
    assert branch_weights("described", ["image_qa", "image_caption"], [4, 300]) == [2.0, 0.2]


def test_an_empty_reply_in_a_tree_is_finite() -> None:
    assert branch_weights("released_code", ["text", "text"], [1, 1]) == [2 / sqrt(2)] * 2
