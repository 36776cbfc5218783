"""Which attention a model uses."""

from __future__ import annotations

from functools import partial

import torch

from molmo2core.errors import RecipeError
from molmo2core.model import attention_flash
from molmo2core.model.attention import attend, attend_within_rows
from molmo2core.model.config import AttentionBackend
from molmo2core.model.decoder import DecoderAttention
from molmo2core.model.molmo2 import Molmo2
from molmo2core.model.vision_encoder import VisionBlock


def select_attention(model: Molmo2, backend: AttentionBackend, device: torch.device) -> None:
    """Make every attention of `model`, which will run on `device`, use `backend`.

    Called before parallel/context_parallel.py wraps attention.

    Raises:
        RecipeError: `flash` without a CUDA device or without flash-attn, `flex` without a CUDA device.
    """
    if backend in ("flex", "flash"):
        check_cuda(backend, device)
    if backend == "flash":
        attention_flash.check_installed()
    for module in model.modules():
        if isinstance(module, DecoderAttention):
            module.attend = partial(attend, backend=backend)
        elif isinstance(module, VisionBlock):
            module.attend = partial(attend_within_rows, backend=backend)


def check_cuda(backend: AttentionBackend, device: torch.device) -> None:
    """Refuse a GPU's backend elsewhere; on a CPU, FlexAttention would hold all scores.

    Raises:
        RecipeError: `device` is no CUDA device.
    """
    if device.type != "cuda":
        raise RecipeError(
            f"attention: {backend}",
            found=f"a model on {device.type}",
            expected="a CUDA device",
            mend="set attention to auto or sdpa",
        )
