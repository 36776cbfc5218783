"""What each pipeline step receives: one frozen section per stage, cut from the recipe by `stages.resolve`.

Sections travel to components as JSON strings (`to_json`, `from_json` in recipe/load.py).  `workspace` is a local
folder or an `s3://` prefix; every stage writes below it, into folders named by content.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from molmo2core.checkpoints.config import ExportConfig, InitialWeights
from molmo2core.evaluation.config import EvaluationConfig
from molmo2core.manifest.config import DataConfig
from molmo2core.model.config import ModelConfig
from molmo2core.packing.config import PackingConfig
from molmo2core.preprocessing.config import PreprocessingConfig, VisualGeometry
from molmo2core.shards.config import ShardsConfig
from molmo2core.shards.mixture import MixtureGroup
from molmo2core.tracking.config import TrackingConfig
from molmo2core.training.config import TrainingConfig

StageName = Literal["pretrain", "sft", "long_context"]
STAGE_NAMES: tuple[StageName, ...] = ("pretrain", "sft", "long_context")


@dataclass(frozen=True, kw_only=True)
class ValidateSection:
    """For stages.validate."""

    workspace: str
    data: DataConfig
    preprocessing_limits: PreprocessingConfig
    """The widest limits of any training stage: what a row that is trained on must fit into."""
    evaluation_limits: PreprocessingConfig
    """What a row of another split must fit into."""


@dataclass(frozen=True, kw_only=True)
class ShardSection:
    """For stages.shard."""

    workspace: str
    shards: ShardsConfig
    tokenizer: str


@dataclass(frozen=True, kw_only=True)
class PlanSection:
    """For stages.plan."""

    workspace: str
    stage: StageName
    seed: int
    mixture: dict[str, MixtureGroup]
    packing: PackingConfig
    preprocessing: PreprocessingConfig
    geometry: VisualGeometry
    num_packs: int
    """Steps times global batch."""


@dataclass(frozen=True, kw_only=True)
class TrainSection:
    """For stages.train."""

    workspace: str
    stage: StageName
    run_name: str
    seed: int
    recipe_fingerprint: str
    model: ModelConfig
    tokenizer: str
    initial_weights: InitialWeights
    packing: PackingConfig
    preprocessing: PreprocessingConfig
    training: TrainingConfig
    tracking: TrackingConfig


@dataclass(frozen=True, kw_only=True)
class ExportSection:
    """For stages.export."""

    workspace: str
    tokenizer: str
    export: ExportConfig
    preprocessing: PreprocessingConfig
    """Limits written into the processor files."""
    initial_weights: InitialWeights = field(default_factory=InitialWeights)
    """Named on the model card."""


@dataclass(frozen=True, kw_only=True)
class EvaluateSection:
    """For stages.evaluate."""

    workspace: str
    evaluation: EvaluationConfig


@dataclass(frozen=True, kw_only=True)
class RegisterSection:
    """For stages.register."""

    workspace: str
    run_name: str
    recipe_fingerprint: str
    recipe_yaml: str
    """The resolved recipe, logged with the model version."""
    tracking: TrackingConfig
