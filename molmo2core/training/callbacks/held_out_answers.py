"""Has held-out questions answered while training goes on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from composer import Callback
from composer.utils import dist

from molmo2core.model.molmo2 import Molmo2
from molmo2core.training.config import TrainingConfig
from molmo2core.training.whole_weights import whole_weights

if TYPE_CHECKING:
    from composer import Logger, State

    from molmo2core.model.config import ModelConfig


class Answerer(Protocol):
    """What is asked on rank 0 (stages.train_answers)."""

    def keep_up_to(self, step: int) -> None:
        """Remove what was written at later steps; they will be done again."""

    def answer(self, model: Molmo2, step: int) -> None:
        """Answer the questions with `model`, and write down what it said."""


class HeldOutAnswers(Callback):  # type: ignore[misc]
    """Gathers the weights on rank 0, which answers while the others wait.

    All ranks in lockstep would need no memory for a whole model, but gather every block anew for every token, may go on
    for different numbers of tokens where sums round differently, and cannot use a cache where they share sequences.
    The gathered weights are as at the end of training: a stage that can end can do this.  Where the GPU has no room for
    them beside training, there are no answers, which is said; what only looks on ends no training.

    Args:
        answerer: on rank 0.
        config: of the stage.
        model: sizes of the trained model.
    """

    def __init__(self, answerer: Answerer | None, config: TrainingConfig, model: ModelConfig) -> None:
        self.answerer, self.config, self.model = answerer, config, model

    def fit_start(self, state: State, logger: Logger) -> None:
        """As for the metrics."""
        if self.answerer is not None:
            self.answerer.keep_up_to(int(state.timestamp.batch.value))

    def eval_end(self, state: State, logger: Logger) -> None:
        """After the loss of this step, and before its checkpoint."""
        step = int(state.timestamp.batch.value)
        if step % self.config.validation.generation_interval_steps and step != self.config.steps:
            return
        weights = whole_weights(state.model, self.config)
        if weights is not None and self.answerer is not None:
            try:
                self._answer(self.answerer, weights, next(state.model.parameters()).device, step)
            except torch.OutOfMemoryError as error:
                print(f"warning: no answers at step {step}: {str(error).splitlines()[0]}", flush=True)
        dist.barrier()

    def _answer(self, answerer: Answerer, weights: dict[str, torch.Tensor], device: torch.device, step: int) -> None:
        with torch.device("meta"):
            whole = Molmo2(self.model)
        whole.load_state_dict(weights, assign=True)
        dtype = torch.bfloat16 if self.config.precision == "amp_bf16" else torch.float32
        with torch.random.fork_rng(devices=[]):
            answerer.answer(whole.to(device, dtype).eval(), step)
