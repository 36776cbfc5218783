"""Adds gradients up over a step's passes before ranks exchange them."""

from __future__ import annotations

from composer import Callback, Logger, State
from torch.distributed.fsdp import FSDPModule


class LateReduction(Callback):  # type: ignore[misc]
    """FSDP reduces gradients in the last pass of a step alone, where Composer has it do so in every pass.

    Costs the memory of whole gradients on every rank (training_and_evaluation.md 8.1, row 4).
    """

    def __init__(self) -> None:
        self.passes_left = 0

    def batch_start(self, state: State, logger: Logger) -> None:
        """Equally many on all ranks."""
        self.passes_left = -(-len(state.batch["packs"]) // int(state.device_train_microbatch_size))

    def before_forward(self, state: State, logger: Logger) -> None:
        """Of each pass."""
        self.passes_left -= 1
        root = state.model.model
        assert isinstance(root, FSDPModule)
        root.set_requires_gradient_sync(self.passes_left == 0)
