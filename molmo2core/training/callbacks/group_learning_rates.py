"""Sets each parameter group's learning rate, and what of AdamW is the recipe's."""

from __future__ import annotations

from typing import TYPE_CHECKING

from composer import Callback

from molmo2core.training.config import OptimizerConfig
from molmo2core.training.optimizer import learning_rate

if TYPE_CHECKING:
    from composer import Logger, State


class GroupLearningRates(Callback):  # type: ignore[misc]
    """Stateless, from the step number alone.

    Composer's own schedulers know one multiplier for all groups and lag one batch behind, so that warm-up from 0
    would spend two updates at 0.
    """

    def __init__(self, config: OptimizerConfig, steps: int) -> None:
        self.config, self.steps = config, steps

    def fit_start(self, state: State, logger: Logger) -> None:
        """With a checkpoint's moments come the constants of whoever saved it: another recipe, after `resume_from`."""
        config = self.config
        for group in state.optimizers[0].param_groups:
            group |= {"betas": config.betas, "eps": config.eps, "weight_decay": config.weight_decay}

    def batch_start(self, state: State, logger: Logger) -> None:
        """Before the update numbered one more than the updates done."""
        step = int(state.timestamp.batch.value) + 1
        for group in state.optimizers[0].param_groups:
            group["lr"] = learning_rate(
                getattr(self.config, group["name"]),
                step=step,
                steps=self.steps,
                final_fraction=self.config.final_fraction,
            )
