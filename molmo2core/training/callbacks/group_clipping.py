"""Clips gradients; step_guard.py refuses those that are not finite."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from composer.core import Algorithm, Event
from torch.distributed.tensor import DTensor

if TYPE_CHECKING:
    from composer import Logger, State


class GroupClipping(Algorithm):  # type: ignore[misc]
    """Scales each parameter group's gradient to at most `max_norm`; `norms` holds the norms before scaling.

    Composer's own clipping is over all parameters at once (training_and_evaluation.md 1.3).
    """

    def __init__(self, max_norm: float) -> None:
        self.max_norm = max_norm
        self.norms: dict[str, float] = {}

    def match(self, event: Event, state: State) -> bool:
        """Between backward and update."""
        return bool(event == Event.AFTER_TRAIN_BATCH)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Clip.  Norms are global, so all ranks know the same; a group without any gradient has none."""
        norms = {}
        for group in state.optimizers[0].param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if parameters:
                norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters])
                torch.nn.utils.clip_grads_with_norm_(parameters, self.max_norm, norm)
                norms[group["name"]] = norm
        self.norms = {
            name: float(norm.full_tensor() if isinstance(norm, DTensor) else norm) for name, norm in norms.items()
        }
