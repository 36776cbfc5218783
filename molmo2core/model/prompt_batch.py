"""Prompts of any lengths as one sequence without padding: what the prefill computes.

Shape legend: B prompts, S longest prompt, T tokens of all prompts, C crops, P patches of a crop, D bytes of a patch,
V visual tokens, K patches per pool.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from molmo2core.errors import DataError
from molmo2core.examples import DOCUMENT, PADDING, TokenizedExample


@dataclass(frozen=True, kw_only=True, eq=False)
class PromptBatch:
    """B prompts, one behind the other."""

    uids: tuple[str, ...]
    """[B] what errors call each prompt, and what its random numbers depend on."""
    lengths: tuple[int, ...]
    """[B] tokens of each prompt."""
    input_ids: Tensor
    """int64 [T]"""
    position_ids: Tensor
    """int64 [T]"""
    subsegment_ids: Tensor
    """int64 [T], as in TokenizedExample."""
    is_visual: Tensor
    """bool [T]"""
    crops: Tensor
    """uint8 [C, P, D] of all prompts, in order."""
    pooling: Tensor
    """int64 [V, K] indices into the C * P patches of all prompts; row v feeds the v-th <im_patch>."""

    def __post_init__(self) -> None:
        if not self.uids:
            raise _no_prompts()
        for uid, length in zip(self.uids, self.lengths, strict=True):
            if not length:
                raise DataError(f"prompt {uid}", found="no token", expected="at least one")

    @property
    def last_tokens(self) -> Tensor:
        """int64 [B] index of each prompt's last token."""
        return torch.tensor(self.lengths).cumsum(0) - 1

    @property
    def row_of_token(self) -> Tensor:
        """int64 [T] number of each token's prompt."""
        return torch.repeat_interleave(torch.tensor(self.lengths))

    @property
    def seen_by_answer(self) -> Tensor:
        """bool [T] whether the tokens to come, which continue the branch of the last one, may attend to each token: the
        rule of message_tree/attention_rule.py.  Documents of a row ascend, so earlier ones have smaller ids."""
        return self.subsegment_ids >= self.subsegment_ids[self.last_tokens][self.row_of_token]

    @property
    def as_documents(self) -> Tensor:
        """int64 [T] subsegment ids with which the prompts form one sequence and do not see each other."""
        documents_per_row = int(self.subsegment_ids.max()) // DOCUMENT + 1
        return self.subsegment_ids + self.row_of_token * (documents_per_row * DOCUMENT)


def join_prompts(prompts: Sequence[TokenizedExample]) -> PromptBatch:
    """A batch of `prompts`, which end where their answers begin.

    Raises:
        DataError: there is no prompt, or one without a token.
    """
    if not prompts:
        raise _no_prompts()
    crops, pooling = join_visual(prompts)

    def joined(name: str) -> Tensor:
        return torch.from_numpy(np.concatenate([getattr(prompt, name) for prompt in prompts]))

    return PromptBatch(
        uids=tuple(prompt.uid for prompt in prompts),
        lengths=tuple(len(prompt.input_ids) for prompt in prompts),
        input_ids=joined("input_ids").long(),
        position_ids=joined("position_ids").long(),
        subsegment_ids=joined("subsegment_ids").long(),
        is_visual=joined("is_visual").bool(),
        crops=crops,
        pooling=pooling,
    )


def strip_padding(
    *,
    uids: Sequence[str],
    input_ids: Tensor,
    position_ids: Tensor,
    subsegment_ids: Tensor,
    is_visual: Tensor,
    crops: Tensor,
    pooling: Tensor,
) -> PromptBatch:
    """A batch from padded rows; padding may stand on either side.

    Of a batch made by transformers' processor (attention_mask, mm_token_type_ids):
    `subsegment_ids = torch.where(attention_mask == 1, ROOT, PADDING)`, `position_ids = attention_mask.cumsum(1) - 1`,
    `is_visual = mm_token_type_ids != 0`.

    Args:
        uids: one for each row.
        input_ids, position_ids: int64 [B, S].
        subsegment_ids: int64 [B, S], PADDING where there is padding.
        is_visual: bool [B, S].
        crops: uint8 [C, P, D] of all rows, in order.
        pooling: int64 [V, K], row v for the v-th <im_patch> of the batch in row-major order.

    Raises:
        DataError: there is no row, a row without a token, or shapes differ.
    """
    rows = {
        "input_ids": input_ids,
        "position_ids": position_ids,
        "subsegment_ids": subsegment_ids,
        "is_visual": is_visual,
    }
    for name, tensor in rows.items():
        if tensor.ndim != 2 or tensor.shape != subsegment_ids.shape or tensor.shape[0] != len(uids):
            raise DataError(
                f"padded prompts, {name}",
                found=f"shape {list(tensor.shape)}",
                expected=f"[{len(uids)}, longest prompt], the same for all",
            )
    is_token = subsegment_ids != PADDING
    return PromptBatch(
        uids=tuple(uids),
        lengths=tuple(is_token.sum(dim=1).tolist()),
        **{name: tensor[is_token] for name, tensor in rows.items()},
        crops=crops,
        pooling=pooling,
    )


def join_visual(prompts: Sequence[TokenizedExample]) -> tuple[Tensor, Tensor]:
    """All crops [C, P, D] and, with indices moved accordingly, all pooling rows [V, K]."""
    pooling, num_patches = [], 0
    for prompt in prompts:
        pooling.append(np.where(prompt.pooling == PADDING, PADDING, prompt.pooling + num_patches))
        num_patches += prompt.crops.shape[0] * prompt.crops.shape[1]
    crops = np.concatenate([prompt.crops for prompt in prompts])
    return torch.from_numpy(crops), torch.from_numpy(np.concatenate(pooling).astype(np.int64))


def _no_prompts() -> DataError:
    return DataError("prompts to answer", found="none", expected="at least one")
