"""Shards of all datasets -> the pack plan of one training stage.  See README.md."""

from typing import List  # noqa: UP035

from kfp import dsl

from components.images import IMAGES


@dsl.component(base_image=IMAGES["data"], install_kfp_package=False)
def plan_packs(
    section: str,
    shards: dsl.Input[List[dsl.Dataset]],  # noqa: UP006
    plan: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
):
    """Write the PackPlanRef of the section's training stage."""
    from pathlib import Path

    from molmo2core.errors import message_first
    from molmo2core.recipe.load import from_json
    from molmo2core.recipe.sections import PlanSection
    from molmo2core.stages import plan as stage

    with message_first():
        report = stage.run(
            from_json(section, PlanSection),
            shards=[Path(reference.path) for reference in shards],
            output=Path(plan.path),
        )
    for name, value in report.finite_metrics().items():
        metrics.log_metric(name, value)
