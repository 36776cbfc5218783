"""The loss that never holds all logits is the plain formula: value, gradient of hidden states, gradient of the head."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from molmo2core.model import loss
from molmo2core.model.loss import LossParts, weighted_loss

Z = 1e-2
"""A hundred times the recipe's, so that a fault in the z term's gradient shows."""


def plain_loss(hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """(sum of w * CE, sum of w * z) over all positions, from all logits at once."""
    logits = (hidden @ head.T).to(torch.promote_types(hidden.dtype, torch.float32))
    cross_entropy = F.cross_entropy(logits, targets, reduction="none")
    return (weights * cross_entropy).sum(), Z * (weights * logits.logsumexp(-1).square()).sum()


def arguments(
    seed: int, positions: int, targets: int, width: int = 8, vocabulary: int = 30, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states and a head that need gradients, target ids, and weights that are positive at `targets` places."""
    generator = torch.Generator().manual_seed(seed)
    hidden = (0.5 * torch.randn(positions, width, generator=generator, dtype=dtype)).requires_grad_()
    head = torch.randn(vocabulary, width, generator=generator, dtype=dtype).requires_grad_()
    weights = torch.zeros(positions, dtype=dtype)
    weights[torch.randperm(positions, generator=generator)[:targets]] = 0.1
    weights *= 0.5 + torch.rand(positions, generator=generator, dtype=dtype)
    return hidden, head, torch.randint(0, vocabulary, (positions,), generator=generator), weights


def gradients(total: Tensor, *of: Tensor, scale: float = 1.0) -> tuple[Tensor, ...]:
    return torch.autograd.grad(total * scale, of)


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    positions=st.integers(0, 40),
    share=st.sampled_from([0.0, 0.3, 1.0]),
    chunk=st.integers(1, 12),
    width=st.integers(1, 20),
    vocabulary=st.integers(1, 50),
    scale=st.sampled_from([1.0, 0.37, -2.0, 0.0]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_the_plain_formula(
    seed: int, positions: int, share: float, chunk: int, width: int, vocabulary: int, scale: float, dtype: torch.dtype
) -> None:
    """No, one and all places, less than a chunk, exactly one, several.  Would catch a chunk left out, a gradient that
    lands at another place, a z term without gradient, a scale applied twice.

    Tolerance: 1e-6 of the largest value in float32 against the formula in float64 (over 3,000 random cases at most
    5.9e-7), 1e-14 in float64.
    """
    hidden, head, targets, weights = arguments(seed, positions, round(share * positions), width, vocabulary, dtype)
    with mock.patch.object(loss, "CHUNK", chunk):
        parts = weighted_loss(hidden, head, targets, weights, Z)
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, head)]
    cross_entropy, z = plain_loss(*exact, targets, weights.double())
    tolerance = 1e-6 if dtype == torch.float32 else 1e-14
    expected = gradients(cross_entropy + z, *exact, scale=scale)
    found = gradients(parts.total, hidden, head, scale=scale)
    pairs = [(parts.cross_entropy, cross_entropy), (parts.z, z), (parts.total, cross_entropy + z)]
    for ours, plain in [*pairs, *zip(found, expected, strict=True)]:
        assert ours.dtype == dtype and ours.shape == plain.shape
        largest = max(1.0, float(plain.detach().abs().max())) if plain.numel() else 0.0
        torch.testing.assert_close(ours.double(), plain, rtol=0, atol=tolerance * largest)


@pytest.mark.parametrize("places", [0, 1, 7, 8, 9, 16])
def test_each_position_has_its_loss(places: int) -> None:
    """For loss by task: no, one, a chunk less one, a chunk, a chunk more one, two chunks."""
    hidden, head, targets, weights = arguments(1, 20, places)
    with mock.patch.object(loss, "CHUNK", 8):
        parts = weighted_loss(hidden, head, targets, weights, Z)
    assert parts.places.tolist() == weights.nonzero()[:, 0].tolist() and len(parts.places) == places
    expected = F.cross_entropy(hidden @ head.T, targets, reduction="none")[parts.places]
    torch.testing.assert_close(parts.token_losses, expected.detach(), rtol=1e-5, atol=1e-6)
    assert not any(part.requires_grad for part in parts[1:]) and parts.total.requires_grad


def test_response_positions_alone_are_all_positions() -> None:
    """Logits where the weight is positive, against all logits with zero weights elsewhere (2.5, test 4)."""
    hidden, head, targets, weights = arguments(2, 40, 13)
    cross_entropy, z = plain_loss(hidden, head, targets, weights)
    assert float(weighted_loss(hidden, head, targets, weights, Z).total) == pytest.approx(float(cross_entropy + z))


