"""Evaluated model -> MLflow model version; `champion` if the gate passed.  See README.md."""

from kfp import dsl

from components.images import IMAGES


@dsl.component(base_image=IMAGES["eval"], install_kfp_package=False)
def register_model(
    section: str,
    evaluation: dsl.Input[dsl.Artifact],
    version: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
):
    """Write the ModelVersionRef."""
    from pathlib import Path

    from molmo2core.errors import message_first
    from molmo2core.recipe.load import from_json
    from molmo2core.recipe.sections import RegisterSection
    from molmo2core.stages import register

    with message_first():
        report = register.run(
            from_json(section, RegisterSection),
            evaluation=Path(evaluation.path),
            output=Path(version.path),
        )
    for name, value in report.finite_metrics().items():
        metrics.log_metric(name, value)
