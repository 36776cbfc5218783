"""Dropout's masks: as often as asked, unrelated to each other, and a function of what is dropped alone."""

from __future__ import annotations

import math
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from molmo2core.model.dropout import TokenDropout, drop, dropout_keys

S, W = 512, 256
BACKEND = "inductor" if shutil.which("g++") else "aot_eager"


def dropout(p: float | Tensor, keys: Tensor) -> TokenDropout:
    return TokenDropout(probabilities=torch.zeros(1, len(keys)) + p, keys=keys[None])


def mask_of(p: float, keys: Tensor, branch: int = 0, width: int = W) -> Tensor:
    """float64 [S, W], 1 where an element is dropped."""
    return (drop(torch.ones(1, len(keys), width), dropout(p, keys), branch)[0] == 0).double()


@pytest.mark.parametrize("p", [0.0, 0.1, 0.25, 0.5, 0.9, 0.999999])
def test_as_many_are_dropped_as_asked(p: float) -> None:
    """And what is kept is scaled so that the mean stays.  Bound: five deviations of the binomial distribution, beside
    the rounding of p to a multiple of 2 ** -16."""
    ones = torch.ones(1, S, W, dtype=torch.float64)
    out = drop(ones, dropout(p, dropout_keys(1, 2, S)), 3)
    rate = float((out == 0).double().mean())
    rounded = min(round(p * 2**16), 2**16 - 1) / 2**16
    assert abs(rounded - p) <= 2**-16 and abs(rate - rounded) <= 5 * math.sqrt(rounded * (1 - rounded) / (S * W))
    scales = out[out != 0].unique()
    assert scales.numel() <= 1
    assert p > 0.99 or float(scales) == pytest.approx(1 / (1 - p), rel=1e-4)
    assert p != 0.0 or out.equal(ones)


def correlation(a: Tensor, b: Tensor) -> float:
    """Of two masks, in deviations of what independent ones have."""
    a, b = a.flatten() - a.mean(), b.flatten() - b.mean()
    return float((a @ b) / (a.norm() * b.norm())) * math.sqrt(len(a))


def test_masks_are_unrelated() -> None:
    """Between branches, packs and seeds; between neighbouring positions and channels, and between the two elements of
    one hash.  38 correlations, each at most 4.5 deviations: independent masks fail once in 4,000 sets of keys, and
    these keys are fixed.  Would catch masks that are equal in all layers, and rows that are their neighbour's, shifted.
    """
    keys = dropout_keys(1, 2, S)
    mask = mask_of(0.1, keys)
    others = [mask_of(0.1, keys, branch) for branch in range(1, 13)]
    others += [mask_of(0.1, dropout_keys(1, pack, S)) for pack in (0, 1, 3, 4, 5, 2000)]
    others += [mask_of(0.1, dropout_keys(seed, 2, S)) for seed in (0, 2, 3, 12)]
    pairs = [(mask, other) for other in others]
    for distance in (1, 2, 4, 16):
        pairs += [(mask[distance:], mask[:-distance]), (mask[:, distance:], mask[:, :-distance])]
        pairs += [(mask[distance:, distance:], mask[:-distance, :-distance])]
        pairs += [(mask[distance:, :-distance], mask[:-distance, distance:])]
    assert len(pairs) == 38
    found = [correlation(*pair) for pair in pairs]
    assert max(map(abs, found)) < 4.5, found
    assert correlation(mask, mask) > 300  # the measure can tell


@given(first=st.integers(0, 200), branch=st.integers(0, 1), seed=st.integers(0, 100))
def test_branches_count_on_from_any_other(first: int, branch: int, seed: int) -> None:
    """Would catch layers that share masks because each calls its branches 0 and 1, and a shift that leaves int32."""
    whole = dropout(0.5, dropout_keys(seed, 3, 40))
    x = torch.ones(1, 40, 6)
    assert drop(x, whole.from_branch(first), branch).equal(drop(x, whole, first + branch))


def test_counts_of_rows_and_columns_are_binomial() -> None:
    """No position and no channel is dropped more often than chance has it: variance of the counts within 25 % (five
    deviations of what it varies by itself)."""
    mask = torch.cat([mask_of(0.1, dropout_keys(1, pack, S)) for pack in range(4)])
    for counts, size in ((mask.sum(1), W), (mask.sum(0), 4 * S)):
        ratio = float(counts.var()) / (size * 0.1 * 0.9)
        assert abs(ratio - 1) < 5 * math.sqrt(2 / len(counts)), ratio


@settings(max_examples=50, deadline=None)
@given(
    ranks=st.sampled_from([1, 2, 4]),
    width=st.integers(1, 33),
    branch=st.integers(0, 200),
    seed=st.integers(0, 2**40),
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=3),
)
def test_any_cut_has_the_masks_of_the_whole(ranks: int, width: int, branch: int, seed: int, lengths: list[int]) -> None:
    """Packs one by one or merged, whole or in the parts that ranks share: the same elements are dropped."""
    packs = [dropout_keys(seed, number, length) for number, length in enumerate(lengths)]
    whole = mask_of(0.5, torch.cat(packs), branch, width)
    assert torch.cat([mask_of(0.5, keys, branch, width) for keys in packs]).equal(whole)
    padded = torch.cat([*packs, torch.zeros(-sum(lengths) % ranks, dtype=torch.int32)])
    parts = [mask_of(0.5, part, branch, width) for part in padded.chunk(ranks)]
    assert torch.cat(parts)[: sum(lengths)].equal(whole)


def test_gradients_are_dropped_where_values_are() -> None:
    x = torch.randn(1, 7, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    chances = torch.tensor([0.0, 0.0, 0.3, 0.3, 0.9, 0.9, 0.9])
    out = drop(x, dropout(chances, dropout_keys(0, 0, 7)), 0)
    out.sum().backward()
    torch.testing.assert_close(x.grad * x, out)
    assert out[0, :2].equal(x[0, :2])


def test_half_precision_keeps_its_type() -> None:
    x = torch.ones(1, S, W, dtype=torch.bfloat16)
    out = drop(x, dropout(0.1, dropout_keys(1, 2, S)), 0)
    assert out.dtype == torch.bfloat16
    assert (out == 0).equal(drop(x.float(), dropout(0.1, dropout_keys(1, 2, S)), 0) == 0)


def test_compiled_code_draws_the_same() -> None:
    """Would catch integers that compiled code computes in 64 bits where eager code lets 32 overflow (found with 24
    channels, which fill no vector register).  Without g++ only torch's tracing is compared."""
    torch._dynamo.reset()
    x, made = torch.ones(1, 16, 24), dropout(0.5, dropout_keys(1, 2, 16))
    compiled = torch.compile(drop, dynamic=False, backend=BACKEND)(x, made, 3)
    torch._dynamo.reset()
    assert compiled.equal(drop(x, made, 3))
