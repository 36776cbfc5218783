"""The whole recipe: one frozen dataclass that composes the config classes of the parts.

A recipe file is strict YAML of exactly this shape (recipe/load.py).  Values on which the description of the system,
the paper and the published code disagree stand in the tree as described, and beside each other in `alternatives`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal

from molmo2core.checkpoints.config import ExportConfig, InitialWeights
from molmo2core.evaluation.config import EvaluationConfig
from molmo2core.manifest.config import DataConfig
from molmo2core.model.config import Size
from molmo2core.packing.config import PackingConfig
from molmo2core.preprocessing.config import PreprocessingConfig
from molmo2core.shards.config import ShardsConfig
from molmo2core.shards.mixture import MixtureGroup
from molmo2core.tracking.config import TrackingConfig
from molmo2core.training.config import TrainingConfig

Profile = Literal["described", "released_code"]
StepName = Literal["validate_data", "plan_packs", "train", "export_checkpoint", "evaluate"]


@dataclass(frozen=True, kw_only=True)
class ModelRecipe:
    """Which Molmo2, and what it starts from."""

    size: Size
    tokenizer: str
    """Folder with `tokenizer.json` (in the workspace, absolute, `s3://`) or `hf://name`."""
    initialize_from: InitialWeights = field(default_factory=InitialWeights)


@dataclass(frozen=True, kw_only=True)
class StageRecipe(TrainingConfig):
    """One training stage: what is drawn, how it is packed, and the fields of TrainingConfig."""

    mixture: dict[str, MixtureGroup]
    packing: PackingConfig
    preprocessing: PreprocessingConfig

    @property
    def training(self) -> TrainingConfig:
        """The fields of TrainingConfig alone."""
        return TrainingConfig(**{f.name: getattr(self, f.name) for f in fields(TrainingConfig)})


@dataclass(frozen=True, kw_only=True)
class TrainRecipe:
    """The three stages, each starting from the weights of the one before."""

    pretrain: StageRecipe
    sft: StageRecipe
    long_context: StageRecipe


@dataclass(frozen=True, kw_only=True)
class StepResources:
    """What one pod of a pipeline step asks for.  Ignored by the local runner."""

    cpus: int = 2
    memory: str = "8Gi"
    """Kubernetes quantity."""
    gpus: int = 0
    """Read for `train` and `evaluate` only."""
    gpu_gigabytes: float = 0.0
    """Memory of one GPU in 1e9 bytes, read for `train` only; 0: unknown.  Resolving warns of stages that need more
    (recipe/memory.py)."""


@dataclass(frozen=True, kw_only=True)
class Alternative:
    """One value on which the sources disagree.  `described` is the value in the recipe's tree."""

    described: Any
    released_code: Any
    """The published training code's value; takes the place of `described` in profile `released_code`."""
    paper: Any = None
    """The paper's value, where it prints one."""
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that one run of the workflow depends on."""

    name: str
    description: str = ""
    profile: Profile = "described"
    """Which side of `alternatives` applies."""
    seed: int
    workspace: str
    """Local folder or `s3://` prefix that everything is written below."""
    data: DataConfig
    model: ModelRecipe
    shards: ShardsConfig = field(default_factory=ShardsConfig)
    train: TrainRecipe
    export: ExportConfig = field(default_factory=ExportConfig)
    evaluate: EvaluationConfig
    register: TrackingConfig = field(default_factory=TrackingConfig)
    resources: dict[StepName, StepResources] = field(default_factory=dict)
    alternatives: dict[str, Alternative] = field(default_factory=dict)
    """Dotted path into this tree -> the values that the sources give."""
    not_reproduced: dict[str, str] = field(default_factory=dict)
    """Further differences of the published code, which no profile of this version reproduces: topic -> difference."""
