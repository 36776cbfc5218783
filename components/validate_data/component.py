"""Delivered manifests and media -> validated manifests, and the list of datasets to fan out over.  See README.md."""

from typing import List  # noqa: UP035

from kfp import dsl

from components.images import IMAGES


@dsl.component(base_image=IMAGES["data"], install_kfp_package=False)
def validate_data(
    section: str,
    manifests: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
) -> List[str]:  # noqa: UP006
    """Write a ManifestsRef; return its datasets (unnamed: the local runner loops over no named list)."""
    from pathlib import Path

    from molmo2core.errors import message_first
    from molmo2core.recipe.load import from_json
    from molmo2core.recipe.sections import ValidateSection
    from molmo2core.references import ManifestsRef, read_reference
    from molmo2core.stages import validate

    with message_first():
        report = validate.run(from_json(section, ValidateSection), output=Path(manifests.path))
        datasets = read_reference(Path(manifests.path), ManifestsRef).datasets
    for name, value in report.finite_metrics().items():
        metrics.log_metric(name, value)
    return list(datasets)
