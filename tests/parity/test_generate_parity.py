"""Generation against transformers' own: greedy answers token for token, and the distribution that sampling draws from.

Weights are random and tiny, float32, CPU.  Tokens are compared exactly: logits of both sides differ by 2e-6 of the
largest, and over these prompts the two most likely tokens are never closer than 6e-5 of it.  Probabilities are
compared in float64 at 1e-12; measured at most 1.3e-15.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from molmo2core.checkpoints.native import native_inputs
from molmo2core.examples import PADDING, ROOT, TokenizedExample
from molmo2core.model.config import ModelConfig
from molmo2core.model.generate import Generation, GenerationOptions, generate, generate_batch
from molmo2core.model.molmo2 import Molmo2
from molmo2core.model.prompt_batch import PromptBatch, join_visual, strip_padding
from molmo2core.model.sampling import truncated_distribution
from molmo2core.testing.native_twin import native_twin
from molmo2core.testing.tiny_model import random_prompt, tiny_model
from molmo2core.testing.tiny_tokenizer import tiny_tokenizer

PAD = tiny_tokenizer().special.pad
Pair = tuple[Molmo2, Any]
"""Our model and transformers', with the same weights."""


@pytest.fixture(scope="module", params=[("qwen", False), ("qwen", True), ("olmo", False), ("olmo", True)], ids=str)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    variant, tied = request.param
    model = tiny_model(3, variant, tied=tied)
    return model, native_twin(model, tmp_path_factory.mktemp("released"))


def text(config: ModelConfig) -> list[TokenizedExample]:
    return [random_prompt(config, seed=1, words=100)]


def several_images(config: ModelConfig) -> list[TokenizedExample]:
    return [random_prompt(config, seed=3, images=4)]


def video(config: ModelConfig) -> list[TokenizedExample]:
    return [random_prompt(config, seed=4, frames=5)]


def unequal_lengths(config: ModelConfig) -> list[TokenizedExample]:
    return [
        random_prompt(config, seed=5, images=2),
        random_prompt(config, seed=6, words=30),
        random_prompt(config, seed=7, images=1, words=3),
    ]


@pytest.mark.parametrize("prompts_of", [text, several_images, video, unequal_lengths])
def test_greedy_generation(pair: Pair, prompts_of: Callable[[ModelConfig], list[TokenizedExample]]) -> None:
    """From prompts of unequal lengths, with and without stop tokens, from our own batch and from transformers' inputs,
    which are padded on the left.  Would catch wrong positions after the prompt, attention to another row's padding,
    a stop one token late."""
    model, native = pair
    prompts = prompts_of(model.config)
    inputs = native_inputs(prompts, pad_id=PAD, video=prompts_of is video)
    never = 768 + 100  # a new token: the head cannot give it
    free = generate(model, prompts, GenerationOptions(max_new_tokens=24, stop_tokens=frozenset()))
    assert free == native_answers(native, inputs, 24, [never])
    if model.decoder.head is not None:  # a random model whose head is its embedding repeats its last token
        assert len(set(free[0].token_ids)) > 3
    stops = [free[0].token_ids[5], free[-1].token_ids[11]]
    options = GenerationOptions(max_new_tokens=24, stop_tokens=frozenset(stops))
    expected = native_answers(native, inputs, 24, stops)
    assert expected[0].finish_reason == "stop"
    assert generate(model, prompts, options) == expected
    assert generate_batch(model, from_processor(inputs, prompts), options) == expected


def from_processor(inputs: dict[str, Tensor], prompts: Sequence[TokenizedExample]) -> PromptBatch:
    """The padded batch that transformers' model takes, as `strip_padding` explains; crops are still bytes."""
    mask = inputs["attention_mask"]
    crops, pooling = join_visual(prompts)
    return strip_padding(
        uids=[str(row) for row in range(len(mask))],
        input_ids=inputs["input_ids"],
        position_ids=mask.cumsum(1) - 1,
        subsegment_ids=torch.where(mask == 1, ROOT, PADDING),
        is_visual=inputs["mm_token_type_ids"] != 0,
        crops=crops,
        pooling=pooling,
    )


def native_answers(
    native: Any, inputs: dict[str, Tensor], max_new_tokens: int, stops: Sequence[int]
) -> list[Generation]:
    generated = native.generate(
        **inputs, max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=list(stops), pad_token_id=PAD
    )
    answers = []
    for row in generated[:, inputs["input_ids"].shape[1] :].tolist():
        end = next((i for i, token in enumerate(row) if token in stops), None)
        reason = "length" if end is None else "stop"
        answers.append(Generation(token_ids=tuple(row[:end]), finish_reason=reason))  # type: ignore[arg-type]
    return answers


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_p", [0.01, 0.5, 0.9, 0.999, 1.0])
def test_truncated_distribution(temperature: float, top_p: float) -> None:
    """Same tokens, same probabilities as transformers' warpers.  Would catch a nucleus that leaves out the token which
    crosses top_p, truncation before temperature, and probabilities that are not made to sum to one again."""
    from transformers import TemperatureLogitsWarper, TopPLogitsWarper

    logits = torch.randn(32, 1000, generator=torch.Generator().manual_seed(0)) * 4
    logits = logits.double()  # in float32 their sums would round tokens in or out at the edge
    warped = TopPLogitsWarper(top_p)(None, TemperatureLogitsWarper(temperature)(None, logits))
    expected = warped.softmax(dim=-1)
    ours = truncated_distribution(logits, *(torch.full((32,), x, dtype=torch.float64) for x in (temperature, top_p)))
    assert torch.equal(ours > 0, expected > 0)
    assert (ours - expected).abs().max() <= 1e-12
