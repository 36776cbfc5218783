"""The table at the end of a local run, read from the references that the steps left."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from molmo2core.errors import DataError
from molmo2core.recipe.schema import Recipe
from molmo2core.references import EvaluationRef, ManifestsRef, ModelVersionRef, Reference, read_reference
from molmo2core.storage import join
from molmo2core.tracking.mlflow_run import tracking_uri, ui_command

_ORDER = ("validate_data", "build_shards", "plan_packs", "train", "export_checkpoint", "evaluate", "register_model")
_SHOWN = ("examples_per_pack", "token_fill", "steps", "tokens", "first_loss", "last_loss", "logit_diff", "promoted")
"""Metrics of a stage that the table shows, by what their names begin with; everything else is in the references."""


def read_references(run_folder: Path) -> list[Reference]:
    """Every reference that the tasks of one local run wrote, in the order of the stages."""
    references = []
    for path in sorted(run_folder.rglob("*")):
        if path.is_file() and path.name != "executor_output.json" and path.suffix != ".html":
            try:
                references.append(read_reference(path, Reference))
            except (DataError, UnicodeDecodeError):
                continue  # a parameter or a page, no reference
    return sorted(references, key=_position)


def closing_lines(references: Sequence[Reference], recipe: Recipe, *, seconds: float, peak_bytes: int) -> list[str]:
    """Everything a user wants to know when a run has ended."""
    lines = ["", *_stage_table(references), f"{'all':<28}{seconds:>8.1f} s   peak memory {peak_bytes / 2**30:.1f} GiB"]
    for reference in references:
        if isinstance(reference, EvaluationRef):
            lines += ["", *_metrics_table(reference), "", *_verdict(reference)]
    for reference in references:
        if isinstance(reference, ModelVersionRef):
            lines.append(
                f"registered: {reference.name} version {reference.version}, "
                f"{'alias ' + ', '.join(reference.aliases) if reference.aliases else 'no alias'}"
            )
    lines += ["", *_places(references, recipe)]
    return lines


def _position(reference: Reference) -> tuple[int, str]:
    """Place of a reference's stage in the workflow; the training stages of a kind stay in their own order."""
    stage, _, detail = reference.report.get("stage", "").partition(".")
    ranks = {"pretrain": "0", "sft": "1", "long_context": "2"}
    known = stage in _ORDER
    return (
        _ORDER.index(stage) if known else len(_ORDER),
        ranks.get(detail, detail) if known else type(reference).__name__,
    )


def _stage_table(references: Iterable[Reference]) -> list[str]:
    lines = [f"{'stage':<28}{'time':>10}   {'':<7} "]
    for reference in references:
        report = reference.report
        numbers = "  ".join(
            f"{name} {_number(value)}" for name, value in report.get("metrics", {}).items() if name.startswith(_SHOWN)
        )
        how = "reused" if report.get("reused") else "made"
        stage = report.get("stage", type(reference).__name__)
        lines.append(f"{stage:<28}{report.get('seconds', 0.0):>8.1f} s   {how:<7} {numbers}".rstrip())
    return lines


def _metrics_table(evaluation: EvaluationRef) -> list[str]:
    lines = [f"{'held-out metric':<40}{'model':>10}{'blind':>10}"]
    for name in sorted(evaluation.metrics):
        blind = evaluation.blind_metrics.get(name)
        lines.append(f"{name:<40}{evaluation.metrics[name]:>10.3f}{'-' if blind is None else f'{blind:.3f}':>10}")
    return lines


def _verdict(evaluation: EvaluationRef) -> list[str]:
    if evaluation.passed:
        return ["gate: passed"]
    return ["gate: refused", *(f"  {reason}" for reason in evaluation.reasons)]


def _places(references: Iterable[Reference], recipe: Recipe) -> list[str]:
    lines = []
    for reference in references:
        if isinstance(reference, ManifestsRef):
            lines.append(f"Data Docs:   {join(reference.uri, 'data_docs', 'index.html')}")
        if isinstance(reference, EvaluationRef):
            lines.append(f"report:      {join(reference.uri, 'report.html')}")
    lines.append(f"MLflow UI:   {ui_command(tracking_uri(recipe.register, recipe.workspace))}")
    return lines


def _number(value: float) -> str:
    return json.dumps(int(value)) if float(value).is_integer() and abs(value) < 1e15 else f"{value:.3g}"
