"""Checkpoint -> Hugging Face folder in the released format, verified by reloading.  See README.md."""

from kfp import dsl

from components.images import IMAGES


@dsl.component(base_image=IMAGES["eval"], install_kfp_package=False)
def export_checkpoint(
    section: str,
    checkpoint: dsl.Input[dsl.Model],
    exported: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
):
    """Write the ExportRef."""
    from pathlib import Path

    from molmo2core.errors import message_first
    from molmo2core.recipe.load import from_json
    from molmo2core.recipe.sections import ExportSection
    from molmo2core.stages import export

    with message_first():
        report = export.run(
            from_json(section, ExportSection),
            checkpoint=Path(checkpoint.path),
            output=Path(exported.path),
        )
    for name, value in report.finite_metrics().items():
        metrics.log_metric(name, value)
