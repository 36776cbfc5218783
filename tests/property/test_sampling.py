"""Drawing the next token: the truncated distribution, its inverse, and independence of the batch."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from molmo2core.message_tree.attention_rule import allowed
from molmo2core.model.generate import GenerationOptions, generate
from molmo2core.model.prompt_batch import strip_padding
from molmo2core.model.sampling import draw, truncated_distribution
from molmo2core.testing.packs import random_pack
from molmo2core.testing.tiny_model import random_prompt, tiny_model

MODEL = tiny_model(3)
PROMPTS = [
    random_prompt(MODEL.config, seed=1, images=2),
    random_prompt(MODEL.config, seed=2, words=30),
    random_prompt(MODEL.config, seed=3, frames=3, words=3),
    random_prompt(MODEL.config, seed=4, words=1),
    random_prompt(MODEL.config, seed=5, images=1, words=9),
]
OPTIONS = [
    GenerationOptions(max_new_tokens=8, stop_tokens=frozenset(), temperature=1.0, top_p=0.9),
    GenerationOptions(max_new_tokens=5, stop_tokens=frozenset(), temperature=0.7, seed=3),
    GenerationOptions(max_new_tokens=9, stop_tokens=frozenset()),
    GenerationOptions(max_new_tokens=1, stop_tokens=frozenset(), temperature=2.0, top_p=0.5),
    GenerationOptions(max_new_tokens=12, stop_tokens=frozenset(range(0, 768, 5)), temperature=1.5),
]
ALONE = [generate(MODEL, [prompt], options)[0] for prompt, options in zip(PROMPTS, OPTIONS, strict=True)]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(range(len(PROMPTS))), min_size=1, max_size=6))
def test_an_answer_does_not_depend_on_its_batch(chosen: list[int]) -> None:
    """Any requests in any order, repeated too.  Would catch random numbers shared by a batch or taken by place, and
    a row that leaves and disturbs the others.  Derandomised, because rounding differs with the number of rows and
    could move a draw across the edge between two tokens (about once in a million draws)."""
    assert generate(MODEL, [PROMPTS[i] for i in chosen], [OPTIONS[i] for i in chosen]) == [ALONE[i] for i in chosen]


def test_the_requests_above_are_of_every_kind() -> None:
    """Greedy and drawn, ended by length and by a stop token: else the property would prove less than it says."""
    assert {answer.finish_reason for answer in ALONE} == {"stop", "length"}
    assert len({len(answer.token_ids) for answer in ALONE}) == 5


logits_rows = st.integers(0, 2**32 - 1).map(
    lambda seed: torch.randn(3, 50, generator=torch.Generator().manual_seed(seed)) * 5
)


@settings(max_examples=100, deadline=None)
@given(logits_rows, st.floats(0.05, 20.0), st.floats(1e-6, 1.0))
def test_the_nucleus_is_the_smallest_that_reaches_top_p(logits: torch.Tensor, temperature: float, top_p: float) -> None:
    """Against the definition, token by token.  Probabilities keep their ratios inside the nucleus."""
    probabilities = truncated_distribution(logits, torch.full((3,), temperature), torch.full((3,), top_p).double())
    full = (logits.double() / torch.tensor(temperature, dtype=torch.float32).double()).softmax(dim=-1)
    assert torch.allclose(probabilities.sum(dim=-1), torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-12)
    for row, whole in zip(probabilities, full, strict=True):
        ordered = whole.sort(descending=True).values
        inside = row > 0
        size = int(inside.sum())
        assert whole[inside].min() >= whole[~inside].max() if size < 50 else True
        assert ordered[:size].sum() >= top_p - 1e-12
        assert ordered[: size - 1].sum() < top_p + 1e-12
        assert torch.allclose(row[inside], whole[inside] / whole[inside].sum(), rtol=1e-9, atol=0)


@settings(max_examples=100, deadline=None)
@given(logits_rows, st.floats(0.0, 1.0, exclude_max=True), st.sampled_from([(1.0, 1e-300), (5e-324, 1.0), (1e-6, 1.0)]))
def test_the_cold_and_the_narrow_limit_are_greedy(
    logits: torch.Tensor, uniform: float, limit: tuple[float, float]
) -> None:
    """Temperature to 0 or top_p to 0 leaves the most likely token alone, without NaN at the smallest numbers."""
    temperature, top_p = (torch.full((3,), value, dtype=torch.float64) for value in limit)
    drawn = draw(truncated_distribution(logits, temperature, top_p), torch.full((3,), uniform, dtype=torch.float64))
    assert torch.equal(drawn, logits.argmax(dim=-1))


def test_frequencies_follow_the_truncated_distribution() -> None:
    """Chi-square of 20,000 draws with fixed numbers, p above 0.01; a distribution with two tokens exchanged fails.
    Would catch truncated mass that falls to one token, and an inverse that is off by one."""
    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(1)) * 2
    expected = truncated_distribution(logits, torch.tensor([1.3]), torch.tensor([0.9]))
    uniform = torch.from_numpy(np.random.default_rng(0).random(20_000))
    drawn = draw(expected.expand(len(uniform), -1), uniform)
    counts = torch.bincount(drawn, minlength=12)
    inside = expected[0] > 0
    assert 3 < int(inside.sum()) < 12
    assert not counts[~inside].any()
    assert chisquare(counts[inside], expected[0][inside] * 20_000).pvalue > 0.01
    assert chisquare(counts[inside], expected[0][inside].roll(1) * 20_000).pvalue < 1e-9


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from([0.0, 1e-12, 0.1, 1.0, 7.0]), min_size=1, max_size=9).filter(any), st.data())
def test_no_impossible_token_is_drawn(weights: list[float], data: st.DataObject) -> None:
    """Also at the ends of [0, 1) and with impossible tokens at either end of the vocabulary."""
    probabilities = torch.tensor([weights], dtype=torch.float64)
    probabilities = probabilities / probabilities.sum()
    uniform = data.draw(
        st.sampled_from([0.0, 5e-324, 0.5, float(np.nextafter(1.0, 0.0))]) | st.floats(0, 1, exclude_max=True)
    )
    token = int(draw(probabilities, torch.tensor([uniform], dtype=torch.float64)))
    assert probabilities[0, token] > 0


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_new_tokens_see_what_the_rule_says(seed: int) -> None:
    """A random pack continued by one token of its last branch: the last row of the brute-force mask.  Would catch a
    cache that shows other branches or documents, or hides the root."""
    mask = random_pack(np.random.default_rng(seed), max_tokens=200)
    ids, visual = mask.subsegment_ids, mask.is_visual
    real = ids != -1
    if not real.any():
        return
    batch = strip_padding(
        uids=["pack"],
        input_ids=ids,
        position_ids=ids,
        subsegment_ids=ids,
        is_visual=visual,
        crops=torch.empty(0),
        pooling=torch.empty(0),
    )
    continued = np.append(ids[0].numpy(), batch.subsegment_ids[-1].numpy())
    row = allowed(continued, np.append(visual[0].numpy(), False))[-1, :-1]
    assert np.array_equal(batch.seen_by_answer.numpy(), row[real[0].numpy()])
