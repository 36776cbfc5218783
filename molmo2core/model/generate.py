"""Greedy generation with a key/value cache.

Shape legend: B prompts, S longest prompt.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from molmo2core.examples import PADDING, TokenizedExample
from molmo2core.model.attention import AttentionMask
from molmo2core.model.cache import KeyValueCache
from molmo2core.model.molmo2 import Molmo2


@torch.inference_mode()
def generate(model: Molmo2, prompts: Sequence[TokenizedExample], *, max_new_tokens: int, eos: int) -> list[list[int]]:
    """The most likely next tokens of each prompt, until EOS (left out) or `max_new_tokens`.

    Prompts may differ in length and number of crops.  Bidirectional attention among visual tokens happens in the
    prefill, which sees whole prompts (model.md 7).
    """
    device = model.decoder.embedding.base.device
    lengths = torch.tensor([len(prompt.input_ids) for prompt in prompts], device=device)
    longest = int(lengths.max())
    cache = KeyValueCache(
        model.config.decoder, len(prompts), longest + max_new_tokens, like=model.decoder.embedding.base
    )
    crops, pooling = join_visual(prompts)
    subsegment_ids = _padded([p.subsegment_ids for p in prompts], longest, PADDING, device)
    hidden = model(
        input_ids=_padded([p.input_ids for p in prompts], longest, eos, device),
        position_ids=_padded([p.position_ids for p in prompts], longest, 0, device),
        mask=AttentionMask(subsegment_ids, _padded([p.is_visual for p in prompts], longest, 0, device).bool()),
        crops=crops.to(device),
        pooling=pooling.to(device),
        cache=cache,
    )
    cache.advance(lengths)
    last = hidden[torch.arange(len(prompts), device=device), lengths - 1]
    position_ids = torch.tensor([int(p.position_ids[-1]) + 1 for p in prompts], device=device)
    no_crops, no_pooling = crops[:0].to(device), pooling[:0].to(device)
    answers: list[list[int]] = [[] for _ in prompts]
    finished = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    for _ in range(max_new_tokens):
        tokens = model.logits(last).argmax(dim=-1)
        finished |= tokens == eos
        if bool(finished.all()):
            break
        for row in (~finished).nonzero()[:, 0].tolist():
            answers[row].append(int(tokens[row]))
        step = subsegment_ids[:, :1]  # one token per row: the cache alone says what it may see
        last = model(
            input_ids=tokens[:, None],
            position_ids=position_ids[:, None],
            mask=AttentionMask(step, torch.zeros_like(step, dtype=torch.bool)),
            crops=no_crops,
            pooling=no_pooling,
            cache=cache,
        )[:, 0]
        cache.advance(torch.ones_like(lengths))
        position_ids = position_ids + 1
    return answers


def join_visual(prompts: Sequence[TokenizedExample]) -> tuple[Tensor, Tensor]:
    """All crops [C, P, D] and, with indices moved accordingly, all pooling rows [V, K]."""
    pooling, num_patches = [], 0
    for prompt in prompts:
        pooling.append(np.where(prompt.pooling == PADDING, PADDING, prompt.pooling + num_patches))
        num_patches += prompt.crops.shape[0] * prompt.crops.shape[1]
    crops = np.concatenate([prompt.crops for prompt in prompts])
    return torch.from_numpy(crops), torch.from_numpy(np.concatenate(pooling).astype(np.int64))


def _padded(arrays: Sequence[np.ndarray], length: int, filler: int, device: torch.device) -> Tensor:  # type: ignore[type-arg]
    rows = np.full((len(arrays), length), filler, dtype=np.int64)
    for row, array in zip(rows, arrays, strict=True):
        row[: len(array)] = array
    return torch.from_numpy(rows).to(device)
