"""AdamW with a learning rate per part of the model (training_and_evaluation.md 1.3)."""

from __future__ import annotations

import math

import torch
from torch import nn

from molmo2core.model.molmo2 import group_of_parameter
from molmo2core.training.config import GroupSchedule, OptimizerConfig

GROUPS = ("vision_encoder", "connector", "decoder")


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over the trained parameters of a Molmo2, in named groups; learning rates are set at each step.

    Parameters are in the order of their names, and groups without any are left out.  One fused kernel does a
    step, which torch has for CPUs and for GPUs.
    """
    parameters: dict[str, list[nn.Parameter]] = {name: [] for name in GROUPS}
    for name, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad:
            parameters[group_of_parameter(name)].append(parameter)
    return torch.optim.AdamW(
        [{"params": parameters[name], "name": name} for name in GROUPS if parameters[name]],
        lr=0.0,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )


def learning_rate(schedule: GroupSchedule, *, step: int, steps: int, final_fraction: float) -> float:
    """Learning rate of the `step`-th update of `steps`, counted from 1.

    Linear warm-up from 0 (so the first update already moves), then a cosine that starts where this group's own
    warm-up ends and reaches `final_fraction` at the last step.
    """
    if step < schedule.warmup_steps:
        return schedule.learning_rate * step / schedule.warmup_steps
    progress = (step - schedule.warmup_steps) / max(steps - schedule.warmup_steps, 1)
    cosine = (1 + math.cos(math.pi * progress)) / 2
    return schedule.learning_rate * (final_fraction + (1 - final_fraction) * cosine)
