"""One training stage: optimizer, schedule, batch, checkpoints (training_and_evaluation.md 1).  Torch-free."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from typing import Literal

from molmo2core.errors import RecipeError
from molmo2core.examples import Split
from molmo2core.message_tree.config import Weighting
from molmo2core.model.config import AttentionBackend

COLLECTIVE_SECONDS = 1800.0
"""How long ranks wait for each other before they give up."""


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
class TrainableParts:
    """What is trained: every parameter of the model is in one of these parts (training_and_evaluation.md 1.4).

    A frozen part has no gradient and no optimizer state.  A tied model has one matrix for `input_embedding` and
    `output_head`, which must then agree.
    """

    input_embedding: bool = True
    """Of the base vocabulary."""
    output_head: bool = True
    final_norm: bool = True
    vision_encoder: bool = True
    connector: bool = True
    """With the new-token embedding, which learns at its rate."""
    decoder: bool = True
    """The blocks."""


LowRankPart = Literal["decoder_attention", "decoder_mlp", "vision_encoder", "connector"]
"""A set of matrices that adapters are added to; its weights belong to the part of TrainableParts that it names."""


@dataclass(frozen=True, kw_only=True)
class LowRankConfig:
    """LoRA (Hu et al. 2021, arXiv 2106.09685): frozen matrices get a trained update of low rank, `alpha / rank * B A`.

    No dropout of its own: dropout of residual branches covers the adapted ones too.
    """

    parts: tuple[LowRankPart, ...] = ("decoder_attention", "decoder_mlp")
    """Matrices with adapters.  The parts that they belong to must be frozen themselves."""
    rank: int = 16
    alpha: float = 32.0


ShardingPrecision = Literal["full", "mixed", "pure"]


@dataclass(frozen=True, kw_only=True)
class ShardingConfig:
    """How FSDP2 shards parameters and optimizer state, always over all ranks; nothing to a single process."""

    precision: ShardingPrecision = "full"
    """In what blocks are gathered, and gradients of ranks added up: `full` float32 and float32, `mixed` bfloat16 and
    float32, `pure` bfloat16 and bfloat16 (training_and_evaluation.md 1.1).  Shards themselves are float32 in all."""
    reshard_after_forward: bool = True
    """Free a gathered block after its forward pass and gather it again for its backward pass; else keep it."""
    reduce_every_pass: bool = True
    """Add gradients of ranks up after every pass; else after the last of a step, which exchanges less and keeps whole
    gradients of trained parameters on every rank, between passes in the precision that they are added up in."""


@dataclass(frozen=True, kw_only=True)
class CheckpointedActivations:
    """Which blocks keep their inputs alone for the backward pass and compute the rest again (1.7)."""

    vision_encoder: int = 0
    """Every n-th block; 0 is none."""
    connector: bool = False
    decoder: int = 0
    """Every n-th block; 0 is none."""
    on_host: bool = False
    """Keep these inputs in the host's pinned memory instead of the GPU's, at the cost of two copies; not run on a GPU
    yet."""


@dataclass(frozen=True, kw_only=True)
class SpikeGuardConfig:
    """When training ends because its loss has jumped up (composer_streaming.md 6).  Other steps are never touched."""

    window: int = 100
    """Steps whose mean loss is the measure; spikes are left out of it.  Before so many, there is no guard."""
    factor: float = 2.0
    """A loss of so many times the mean is a spike."""
    least_rise: float = 0.5
    """If it is also so much above the mean, in nats: next to a loss of 0, noise is many times the mean."""
    patience: int = 4
    """Spikes one after the other that end training; 0 is none."""


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """What is looked at on held-out examples while training goes on.  It never changes the weights."""

    interval_steps: int = 0
    """Steps between losses on held-out examples (the last step is one of them); 0 is never."""
    examples_per_dataset: int = 64
    """The first so many held-out examples of each dataset that is drawn: the same ones each time."""
    generation_interval_steps: int = 0
    """Steps between answers that are written down, with points drawn: a multiple of `interval_steps`; 0 is never."""
    generations_per_task: int = 4
    """Held-out questions of each task: the same ones each time."""
    max_new_tokens: int = 256
    """Of an answer."""
    split: Split = "validation"


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """One training stage.  A global batch is `global_batch_packs` packed sequences."""

    steps: int
    global_batch_packs: int
    optimizer: OptimizerConfig
    weighting: Weighting
    z_loss: float = 1e-4
    dropout: DropoutConfig = field(default_factory=DropoutConfig)
    trainable: TrainableParts = field(default_factory=TrainableParts)
    low_rank: LowRankConfig | None = None
    """Adapters, merged into the weights when the stage ends."""
    precision: str = "fp32"
    """`fp32` or `amp_bf16`."""
    attention: AttentionBackend = "auto"
    """What computes attention; all backends give the same (model/attention.py)."""
    sharding: ShardingConfig = field(default_factory=ShardingConfig)
    activation_checkpointing: CheckpointedActivations = field(default_factory=CheckpointedActivations)
    compile: bool = False
    """Compile the blocks of vision encoder and decoder, and pad sequences to `packing.sequence_tokens`."""
    save_interval_steps: int
    """Steps between checkpoints to resume from."""
    checkpoints_kept: int = 2
    """The newest so many stay; while one is saved, there is one more."""
    keep_every_steps: int = 0
    """Checkpoints of the steps that this divides stay for ever, also when the stage is done; 0 is none."""
    failed_saves_allowed: int = 3
    """Saves that may fail one after the other; then training ends."""
    num_processes: int = 1
    """Processes (GPUs) per node."""
    num_nodes: int = 1
    context_parallel: int = 1
    """Ranks that share one sequence (Ulysses)."""
    verify_shared_packs: bool = False
    """Compare a hash of each pack over the ranks that share it: to find broken machines, at some cost."""
    loader_workers: int = 0
    """Loader processes per rank."""
    resume_from: str = ""
    """Key of an unfinished training of this stage (its folder is `<key>.resume`) to go on from instead of step 0: with
    other settings, another number of processes, or a longer plan."""
    accept_changed_data: bool = False
    """Go on from `resume_from` although data, mixture or limits are not the same: from the same position in the new
    plan.  What changed is recorded."""
    log_interval_steps: int = 10
    """Steps between printed lines and between points in MLflow.  The metrics file has every step."""
    spike_guard: SpikeGuardConfig = field(default_factory=SpikeGuardConfig)
    peak_teraflops: float = 0.0
    """What MFU is a share of: operations of one GPU in 1e12 per second; 0 takes the known GPUs' (training/flops.py)."""
    validation: ValidationConfig = field(default_factory=ValidationConfig)
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


