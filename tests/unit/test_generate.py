"""Greedy generation with a key/value cache against the same model without one."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from molmo2core.checkpoints.native import our_logits
from molmo2core.examples import TokenizedExample
from molmo2core.model.attention import AttentionMask
from molmo2core.model.cache import KeyValueCache
from molmo2core.model.generate import generate, join_visual
from molmo2core.model.molmo2 import Molmo2
from molmo2core.testing.tiny_model import Variant, random_prompt, tiny_model

NEVER = 768 + 100
"""A new token's id: the head cannot give it."""


def mixed_prompts(model: Molmo2) -> list[TokenizedExample]:
    """Unequal lengths, with images, without, with a video."""
    return [
        random_prompt(model.config, seed=5, images=2),
        random_prompt(model.config, seed=6, words=30),
        random_prompt(model.config, seed=7, frames=3, words=3),
    ]


def extended(prompt: TokenizedExample, answer: list[int]) -> TokenizedExample:
    """The prompt with an answer written behind it, in the same branch."""
    more = np.array(answer, dtype=np.int32)
    last = int(prompt.position_ids[-1])
    return replace(
        prompt,
        input_ids=np.concatenate([prompt.input_ids, more]),
        position_ids=np.concatenate([prompt.position_ids, last + 1 + np.arange(len(more), dtype=np.int32)]),
        subsegment_ids=np.concatenate([prompt.subsegment_ids, np.full_like(more, prompt.subsegment_ids[-1])]),
        is_visual=np.concatenate([prompt.is_visual, np.zeros(len(more), dtype=bool)]),
    )


@pytest.mark.parametrize("variant", get_args(Variant))
@torch.no_grad()
def test_cached_steps_give_the_logits_of_the_full_forward(variant: Variant) -> None:
    """float32; measured at most 1.2e-6 of the largest logit, allowed 1e-5.  Would catch a row that attends to the
    padding of its cache, a position that is off by one, and visual keys computed causally."""
    model = tiny_model(3, variant)
    prompts = mixed_prompts(model)
    answers = torch.randint(0, 768, (len(prompts), 6), generator=torch.Generator().manual_seed(0)).tolist()
    full = our_logits(model, [extended(p, a) for p, a in zip(prompts, answers, strict=True)], pad_id=0)
    cached = cached_logits(model, prompts, answers)
    for row, logits in enumerate(full):
        difference = (cached[row] - logits[-7:]).abs().max() / logits.abs().max()
        assert difference <= 1e-5


def cached_logits(model: Molmo2, prompts: list[TokenizedExample], answers: list[list[int]]) -> Tensor:
    """[B, 1 + answer, vocabulary]: after the last prompt token and after each answer token, fed one by one."""
    lengths = torch.tensor([len(prompt.input_ids) for prompt in prompts])
    longest, steps = int(lengths.max()), len(answers[0])
    cache = KeyValueCache(model.config.decoder, len(prompts), longest + steps, like=model.decoder.embedding.base)
    crops, pooling = join_visual(prompts)

    def padded(name: str, filler: int) -> Tensor:
        rows = [torch.from_numpy(getattr(prompt, name)).long() for prompt in prompts]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=filler)

    hidden = model(
        input_ids=padded("input_ids", 7),  # any token: padding must not matter
        position_ids=padded("position_ids", 0),
        mask=AttentionMask(padded("subsegment_ids", -1), padded("is_visual", 0).bool()),
        crops=crops,
        pooling=pooling,
        cache=cache,
    )
    cache.advance(lengths)
    states = [hidden[torch.arange(len(prompts)), lengths - 1]]
    for step, tokens in enumerate(torch.tensor(answers).T):
        ones = torch.zeros(len(prompts), 1, dtype=torch.int64)
        hidden = model(
            input_ids=tokens[:, None],
            position_ids=(torch.tensor([int(p.position_ids[-1]) for p in prompts]) + 1 + step)[:, None],
            mask=AttentionMask(ones, ones.bool()),
            crops=crops[:0],
            pooling=pooling[:0],
            cache=cache,
        )
        cache.advance(torch.ones(len(prompts), dtype=torch.int64))
        states.append(hidden[:, 0])
    return model.logits(torch.stack(states, dim=1))


@pytest.mark.parametrize("variant", get_args(Variant))
def test_each_token_is_the_most_likely_one(variant: Variant) -> None:
    """Against the full forward over prompt and answer.  Would catch a cache that is right only for the first token."""
    model = tiny_model(4, variant)
    prompts = mixed_prompts(model)
    answers = generate(model, prompts, max_new_tokens=12, eos=NEVER)
    assert len({token for answer in answers for token in answer}) > 6
    with torch.no_grad():
        full = our_logits(model, [extended(p, a) for p, a in zip(prompts, answers, strict=True)], pad_id=0)
    for logits, answer in zip(full, answers, strict=True):
        assert logits[-13:-1].argmax(dim=-1).tolist() == answer


def test_the_batch_makes_no_difference() -> None:
    """Would catch pooling rows that index another prompt's crops, and attention across rows."""
    model = tiny_model(3)
    prompts = mixed_prompts(model)
    together = generate(model, prompts, max_new_tokens=8, eos=NEVER)
    alone = [generate(model, [prompt], max_new_tokens=8, eos=NEVER)[0] for prompt in prompts]
    assert together == alone
    assert generate(model, prompts[::-1], max_new_tokens=8, eos=NEVER) == together[::-1]


def test_stops_at_eos_and_at_the_limit() -> None:
    """EOS is left out; one row's end does not end the others; a first token EOS is an empty answer."""
    model = tiny_model(3)
    prompts = mixed_prompts(model)
    free = generate(model, prompts, max_new_tokens=10, eos=NEVER)
    eos = free[1][0]
    assert eos not in free[0][:3]  # the interesting case: another row goes on
    stopped = generate(model, prompts, max_new_tokens=10, eos=eos)
    assert stopped == [row[: row.index(eos)] if eos in row else row for row in free]
    assert stopped[1] == []
    assert [len(row) for row in generate(model, prompts, max_new_tokens=3, eos=NEVER)] == [3, 3, 3]


def test_gradient_free_and_repeatable() -> None:
    model = tiny_model(3)
    prompts = mixed_prompts(model)[:1]
    assert generate(model, prompts, max_new_tokens=4, eos=NEVER) == generate(
        model, prompts, max_new_tokens=4, eos=NEVER
    )
    assert all(parameter.grad is None for parameter in model.parameters())
