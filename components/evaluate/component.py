"""Exported model + shards -> metrics, HTML report, gate verdict.  See README.md."""

from typing import List  # noqa: UP035

from kfp import dsl

from components.images import IMAGES


@dsl.component(base_image=IMAGES["eval"], install_kfp_package=False)
def evaluate(
    section: str,
    exported: dsl.Input[dsl.Model],
    shards: dsl.Input[List[dsl.Dataset]],  # noqa: UP006
    evaluation: dsl.Output[dsl.Artifact],
    report: dsl.Output[dsl.HTML],
    metrics: dsl.Output[dsl.Metrics],
):
    """Write the EvaluationRef and a copy of the HTML report."""
    from pathlib import Path

    from molmo2core.errors import message_first
    from molmo2core.recipe.load import from_json
    from molmo2core.recipe.sections import EvaluateSection
    from molmo2core.stages import evaluate as stage

    with message_first():
        result = stage.run(
            from_json(section, EvaluateSection),
            exported=Path(exported.path),
            shards=[Path(reference.path) for reference in shards],
            output=Path(evaluation.path),
            html=Path(report.path),
        )
    for name, value in result.finite_metrics().items():
        metrics.log_metric(name, value)
