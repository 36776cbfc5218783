"""Which attention a model uses."""

from __future__ import annotations

from functools import partial

from molmo2core.model import attention_flash
from molmo2core.model.attention import attend, attend_within_rows
from molmo2core.model.config import AttentionBackend
from molmo2core.model.decoder import DecoderAttention
from molmo2core.model.molmo2 import Molmo2
from molmo2core.model.vision_encoder import VisionBlock


def select_attention(model: Molmo2, backend: AttentionBackend) -> None:
    """Make every attention of `model` use `backend`; before parallel/context_parallel.py wraps it.

    Raises:
        RecipeError: `flash` without a CUDA device or without flash-attn.
    """
    if backend == "flash":
        attention_flash.check_installed(model.decoder.embedding.base.device)
    for module in model.modules():
        if isinstance(module, DecoderAttention):
            module.attend = partial(attend, backend=backend)
        elif isinstance(module, VisionBlock):
            module.attend = partial(attend_within_rows, backend=backend)
