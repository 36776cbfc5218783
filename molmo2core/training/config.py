"""One training stage: optimizer, schedule, batch, checkpoints (training_and_evaluation.md 1).  Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, field

from molmo2core.message_tree.config import Weighting
from molmo2core.model.config import AttentionBackend


@dataclass(frozen=True, kw_only=True)
class GroupSchedule:
    """Learning rate of one parameter group: linear warm-up from 0, cosine to `final_fraction` at the last step."""

    learning_rate: float
    warmup_steps: int


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with a schedule per parameter group; `connector` includes the new-token embedding."""

    vision_encoder: GroupSchedule
    connector: GroupSchedule
    decoder: GroupSchedule
    final_fraction: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-6
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    """Largest gradient norm of each group."""


@dataclass(frozen=True, kw_only=True)
class DropoutConfig:
    """Dropout of what each decoder block adds to the residual stream (training_and_evaluation.md 1.6)."""

    residual: float = 0.0
    """On tokens that predict nothing."""
    response_residual: float = 0.0
    """On tokens that predict a response token."""
    official_compat: bool = False
    """Do as the published code, where a `response_residual` of 0 spares no response: `residual` is for every token."""

    @property
    def on_responses(self) -> float:
        """What tokens that predict a response token get.

        The published code asks for its masked branch only when `response_residual` is above 0.
        """
        return self.residual if self.official_compat and not self.response_residual else self.response_residual


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """One training stage.  A global batch is `global_batch_packs` packed sequences."""

    steps: int
    global_batch_packs: int
    optimizer: OptimizerConfig
    weighting: Weighting
    z_loss: float = 1e-4
    dropout: DropoutConfig = field(default_factory=DropoutConfig)
    precision: str = "fp32"
    """`fp32` or `amp_bf16`."""
    attention: AttentionBackend = "auto"
    """What computes attention; all backends give the same (model/attention.py)."""
    save_interval_steps: int
    """Steps between checkpoints to resume from."""
    num_processes: int = 1
    """Processes (GPUs) per node."""
    num_nodes: int = 1
    context_parallel: int = 1
    """Ranks that share one sequence (Ulysses)."""
    loader_workers: int = 0
    """Loader processes per rank."""
    resume_from: str = ""
    """Key of an unfinished training of this stage (its folder is `<key>.resume`) to go on from instead of step 0: with
    other settings, another number of processes, or a longer plan."""
    accept_changed_data: bool = False
    """Go on from `resume_from` although data, mixture or limits are not the same: from the same position in the new
    plan.  What changed is recorded."""
    log_interval_steps: int = 10
    threads_per_process: int = 0
    """CPU threads per process; 0 shares the machine's cores evenly."""

    @property
    def world_size(self) -> int:
        """All ranks."""
        return self.num_processes * self.num_nodes

    @property
    def data_parallel(self) -> int:
        """Groups of ranks that see different packs."""
        return self.world_size // self.context_parallel
