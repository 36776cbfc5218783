"""Pack plan (+ the checkpoint of the stage before) -> checkpoint.  See README.md."""

from kfp import dsl

from components.images import IMAGES


@dsl.component(base_image=IMAGES["train"], install_kfp_package=False)
def train(
    section: str,
    plan: dsl.Input[dsl.Artifact],
    checkpoint: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
    base: dsl.Input[dsl.Model] = None,
):
    """Write the CheckpointRef of the section's training stage."""
    from pathlib import Path

    from molmo2core.errors import message_first
    from molmo2core.recipe.load import from_json
    from molmo2core.recipe.sections import TrainSection
    from molmo2core.stages import train as stage

    with message_first():
        report = stage.run(
            from_json(section, TrainSection),
            plan=Path(plan.path),
            base=Path(base.path) if base else None,
            output=Path(checkpoint.path),
        )
    for name, value in report.finite_metrics().items():
        metrics.log_metric(name, value)
