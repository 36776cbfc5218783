"""Generation with a key/value cache against the same model without one, and the rules of stopping.

float32; over both variants, ten seeds of the model and all prompts below, the logits of cached steps differed from
those of the full forward by at most 1.7e-6 of the largest logit; allowed is 1e-5.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from molmo2core.checkpoints.native import our_logits
from molmo2core.errors import DataError, Molmo2Error, RecipeError
from molmo2core.examples import DOCUMENT, PADDING, TokenizedExample
from molmo2core.model.generate import Generation, GenerationOptions, generate, generate_batch
from molmo2core.model.molmo2 import Molmo2
from molmo2core.model.prompt_batch import PromptBatch, join_prompts, join_visual, strip_padding
from molmo2core.testing.tiny_model import Variant, random_prompt, random_tree, tiny_model

TOLERANCE = 1e-5
FREE = GenerationOptions(max_new_tokens=10, stop_tokens=frozenset())
"""Greedy, stopped by its length alone."""


def mixed_prompts(model: Molmo2) -> list[TokenizedExample]:
    """Unequal lengths, with images, without, with a video, and one that continues the second of two branches."""
    return [
        random_prompt(model.config, seed=5, images=2),
        random_prompt(model.config, seed=6, words=30),
        random_prompt(model.config, seed=7, frames=3, words=3),
        random_tree(model.config, seed=8, images=1, branches=(9, 5)),
    ]


def extended(prompt: TokenizedExample, answer: tuple[int, ...]) -> TokenizedExample:
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


def padded(prompts: list[TokenizedExample], side: str, width: int = 0) -> PromptBatch:
    """The same prompts through rows padded on one side, with padding that would disturb if it were looked at."""
    width = max(width, *(len(prompt.input_ids) for prompt in prompts))

    def rows(name: str, filler: int) -> Tensor:
        out = np.full((len(prompts), width), filler, dtype=np.int64)
        for row, prompt in zip(out, prompts, strict=True):
            values = getattr(prompt, name)
            row[slice(0, len(values)) if side == "right" else slice(width - len(values), width)] = values
        return torch.from_numpy(out)

    crops, pooling = join_visual(prompts)
    return strip_padding(
        uids=[prompt.uid for prompt in prompts],
        input_ids=rows("input_ids", 7),
        position_ids=rows("position_ids", 5),
        subsegment_ids=rows("subsegment_ids", PADDING),
        is_visual=rows("is_visual", 1).bool(),
        crops=crops,
        pooling=pooling,
    )


def answers_and_logits(
    model: Molmo2, batch: PromptBatch, options: GenerationOptions, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[Generation], list[Tensor]]:
    """Answers, and the logits of each step as the model gave them."""
    seen: list[Tensor] = []
    head = model.logits

    def recorded(hidden: Tensor) -> Tensor:
        seen.append(head(hidden))
        return seen[-1]

    with monkeypatch.context() as patch:
        patch.setattr(model, "logits", recorded)
        return generate_batch(model, batch, options), seen


@pytest.mark.parametrize("variant", get_args(Variant))
@torch.no_grad()
def test_cached_steps_give_the_logits_of_the_full_forward(variant: Variant, monkeypatch: pytest.MonkeyPatch) -> None:
    """At every step, on answers drawn at random.  Would catch a row that attends to another's slots, a position that
    is off by one, visual keys computed causally, and a token that sees the other branch."""
    model = tiny_model(3, variant)
    prompts = mixed_prompts(model)
    options = replace(FREE, temperature=3.0)
    answers, steps = answers_and_logits(model, join_prompts(prompts), options, monkeypatch)
    assert len({token for answer in answers for token in answer.token_ids}) > 30
    whole = [extended(prompt, answer.token_ids) for prompt, answer in zip(prompts, answers, strict=True)]
    for row, logits in enumerate(our_logits(model, whole, pad_id=0)):
        expected = logits[len(prompts[row].input_ids) - 1 : -1]
        cached = torch.stack([step[row] for step in steps])
        assert (cached - expected).abs().max() <= TOLERANCE * expected.abs().max()


@pytest.mark.parametrize("variant", get_args(Variant))
def test_greedy_takes_the_most_likely_token(variant: Variant) -> None:
    """Against the full forward over prompt and answer.  Would catch a cache that is right only for the first token."""
    model = tiny_model(4, variant)
    prompts = mixed_prompts(model)
    answers = generate(model, prompts, FREE)
    assert len({token for answer in answers for token in answer.token_ids}) > 6
    whole = [extended(prompt, answer.token_ids) for prompt, answer in zip(prompts, answers, strict=True)]
    with torch.no_grad():
        full = our_logits(model, whole, pad_id=0)
    for logits, answer in zip(full, answers, strict=True):
        assert tuple(logits[-11:-1].argmax(dim=-1).tolist()) == answer.token_ids


def test_the_side_of_the_padding_makes_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, also with more padding than the longest prompt needs.  Would catch padding that is computed,
    attended to, or counted as a position."""
    model = tiny_model(3)
    prompts = mixed_prompts(model)
    answers, steps = answers_and_logits(model, join_prompts(prompts), FREE, monkeypatch)
    for batch in (padded(prompts, "left"), padded(prompts, "right"), padded(prompts, "left", 200)):
        other_answers, other_steps = answers_and_logits(model, batch, FREE, monkeypatch)
        assert other_answers == answers
        assert all(torch.equal(one, other) for one, other in zip(steps, other_steps, strict=True))