def test_a_constant_on_all_weights_changes_no_gradient_of_the_mean() -> None:
    """Scale invariance of sum w(CE + z) / sum w (2.5, test 5).  Would catch a z term without weights."""
    hidden, head, targets, weights = arguments(3, 30, 20)

    def of_the_mean(factor: float) -> tuple[Tensor, ...]:
        scaled = weights * factor
        return gradients(weighted_loss(hidden, head, targets, scaled, Z).total, hidden, head, scale=1 / scaled.sum())

    for found, expected in zip(of_the_mean(7.3), of_the_mean(1.0), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


class Seen(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns, outside of views."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
                self.shapes.add(tuple(tensor.shape))
        return result


def test_all_logits_never_exist() -> None:
    """512 positions of a vocabulary of 1000, 16 at a time.  The plain chunk loop, whose chunks wait for backward, keeps
    them all: what waits between forward and backward is counted too."""
    hidden, head, targets, weights = arguments(4, 512, 512, width=4, vocabulary=1000)
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with mock.patch.object(loss, "CHUNK", 16), Seen() as seen:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            total = weighted_loss(hidden, head, targets, weights, Z).total
        total.backward()
    assert seen.largest == 16 * 1000
    assert sum(kept) == hidden.numel() + head.numel() + 512  # two gradients and the places
    with Seen() as plain:
        sum(plain_loss(hidden, head, targets, weights)).backward()
    assert plain.largest == 512 * 1000


@pytest.mark.parametrize("frozen", ["head", "hidden"])
def test_what_is_frozen_gets_no_gradient_and_costs_none(frozen: str) -> None:
    """Would catch a matrix of the head's size for a head that nobody trains (LoRA, frozen head)."""
    hidden, head, targets, weights = arguments(5, 12, 9, width=5, vocabulary=33)
    of_hidden, of_head = gradients(sum(plain_loss(hidden, head, targets, weights)), hidden, head)
    expected = {"hidden": of_hidden, "head": of_head}
    tensors = {"hidden": hidden.detach(), "head": head.detach()}
    trained = "head" if frozen == "hidden" else "hidden"
    tensors[trained].requires_grad_()
    with Seen() as seen:
        weighted_loss(tensors["hidden"], tensors["head"], targets, weights, Z).total.backward()
    assert tensors[frozen].grad is None
    torch.testing.assert_close(tensors[trained].grad, expected[trained], rtol=1e-5, atol=1e-6)
    assert ((33, 5) in seen.shapes) == (trained == "head")


def test_without_gradients_none_is_computed() -> None:
    """Validation: parameters need gradients, but nobody asks for them."""
    hidden, head, targets, weights = arguments(6, 12, 9, width=5, vocabulary=33)
    with torch.no_grad(), Seen() as seen:
        parts = weighted_loss(hidden, head, targets, weights, Z)
    assert not parts.total.requires_grad and (33, 5) not in seen.shapes
    assert float(parts.total) == pytest.approx(float(sum(plain_loss(hidden, head, targets, weights))))


def test_a_tied_head_sums_its_two_gradients() -> None:
    """The table as embedding and as head, and in two losses of one graph."""
    table = torch.randn(30, 8, generator=torch.Generator().manual_seed(7)).requires_grad_()
    _, _, targets, weights = arguments(7, 20, 15)
    ids = torch.randint(0, 30, (20,), generator=torch.Generator().manual_seed(8))

    def embed() -> Tensor:
        return torch.tanh(F.embedding(ids, table))

    ours = weighted_loss(embed(), table, targets, weights, Z).total
    ours = ours + 0.5 * weighted_loss(embed() * 2, table, targets.flip(0), weights, Z).total
    plain = sum(plain_loss(embed(), table, targets, weights))
    plain = plain + 0.5 * sum(plain_loss(embed() * 2, table, targets.flip(0), weights))
    torch.testing.assert_close(gradients(ours, table), gradients(plain, table), rtol=1e-5, atol=1e-6)


def test_a_second_backward_is_an_error() -> None:
    """Backward scales the head's gradient in place; asked twice it must not give the scaled one scaled again."""
    hidden, head, targets, weights = arguments(9, 10, 10)
    total = weighted_loss(hidden, head, targets, weights, Z).total
    (0.5 * total).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (0.5 * total).backward()


@pytest.mark.parametrize("half", ["autocast", "all"])
@pytest.mark.parametrize("trial", range(3))
def test_bfloat16(half: str, trial: int) -> None:
    """Products in bfloat16 by autocast over float32 parameters, or with both already bfloat16 (gathered so by FSDP).

    Losses and sums over chunks are float32, so that the head's gradient over 16 chunks is no worse than the plain
    formula's over one: measured against float64, its deviation is 0.96 to 1.05 times that of the plain one.  With a sum
    in bfloat16 it is 1.25 to 1.54 times.
    """
    hidden, head, targets, weights = arguments(10 + trial, 256, 256, width=16, vocabulary=64)
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, head)]
    dtype = torch.bfloat16 if half == "all" else torch.float32
    hidden, head = (tensor.detach().to(dtype).requires_grad_() for tensor in (hidden, head))
    if half == "all":  # what is compared is the arithmetic, not the rounding of what goes in
        exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, head)]
    with torch.autocast("cpu", torch.bfloat16, enabled=half == "autocast"), mock.patch.object(loss, "CHUNK", 16):
        parts: LossParts = weighted_loss(hidden, head, targets, weights, Z)
        plain = sum(plain_loss(hidden, head, targets, weights))
    assert parts.total.dtype == parts.token_losses.dtype == torch.float32
    assert float(parts.total) == pytest.approx(float(plain), rel=1e-5)
    expected = gradients(sum(plain_loss(*exact, targets, weights.double())), *exact)
    ours, theirs = gradients(parts.total, hidden, head), gradients(plain, hidden, head)
    for mine, other, right in zip(ours, theirs, expected, strict=True):
        assert mine.dtype == other.dtype == dtype
        ratio = float((mine.double() - right).norm() / (other.double() - right).norm())
        assert ratio < 1.12
