"""Answers token by token: one prefill of all prompts, then one new token per row and step (model.md 7).

Shape legend: B prompts, N rows that still go on, T tokens of all prompts, W width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from molmo2core.errors import RecipeError
from molmo2core.examples import TokenizedExample
from molmo2core.model.attention import AttentionMask
from molmo2core.model.cache import KeyValueCache
from molmo2core.model.molmo2 import Molmo2
from molmo2core.model.prompt_batch import PromptBatch, join_prompts
from molmo2core.model.sampling import draw, truncated_distribution
from molmo2core.preprocessing.randomness import generator

FinishReason = Literal["stop", "length"]
OnToken = Callable[[int, int], None]
"""(number of the request, token), called in the order in which tokens come."""


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """How one request is answered.

    Raises:
        RecipeError: a value is out of range.
    """

    max_new_tokens: int
    stop_tokens: frozenset[int]
    """Ends the answer and is left out of it."""
    temperature: float = 0.0
    """0 takes the most likely token."""
    top_p: float = 1.0
    """Draw from the smallest set of most likely tokens that has this probability."""
    seed: int = 0
    """With the prompt's uid, all that the random numbers depend on."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise _wrong("max_new_tokens", self.max_new_tokens, "at least 1")
        if not all(token >= 0 for token in self.stop_tokens):
            raise _wrong("stop_tokens", sorted(self.stop_tokens), "token ids, 0 or more")
        if not 0 <= self.temperature < math.inf:
            raise _wrong("temperature", self.temperature, "0 (greedy) or a positive number")
        if not 0 < self.top_p <= 1:
            raise _wrong("top_p", self.top_p, "above 0 and at most 1")


@dataclass(frozen=True, kw_only=True)
class Generation:
    """The answer to one request."""

    token_ids: tuple[int, ...]
    """Without the stop token."""
    finish_reason: FinishReason
    """Whether a stop token came, or max_new_tokens were reached."""


def generate(
    model: Molmo2,
    prompts: Sequence[TokenizedExample],
    options: GenerationOptions | Sequence[GenerationOptions],
    on_token: OnToken | None = None,
) -> list[Generation]:
    """Answer `prompts`, which may differ in length and in number of crops; see `generate_batch`."""
    return generate_batch(model, join_prompts(prompts), options, on_token)


@torch.inference_mode()
def generate_batch(
    model: Molmo2,
    batch: PromptBatch,
    options: GenerationOptions | Sequence[GenerationOptions],
    on_token: OnToken | None = None,
) -> list[Generation]:
    """Answer all prompts of `batch` together.

    Visual tokens see each other in the prefill, which computes all prompts whole.  A row that is done leaves the
    batch, so the others go on faster.  An answer depends on its prompt and options alone, not on the batch, up to
    rounding: matrix kernels sum in an order that depends on the number of rows.

    Args:
        model: on any device; the batch is moved there.
        batch: from `join_prompts` or `strip_padding`.
        options: for all, or one for each prompt.
        on_token: called for each token as soon as it is known, not for stop tokens.

    Returns:
        One for each prompt, in order.

    Raises:
        RecipeError: options of another number than prompts, or a prompt and its new tokens exceed the model's
            positions.
        DataError: the number of <im_patch> tokens differs from that of pooling rows.
    """
    requests = _requests(batch, options, model.config.decoder.max_position_embeddings)
    hidden, cache = _prefill(model, batch, max(request.options.max_new_tokens for request in requests))
    rows = list(requests)
    while True:
        tokens = _next_tokens(model.logits(hidden), rows)
        for request, token in sorted(zip(rows, tokens, strict=True), key=lambda pair: pair[0].number):
            request.take(token, on_token)
        for row in reversed(range(len(rows))):
            if rows[row].finish_reason:
                cache.drop(row)
                rows[row] = rows[-1]
                rows.pop()
        if not rows:
            return [request.answer() for request in requests]
        hidden = _step(model, batch, rows, cache)