def test_other_documents_of_a_row_are_not_seen() -> None:
    """A padded row may hold a whole pack; its last document is continued.  Would catch `not padding` as the rule of
    what new tokens see."""
    model = tiny_model(3)
    first, second = (random_prompt(model.config, seed=seed, words=12) for seed in (1, 2))
    answer = generate(model, [second], FREE)[0]
    pack = replace(
        second,
        **{
            name: np.concatenate([getattr(first, name), getattr(second, name)])
            for name in ("input_ids", "position_ids", "is_visual")
        },
        subsegment_ids=np.concatenate([first.subsegment_ids, second.subsegment_ids + DOCUMENT]),
    )
    third = random_prompt(model.config, seed=3, images=1)
    batch = padded([pack, third, second], "right")
    assert [a.token_ids for a in generate_batch(model, batch, FREE)] == [
        answer.token_ids,
        generate(model, [third], FREE)[0].token_ids,
        answer.token_ids,
    ]


def test_the_batch_makes_no_difference() -> None:
    """Would catch pooling rows that index another prompt's crops, and attention across rows."""
    model = tiny_model(3)
    prompts = mixed_prompts(model)
    together = generate(model, prompts, FREE)
    assert together == [generate(model, [prompt], FREE)[0] for prompt in prompts]
    assert generate(model, prompts[::-1], FREE) == together[::-1]


def test_each_request_has_its_own_limit() -> None:
    """A row that is done leaves the batch and another takes its place.  Would catch rows that continue from another
    one's keys, tokens or positions after that."""
    model = tiny_model(3)
    prompts = [*mixed_prompts(model), random_prompt(model.config, seed=11, images=1, words=2)]
    free = generate(model, prompts, FREE)
    for limits in ([1, 10, 1, 7, 3], [10, 2, 2, 2, 10], [4, 4, 1, 10, 9], [3, 3, 3, 3, 3]):
        answers = generate(model, prompts, [replace(FREE, max_new_tokens=limit) for limit in limits])
        expected = [answer.token_ids[:limit] for answer, limit in zip(free, limits, strict=True)]
        assert [answer.token_ids for answer in answers] == expected
        assert {answer.finish_reason for answer in answers} == {"length"}


def test_stop_tokens_end_an_answer_and_are_left_out() -> None:
    """Each request with its own, several at once; one row's end does not end the others; a first token that stops is
    an empty answer.  Would catch a stop one token late, and a stop token of a neighbour."""
    model = tiny_model(3)
    prompts = mixed_prompts(model)
    free = [answer.token_ids for answer in generate(model, prompts, FREE)]
    stops = [frozenset({free[0][4], free[0][6]}), frozenset({free[1][0]}), frozenset({free[2][9]}), frozenset({767})]
    answers = generate(model, prompts, [replace(FREE, stop_tokens=stop) for stop in stops])
    for answer, tokens, stop in zip(answers, free, stops, strict=True):
        end = next((i for i, token in enumerate(tokens) if token in stop), 10)
        assert answer == Generation(token_ids=tokens[:end], finish_reason="length" if end == 10 else "stop")
    assert answers[1].token_ids == ()
    assert [answer.finish_reason for answer in answers] == ["stop", "stop", "stop", "length"]


