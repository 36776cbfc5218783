"""Stops training whose loss is no longer a number."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from composer import Callback

from molmo2core.errors import RecipeError

if TYPE_CHECKING:
    from composer import Logger, State


class FiniteLoss(Callback):  # type: ignore[misc]
    """Looks at the loss of all ranks, so that all stop at once.

    Composer's NaNMonitor looks at each rank's own and leaves the others hanging in a collective.
    """

    def batch_end(self, state: State, logger: Logger) -> None:
        """Before the checkpoint of this step is saved.

        Raises:
            RecipeError: the loss is not finite.
        """
        for name, value in state.total_loss_dict.items():
            if not math.isfinite(value):
                raise RecipeError(
                    f"training step {int(state.timestamp.batch.value)}",
                    found=f"{name} = {value}",
                    expected="a finite loss",
                    mend="lower the learning rates; the last checkpoint before this step is whole",
                )
