"""A plan over committed shards without the stage around it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from molmo2core.packing.config import PackingConfig
from molmo2core.packing.plan import PlannedPacks, plan_packs
from molmo2core.preprocessing.config import PreprocessingConfig, VisualGeometry
from molmo2core.recipe.sections import PlanSection
from molmo2core.references import ShardsRef
from molmo2core.stages.plan import dataset_lengths


def plan_of_refs(
    refs: Sequence[ShardsRef],
    proportions: Mapping[str, float],
    *,
    packing: PackingConfig,
    num_packs: int,
    geometry: VisualGeometry,
    limits: PreprocessingConfig,
) -> PlannedPacks:
    """Packs of the training splits of `refs`, in their order."""
    section = PlanSection(
        workspace="",
        stage="sft",
        seed=0,
        mixture={},
        packing=packing,
        preprocessing=limits,
        geometry=geometry,
        num_packs=num_packs,
    )
    datasets = [dataset_lengths(ref, proportions[ref.dataset], section) for ref in refs]
    return plan_packs(datasets, packing=packing, num_packs=num_packs, seed=0)