def test_the_callback_hears_each_token_once_in_order() -> None:
    """Step by step, within a step in the order of requests, though rows change places; never a stop token."""
    model = tiny_model(3)
    prompts = mixed_prompts(model)
    free = generate(model, prompts, FREE)
    options = [
        replace(FREE, max_new_tokens=2),
        replace(FREE, stop_tokens=frozenset({free[1].token_ids[3]})),
        FREE,
        replace(FREE, max_new_tokens=7),
    ]
    heard: list[tuple[int, int]] = []
    answers = generate(model, prompts, options, on_token=lambda request, token: heard.append((request, token)))
    rows = [answer.token_ids for answer in answers]
    assert heard == [(number, row[step]) for step in range(10) for number, row in enumerate(rows) if step < len(row)]


def test_an_error_in_the_callback_ends_generation() -> None:
    def cancel(request: int, token: int) -> None:
        raise KeyboardInterrupt

    model = tiny_model(3)
    with pytest.raises(KeyboardInterrupt):
        generate(model, mixed_prompts(model), FREE, on_token=cancel)


def test_random_numbers_depend_on_seed_and_uid() -> None:
    """Would catch numbers that depend on the place in the batch, and one stream shared by all requests."""
    model = tiny_model(3)
    prompt = random_prompt(model.config, seed=6, words=30)
    sampled = replace(FREE, temperature=2.0)
    prompts = [prompt, replace(prompt, uid="other"), prompt, prompt]
    options = [sampled, sampled, replace(sampled, seed=1), sampled]
    first, other_uid, other_seed, again = generate(model, prompts, options)
    assert first == again
    assert len({first.token_ids, other_uid.token_ids, other_seed.token_ids}) == 3


def test_gradient_free_and_repeatable() -> None:
    model = tiny_model(3)
    prompts = mixed_prompts(model)[:1]
    assert generate(model, prompts, FREE) == generate(model, prompts, FREE)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 0),
        ("stop_tokens", frozenset({-1})),
        ("temperature", -0.5),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("top_p", float("nan")),
    ],
)
def test_wrong_options_name_the_field(name: str, value: Any) -> None:
    with pytest.raises(RecipeError, match=f"generation option {name}"):
        replace(FREE, **{name: value})


def test_positions_beyond_the_model_name_the_request() -> None:
    """Exactly the model's positions is fine, one more is not.  Would catch rotary angles never trained."""
    model = tiny_model(3)
    short, long = (random_prompt(model.config, seed=6, words=words) for words in (20, 4000))
    room = 4096 - len(long.input_ids)
    generate(model, [short, long], [replace(FREE, max_new_tokens=200), replace(FREE, max_new_tokens=room)])
    with pytest.raises(RecipeError, match=r"request 1 \(random-6\): a prompt of 4001 positions and up to 96 new"):
        generate(model, [short, long], replace(FREE, max_new_tokens=room + 1))


def test_wrong_batches_are_typed_errors() -> None:
    model = tiny_model(3)
    prompts = mixed_prompts(model)
    nothing = {name: getattr(prompts[1], name)[:0] for name in ("input_ids", "position_ids", "subsegment_ids")}
    cases: list[tuple[str, Any]] = [
        ("prompts to answer: none", lambda: generate(model, [], FREE)),
        (
            "prompt empty: no token",
            lambda: generate(model, [prompts[0], replace(prompts[1], uid="empty", **nothing)], FREE),
        ),
        ("expected one, or 4", lambda: generate(model, prompts, [FREE] * 3)),
        ("<im_patch>", lambda: generate(model, [replace(prompts[0], pooling=prompts[0].pooling[1:])], FREE)),
        ("padded prompts, is_visual", lambda: misshapen()),
    ]

    def misshapen() -> PromptBatch:
        row = torch.zeros(1, 4, dtype=torch.int64)
        crops, pooling = join_visual(prompts[1:2])
        return strip_padding(
            uids=["a"],
            input_ids=row,
            position_ids=row,
            subsegment_ids=row,
            is_visual=row[:, :3].bool(),
            crops=crops,
            pooling=pooling,
        )

    for message, call in cases:
        with pytest.raises(Molmo2Error, match=message) as raised:
            call()
        assert isinstance(raised.value, DataError | RecipeError)
