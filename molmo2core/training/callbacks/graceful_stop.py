"""Ends training with a checkpoint when asked to stop."""

from __future__ import annotations

import signal
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from composer import Callback
from composer.utils import dist

if TYPE_CHECKING:
    from composer import Logger, State


class GracefulStop(Callback):  # type: ignore[misc]
    """After SIGTERM or SIGINT on any rank, all ranks finish the step, save and return from `fit`.

    Composer's own handler exits at once, without a checkpoint.
    """

    def __init__(self) -> None:
        self.asked = False
        """On this rank."""
        self.stopped = False
        self._before: dict[signal.Signals, Any] = {}

    def fit_start(self, state: State, logger: Logger) -> None:
        """Handlers are set here, because Composer sets its own when it is constructed."""

        def remember(number: int, frame: FrameType | None) -> None:
            self.asked = True

        self._before = {number: signal.signal(number, remember) for number in (signal.SIGTERM, signal.SIGINT)}

    def close(self, state: State, logger: Logger) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def batch_end(self, state: State, logger: Logger) -> None:
        """Agree with the other ranks; the checkpoint saver runs after this event and saves at the end of training."""
        asked = self.asked
        if dist.get_world_size() > 1:
            flag = state.device.tensor_to_device(torch.tensor([int(asked)], dtype=torch.uint8))
            dist.all_reduce(flag, reduce_operation="MAX")
            asked = bool(flag.item())
        if asked:
            self.stopped = True
            state.stop_training()
