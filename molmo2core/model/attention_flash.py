"""Attention by flash-attn's variable-length kernel, where it is installed; CUDA, half precision.

Shape legend: B batch, S sequence, H query heads, G key/value heads, h head dimension.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from molmo2core.errors import RecipeError


def can_run(queries: Tensor) -> bool:
    """Whether flash-attn is there and takes tensors like `queries`."""
    return queries.is_cuda and queries.dtype in (torch.float16, torch.bfloat16) and _kernel() is not None


def check_installed() -> None:
    """Refuse `flash` without flash-attn.

    Raises:
        RecipeError: flash-attn cannot be imported.
    """
    if _kernel() is None:
        raise RecipeError(
            "attention: flash",
            found="no importable package flash_attn",
            expected="flash-attn 2.7 or later",
            mend="install molmo2core[flash], or set attention to auto or flex",
        )


def attend(queries: Tensor, keys: Tensor, values: Tensor, *, offsets: Tensor, longest: int, causal: bool) -> Tensor:
    """Attention within runs of the flattened batch.

    Args:
        queries: [B, S, H, h].
        keys, values: [B, S, G, h].
        offsets: int32 [runs + 1] first token of each run in [B * S], and B * S.
        longest: length of the longest run.

    Returns:
        [B, S, H, h]
    """
    flat = (x.flatten(0, 1) for x in (queries, keys, values))
    attended: Tensor = _kernel()(
        *flat,
        cu_seqlens_q=offsets,
        cu_seqlens_k=offsets,
        max_seqlen_q=longest,
        max_seqlen_k=longest,
        causal=causal,
    )
    return attended.view_as(queries)


@cache
def _kernel() -> Any:
    try:
        from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found]
    except ImportError:
        return None
    return flash_attn_varlen_func