def check_trained_parts(config: TrainingConfig, *, tied: bool, where: str = "training") -> None:
    """Whether `trainable` and `low_rank` say something that can be done.

    Args:
        tied: whether the output head is the input embedding.
        where: the place that errors name.

    Raises:
        RecipeError: a tied matrix frozen and trained at once, a part trained and adapted at once, a rank or scale that
            is none, or nothing to train.
    """
    parts, low_rank = config.trainable, config.low_rank
    if tied and parts.input_embedding != parts.output_head:
        raise RecipeError(
            f"{where}.trainable",
            found=f"input_embedding {_shown(parts.input_embedding)} with output_head {_shown(parts.output_head)}",
            expected="the same for both: in this model they are one matrix",
            mend="set both",
        )
    if low_rank is None:
        if not any(getattr(parts, part.name) for part in fields(parts)):
            raise RecipeError(
                f"{where}.trainable",
                found="every part is frozen",
                expected="something to train",
                mend="train a part, add low_rank, or set steps to 0",
            )
        return
    for name, holds, expected in (
        ("rank", low_rank.rank >= 1, "1 or more"),
        ("alpha", low_rank.alpha > 0, "more than 0"),
        ("parts", bool(low_rank.parts), "at least one"),
        ("parts", len(set(low_rank.parts)) == len(low_rank.parts), "each once"),
    ):
        if not holds:
            raise RecipeError(
                f"{where}.low_rank.{name}", found=_shown(getattr(low_rank, name)), expected=expected, mend=""
            )
    for part in low_rank.parts:
        owner = part.partition("_")[0] if part.startswith("decoder_") else part
        if getattr(parts, owner):
            raise RecipeError(
                f"{where}.low_rank.parts",
                found=f"{part} with trainable.{owner} true",
                expected="a part that is either adapted or trained itself",
                mend=f"set trainable.{owner} to false, or take {part} out of low_rank.parts",
            )


def _shown(value: object) -> str:
    return json.dumps(value)
