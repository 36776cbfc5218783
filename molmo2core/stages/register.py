"""Step 7: the evaluated model becomes an MLflow model version with its lineage, and champion if the gate passed."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from molmo2core import storage
from molmo2core.errors import DataError, exit_with_message
from molmo2core.recipe.load import from_json
from molmo2core.recipe.sections import RegisterSection
from molmo2core.references import EvaluationRef, ExportRef, ModelVersionRef, read_reference, write_reference
from molmo2core.stages.evaluate import PAGE, REPORT
from molmo2core.stages.report import StageReport

if TYPE_CHECKING:
    from molmo2core.tracking.mlflow_run import TrackedRun
    from molmo2core.tracking.registry import Registry

FORMAT = "register-1"
SERVED_CODE = Path(__file__).parents[1] / "evaluation" / "served_model.py"
"""What MLflow stores with a version and runs to load it."""


def run(section: RegisterSection, *, evaluation: Path, output: Path) -> StageReport:
    """Register the model that `evaluation` judged; a refused one becomes candidate and keeps the reasons as tags.

    The key is the evaluation's content and the recipe: run again, also after being killed anywhere, this finds what
    is there, completes it and makes nothing twice.

    Args:
        section: tracking store and registered model.
        evaluation: an EvaluationRef; everything else comes from its ancestors.
        output: the ModelVersionRef is written here.

    Raises:
        DataError: the evaluation has no export behind it, or the promotion ledger was altered.
        PlatformError: the tracking store failed.
    """
    from molmo2core.tracking.mlflow_run import tracking_uri, ui_command
    from molmo2core.tracking.registry import open_registry

    started = time.monotonic()
    evaluated = read_reference(evaluation, EvaluationRef)
    key = f"register-{storage.content_key(FORMAT, evaluated.digest, section.recipe_fingerprint)}"
    uri = tracking_uri(section.tracking, section.workspace)
    registry = open_registry(uri, section.tracking.model_name, section.workspace)
    known = registry.find_version(key)
    reused = known is not None and registry.is_decided(known)
    version = known if known is not None and reused else _register(section, evaluated, registry, key, uri)
    if reused:
        registry.reconcile()
    aliases = registry.aliases_of(version)
    seconds = time.monotonic() - started
    decision = "promoted" if evaluated.passed else f"not promoted: {'; '.join(evaluated.reasons)}"
    report = StageReport(
        stage="register_model",
        seconds=seconds,
        reused=reused,
        metrics={"promoted": float(evaluated.passed)},
        lines=(
            f"{registry.name} version {version}, alias {', '.join(aliases) or '(none)'}; {decision}",
            f"MLflow: {ui_command(uri)}",
            f"report: {storage.join(evaluated.uri, PAGE)}",
        ),
    )
    write_reference(
        ModelVersionRef(
            uri=f"models:/{registry.name}/{version}",
            digest=storage.content_key(registry.name, version, key),
            facts={"tracking_uri": uri, "promoted": evaluated.passed},
            report=report.to_json(),
            parents=(evaluated,),
            name=registry.name,
            version=version,
            aliases=aliases,
        ),
        output,
    )
    print(f"register_model: {'reused' if reused else 'made'} models:/{registry.name}/{version} in {seconds:.1f} s")
    return report


def _register(section: RegisterSection, evaluated: EvaluationRef, registry: Registry, key: str, uri: str) -> str:
    """Log, register, decide; every step is safe to repeat."""
    from molmo2core.tracking.mlflow_run import open_run

    export = next((ref for ref in evaluated.ancestors() if isinstance(ref, ExportRef)), None)
    if export is None:
        raise DataError(evaluated.uri, found="an evaluation without an export behind it", mend="evaluate again")
    export_uri = export.uri if storage.is_remote(export.uri) else os.path.abspath(export.uri)
    checkpoint = {
        "uri": export_uri,
        "digest": export.digest,
        "preprocessing": _evaluated_preprocessing(evaluated),
    }
    tags = {
        "recipe_fingerprint": section.recipe_fingerprint,
        "checkpoint.uri": export_uri,
        "checkpoint.sha256": export.digest,
        "evaluation.uri": evaluated.uri,
        "evaluation.sha256": evaluated.digest,
    }
    with open_run(uri, section.tracking.experiment, f"{section.run_name}-register", key, tags) as run:
        _log_lineage(run, section, evaluated)
        blind = {f"blind/{name}": value for name, value in evaluated.blind_metrics.items()}
        run.log_metrics(blind, export.step)
        version = registry.register_version(
            run,
            key=key,
            code=SERVED_CODE,
            checkpoint=checkpoint,
            metrics=evaluated.metrics,
            step=export.step,
            tags=tags,
        )
        registry.set_candidate(version)
        if evaluated.passed:
            registry.promote(version, key=key, reason="every rule of the gate is met")
        else:
            registry.refuse(version, "; ".join(evaluated.reasons))
        run.set_tags({"model_version": version})
    return version


def _log_lineage(run: TrackedRun, section: RegisterSection, evaluated: EvaluationRef) -> None:
    """Parameters, datasets by digest, recipe, lineage and report of the run."""
    from molmo2core.tracking.lineage import checkpoints_of, datasets_of, lineage_mermaid, lineage_text

    checkpoints = checkpoints_of(evaluated)
    run.log_params(
        {"recipe_fingerprint": section.recipe_fingerprint}
        | {f"{ref.stage}.step": ref.step for ref in checkpoints}
        | {f"{ref.stage}.checkpoint": ref.digest for ref in checkpoints}
        | {
            f"{ref.stage}.data_changed_at_step": ref.facts["data_changed_at_step"]
            for ref in checkpoints
            if "data_changed_at_step" in ref.facts
        }
        | _recipe_params(section.recipe_yaml)
    )
    for use in datasets_of(evaluated):
        samples = {f"samples.{split}": str(count) for split, count in use.samples.items()}
        run.log_dataset(use.name, use.digest, use.uri, use.context, samples)
    run.log_text(section.recipe_yaml, "recipe.yaml")
    run.log_text(lineage_text(evaluated), "lineage.txt")
    run.log_text(lineage_mermaid(evaluated), "lineage.mmd")
    with tempfile.TemporaryDirectory() as folder:
        for name in (PAGE, REPORT):
            run.log_artifact(storage.download(storage.join(evaluated.uri, name), Path(folder) / name), "evaluation")


def _recipe_params(recipe_yaml: str) -> dict[str, object]:
    """Settings by which people compare runs; the whole recipe is an artifact."""
    recipe: dict[str, Any] = yaml.safe_load(recipe_yaml) or {}
    model = recipe.get("model", {})
    found: dict[str, object] = {"seed": recipe.get("seed"), "model.size": model.get("size")}
    return {name: value for name, value in found.items() if value is not None}


def _evaluated_preprocessing(evaluated: EvaluationRef) -> dict[str, Any]:
    """The limits under which the model was judged: it is served under the same."""
    report = json.loads(storage.read_bytes(storage.join(evaluated.uri, REPORT)))
    preprocessing: dict[str, Any] = report["evaluation"]["preprocessing"]
    return preprocessing


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m molmo2core.stages.register --section S --evaluation REF --output REF`."""
    parser = argparse.ArgumentParser(prog="python -m molmo2core.stages.register", description=__doc__)
    parser.add_argument("--section", type=Path, required=True, help="JSON file of a RegisterSection")
    parser.add_argument("--evaluation", type=Path, required=True, help="JSON file of an EvaluationRef")
    parser.add_argument("--output", type=Path, required=True, help="where the ModelVersionRef is written")
    options = parser.parse_args(arguments)
    try:
        section = from_json(storage.read_bytes(str(options.section)).decode(), RegisterSection)
        run(section, evaluation=options.evaluation, output=options.output)
    except Exception as error:
        return exit_with_message(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