@dataclass(kw_only=True, eq=False)
class _Request:
    number: int
    options: GenerationOptions
    random: np.random.Generator
    num_positions: int
    """Of the prompt."""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    def take(self, token: int, on_token: OnToken | None) -> None:
        if token in self.options.stop_tokens:
            self.finish_reason = "stop"
            return
        self.token_ids.append(token)
        if len(self.token_ids) == self.options.max_new_tokens:
            self.finish_reason = "length"
        if on_token is not None:
            on_token(self.number, token)

    def answer(self) -> Generation:
        assert self.finish_reason is not None
        return Generation(token_ids=tuple(self.token_ids), finish_reason=self.finish_reason)


def _requests(
    batch: PromptBatch, options: GenerationOptions | Sequence[GenerationOptions], max_positions: int
) -> list[_Request]:
    num_prompts = len(batch.uids)
    each = [options] * num_prompts if isinstance(options, GenerationOptions) else list(options)
    if len(each) != num_prompts:
        raise RecipeError("generation options", found=f"{len(each)}", expected=f"one, or {num_prompts} as prompts")
    requests = []
    for number, position in enumerate(batch.position_ids[batch.last_tokens].tolist()):
        chosen, uid, num_positions = each[number], batch.uids[number], position + 1
        if num_positions + chosen.max_new_tokens > max_positions:
            raise RecipeError(
                f"request {number} ({uid})",
                found=f"a prompt of {num_positions} positions and up to {chosen.max_new_tokens} new tokens",
                expected=f"at most the model's {max_positions} positions",
                mend="lower max_new_tokens, or the limits of the preprocessing",
            )
        requests.append(
            _Request(
                number=number,
                options=chosen,
                random=generator("generate", chosen.seed, uid),
                num_positions=num_positions,
            )
        )
    return requests


def _prefill(model: Molmo2, batch: PromptBatch, max_new_tokens: int) -> tuple[Tensor, KeyValueCache]:
    """Hidden state of each prompt's last token, [B, W], and the cache of all."""
    device = model.decoder.embedding.base.device
    cache = KeyValueCache(batch.lengths, batch.seen_by_answer.to(device), max_new_tokens)
    hidden = model(
        input_ids=batch.input_ids[None].to(device),
        position_ids=batch.position_ids[None].to(device),
        mask=AttentionMask(batch.as_documents[None].to(device), batch.is_visual[None].to(device)),
        crops=batch.crops.to(device),
        pooling=batch.pooling.to(device),
        cache=cache,
    )
    return hidden[0, batch.last_tokens.to(device)], cache


def _step(model: Molmo2, batch: PromptBatch, rows: Sequence[_Request], cache: KeyValueCache) -> Tensor:
    """Hidden state after each row's newest token, [N, W]."""
    device = model.decoder.embedding.base.device
    fed = torch.tensor([(r.token_ids[-1], r.num_positions + len(r.token_ids) - 1) for r in rows]).to(device)
    input_ids, position_ids = fed[:, :1], fed[:, 1:]
    hidden = model(
        input_ids=input_ids,
        position_ids=position_ids,
        mask=AttentionMask(torch.zeros_like(input_ids), torch.zeros_like(input_ids, dtype=torch.bool)),
        crops=batch.crops[:0].to(device),
        pooling=batch.pooling[:0].to(device),
        cache=cache,
    )
    return hidden[:, 0]


def _next_tokens(logits: Tensor, rows: Sequence[_Request]) -> list[int]:
    """One token per row of [N, V] logits; the one place of a step that waits for the device."""
    tokens = logits.argmax(dim=-1)
    sampled = [row for row, request in enumerate(rows) if request.options.temperature > 0]
    if sampled:
        values = [(rows[r].options.temperature, rows[r].options.top_p, rows[r].random.random()) for r in sampled]
        numbers = torch.tensor(values, dtype=torch.float64).to(logits.device)
        places = torch.tensor(sampled, device=logits.device)
        tokens[places] = draw(truncated_distribution(logits[places], numbers[:, 0], numbers[:, 1]), numbers[:, 2])
    chosen: list[int] = tokens.tolist()
    return chosen


def _wrong(name: str, value: object, expected: str) -> RecipeError:
    return RecipeError(f"generation option {name}", found=repr(value), expected=expected)
