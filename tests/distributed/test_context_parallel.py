"""Ranks that share a sequence compute the loss and every gradient of one rank with all of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from molmo2core.testing.distributed import run_distributed
from molmo2core.testing.shared_sequence import (
    CHANGES,
    as_training_starts,
    eight_heads,
    exchanged,
    gradients_of_all,
    gradients_of_changed_blocks,
    shared_gradients_by_size,
)
from molmo2core.testing.training import random_pack

MODELS = {
    "a key head for each rank": eight_heads(8),
    "fewer key heads than ranks": eight_heads(2),
    "olmo": eight_heads(8, "olmo"),
}
SIZES = (2, 4)
LARGEST_DIFFERENCE = 1e-12
"""Relative to the largest value of a gradient, in float64; measured 2e-13.  Any wrong head, token or feature is off by
more than 1e-3."""
LARGEST_DISTANCE = 2e-6
"""Of all gradients of a part of the model together, relative, in float32 at initial weights; measured at most 8.7e-7,
while one rank in float32 is up to 2.5e-6 away from float64."""

Results = dict[tuple[str, str], tuple[float, dict[str, Any]]]


@pytest.fixture(scope="module")
def on_ranks() -> dict[str, dict[int, Results]]:
    """By {way to build: {size: groups of so many ranks}}"""
    return run_distributed(shared_gradients_by_size, 4, MODELS, SIZES, timeout_seconds=400)[0]


@pytest.fixture(scope="module")
def computed(on_ranks: dict[str, dict[int, Results]]) -> tuple[Results, dict[int, Results]]:
    """(on one rank, {size: by groups of so many ranks}), in float64"""
    return gradients_of_all(MODELS), on_ranks["steep"]


def test_the_loss_is_that_of_one_rank(computed: tuple[Results, dict[int, Results]]) -> None:
    """Would catch targets lost or counted twice at a border, and positions that restart on a rank."""
    whole, shared = computed
    assert len(whole) == 15
    for size in SIZES:
        assert shared[size].keys() == whole.keys()
        for case, (loss, _) in shared[size].items():
            assert loss == pytest.approx(whole[case][0], rel=LARGEST_DIFFERENCE)


def test_every_gradient_is_that_of_one_rank(computed: tuple[Results, dict[int, Results]]) -> None:
    """Decoder, connector, vision encoder and new tokens.  Would catch heads dealt out in another order, copies of key
    heads that are not summed, visual tokens at wrong places or computed twice, features whose gradients stay with the
    wrong rank, dropout that is drawn for parts instead of places, and a factor of the number of ranks anywhere."""
    whole, shared = computed
    worst = 0.0
    for size in SIZES:
        for case, (_, gradients) in shared[size].items():
            expected = whole[case][1]
            assert sum(bool(gradient.any()) for gradient in expected.values()) > (80 if "no image" not in case else 20)
            # A key's bias moves all scores alike: its gradient is 0 but for rounding, which has no scale of its own.
            floor = 1e-3 * max(float(gradient.abs().max()) for gradient in expected.values())
            for name, gradient in gradients.items():
                scale = expected[name].abs().max().clamp(min=floor)
                difference = float((gradient - expected[name]).abs().max() / scale)
                worst = max(worst, difference)
                assert difference <= LARGEST_DIFFERENCE, (size, case, name)
    print(f"largest difference {worst:.1e}")


def test_gradients_in_float32_are_those_of_one_rank(on_ranks: dict[str, dict[int, Results]]) -> None:
    """In the precision of training, part by part: nearer to one rank than one rank is to the truth."""
    whole = gradients_of_all(MODELS, build=as_training_starts)
    for size, shared in on_ranks["as_training_starts"].items():
        for case, (loss, gradients) in shared.items():
            assert loss == pytest.approx(whole[case][0], rel=1e-6)
            for part in ("vision_encoder.", "connector.", "decoder.embedding.new", "decoder."):
                own, expected = (
                    {name: values for name, values in found.items() if name.startswith(part)}
                    for found in (gradients, whole[case][1])
                )
                assert own and not any(values.dtype != torch.float32 for values in own.values())
                if any(values.any() for values in expected.values()):
                    assert distance(own, expected) <= LARGEST_DISTANCE, (size, case, part)
                else:
                    assert not any(values.any() for values in own.values()), (size, case, part)


def test_blocks_may_be_compiled_and_computed_twice() -> None:
    """On two ranks, as in training: exchanges happen again in the backward pass, and stay out of compiled programs.

    Would catch ranks that exchange in another order (they would hang), a compiled block that was traced with one rank's
    attention, and other dropout in the second pass.  Also in float64.
    """
    models = {name: MODELS[name] for name in ("fewer key heads than ranks",)}
    whole = gradients_of_all(models)
    (of_first, _) = run_distributed(gradients_of_changed_blocks, 2, models, timeout_seconds=300)
    assert of_first.keys() == CHANGES.keys()
    for way, shared in of_first.items():
        for case, (loss, gradients) in shared.items():
            assert loss == pytest.approx(whole[case][0], rel=LARGEST_DIFFERENCE)
            worst = distance(gradients, whole[case][1])
            print(way, case, f"{worst:.1e}")
            assert worst <= LARGEST_DIFFERENCE, (way, case)


def distance(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Of all gradients together, relative."""
    pairs = [(found[name].flatten(), values.flatten()) for name, values in expected.items()]
    a, b = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("key_heads", [8, 1])
def test_as_much_is_exchanged_as_the_theory_says(key_heads: int) -> None:
    """Per layer and rank, of N = S / P tokens: one exchange of N (H + 2 G') h numbers before attention and one of N H h
    after it, where G' = max(G, P) key heads; the same again on the way back.  Visual tokens: those that are computed
    elsewhere than used.  Would catch queries, keys and values that travel apart, and key heads that are expanded to
    all query heads before they travel."""
    ranks, config = 2, eight_heads(key_heads)
    pack = random_pack(config, 2, tokens=96, images=3)
    decoder, width = config.decoder, config.decoder.head_dim
    tokens = 96 // ranks
    before = tokens * (decoder.num_heads + 2 * max(key_heads, ranks)) * width
    after = tokens * decoder.num_heads * width
    per_rank = run_distributed(exchanged, ranks, config, pack)
    visual = [counted["forward"][0] for counted in per_rank]
    assert sum(visual) == len(pack["pooling"]) * decoder.width
    for counted in per_rank:
        assert counted["forward"][1:] == [before, after] * decoder.num_layers
        assert counted["backward"][:-1] == [after, before] * decoder.num_layers
    assert sum(counted["backward"][-1] for counted in per_rank) == sum(visual)
