"""All trained parameters at one place, from however many ranks hold them."""

from __future__ import annotations

from typing import Any

import torch
from composer.utils import dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from molmo2core.training.config import TrainingConfig
from molmo2core.training.low_rank import merge_adapters


def whole_weights(model: nn.Module, config: TrainingConfig) -> dict[str, torch.Tensor] | None:
    """Parameters on CPU, by Molmo2's names, adapters merged, on rank 0; None on other ranks.  Called by all ranks.

    Args:
        model: Composer's, sharded or not.
    """
    weights: dict[str, Any] = get_model_state_dict(
        model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    if dist.get_global_rank() != 0:
        return None
    named: dict[str, torch.Tensor] = {name.removeprefix("model."): value for name, value in weights.items()}
    return merge_adapters(named, config.low_rank) if config.low_rank is not None else named
