"""Validated manifest of one dataset -> MDS shards.  See README.md."""

from kfp import dsl

from components.images import IMAGES


@dsl.component(base_image=IMAGES["data"], install_kfp_package=False)
def build_shards(
    section: str,
    dataset: str,
    manifests: dsl.Input[dsl.Artifact],
    shards: dsl.Output[dsl.Dataset],
    metrics: dsl.Output[dsl.Metrics],
):
    """Write the ShardsRef of `dataset`."""
    from pathlib import Path

    from molmo2core.errors import message_first
    from molmo2core.recipe.load import from_json
    from molmo2core.recipe.sections import ShardSection
    from molmo2core.stages import shard

    with message_first():
        report = shard.run(
            from_json(section, ShardSection),
            manifests=Path(manifests.path),
            dataset=dataset,
            output=Path(shards.path),
        )
    for name, value in report.finite_metrics().items():
        metrics.log_metric(name, value)
