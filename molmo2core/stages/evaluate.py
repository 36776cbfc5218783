"""Step 6: the exported model answers held-out questions; metrics beside the blind baseline, report, gate verdict."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from molmo2core import storage
from molmo2core.errors import exit_with_message
from molmo2core.evaluation.config import EvaluationConfig
from molmo2core.evaluation.gate import Verdict, judge
from molmo2core.evaluation.tasks import average_scores
from molmo2core.recipe.load import from_json
from molmo2core.recipe.sections import EvaluateSection
from molmo2core.references import CheckpointRef, EvaluationRef, ExportRef, ShardsRef, read_reference, write_reference
from molmo2core.stages.report import StageReport

FORMAT = "evaluation-3"
REPORT = "report.json"
PAGE = "report.html"
PREDICTIONS = "predictions.jsonl"


def run(
    section: EvaluateSection, *, exported: Path, shards: Sequence[Path], output: Path, html: Path | None
) -> StageReport:
    """Evaluate the model named by `exported` on the held-out split of `shards`, and let the gate judge it.

    A refusal is a result, not an error: the reference says `passed` false and why.

    Args:
        section: split, limits, gate.
        exported: an ExportRef.
        shards: ShardsRefs; datasets without samples in the split are left out.
        output: the EvaluationRef is written here.
        html: where a copy of the report goes.

    Raises:
        CheckpointError: the exported folder is not what it should be.
        DataError: no dataset has samples in the split, or shards are missing or damaged.
    """
    started = time.monotonic()
    export = read_reference(exported, ExportRef)
    refs = sorted((read_reference(path, ShardsRef) for path in shards), key=lambda ref: ref.dataset)
    steps = {ref.stage: ref.step for ref in export.ancestors() if isinstance(ref, CheckpointRef)}
    key = storage.content_key(
        FORMAT, dataclasses.asdict(section.evaluation), export.digest, steps, [ref.digest for ref in refs]
    )
    workspace = section.workspace if storage.is_remote(section.workspace) else os.path.abspath(section.workspace)
    destination = storage.join(workspace, "evaluations", key)
    reused = storage.is_committed(destination)
    folder = storage.commit_folder(destination, lambda path: _evaluate(path, section.evaluation, export, refs, steps))
    uri = folder.uri
    if html is not None:
        storage.download(storage.join(uri, PAGE), html)
    result, seconds = folder.meta, time.monotonic() - started
    page = storage.join(uri, PAGE)
    report = StageReport(
        stage="evaluate",
        seconds=seconds,
        reused=reused,
        metrics=result["metrics"] | {f"blind/{name}": value for name, value in result["blind_metrics"].items()},
        lines=(
            "gate passed" if not result["reasons"] else f"gate refused: {'; '.join(result['reasons'])}",
            f"report: {page}",
        ),
    )
    write_reference(
        EvaluationRef(
            uri=uri,
            digest=folder.digest,
            facts={"questions": result["questions"], "trained_steps": steps},
            report=report.to_json(),
            parents=(export, *refs),
            passed=not result["reasons"],
            reasons=tuple(result["reasons"]),
            metrics=result["metrics"],
            blind_metrics=result["blind_metrics"],
        ),
        output,
    )
    print(f"evaluate: {'reused' if reused else 'made'} {uri} in {seconds:.1f} s")
    return report


def _evaluate(
    folder: Path, config: EvaluationConfig, export: ExportRef, refs: Sequence[ShardsRef], steps: dict[str, int]
) -> dict[str, Any]:
    """Fill an evaluation's folder; returns what its reference repeats."""
    from molmo2core.evaluation.drawing import draw_example
    from molmo2core.evaluation.inference import load_inference_model
    from molmo2core.evaluation.report import DrawnAnswer, build_report, choose_drawn
    from molmo2core.evaluation.run import ask_questions, choose_questions
    from molmo2core.shards.reader import ExampleReader

    with tempfile.TemporaryDirectory() as cache:
        model = load_inference_model(storage.fetch_committed(export.uri, Path(cache)), config.preprocessing)
        examples = ExampleReader(refs, config.split, Path(cache))
        questions = [
            question
            for indices in examples.ranges.values()
            for question in choose_questions(examples, indices, config.max_examples_per_dataset)
        ]
        answers = ask_questions(model, examples, questions, config)
        metrics = average_scores(answer.score for answer in answers)
        blind_metrics = average_scores(answer.blind_score for answer in answers)
        verdict = judge(config.gate, metrics, blind_metrics, list(steps.values()))
        drawn = []
        for answer in choose_drawn(answers, config.drawn_examples):
            example = examples.example(answer.question.example_index)
            annotation = example.annotations[answer.question.annotation_index]
            drawn.append(DrawnAnswer(answer=answer, pictures=draw_example(example, annotation, answer.answer)))

    asked = Counter(answer.question.task for answer in answers)
    asked.update(f"{a.question.task}.{a.question.category}" for a in answers if a.question.category)
    result = _result(verdict, metrics, blind_metrics, len(answers))
    details = result | {
        "passed": verdict.passed,
        "counts": dict(sorted(asked.items())),
        "trained_steps": steps,
        "export": {"uri": export.uri, "digest": export.digest, "step": export.step},
        "datasets": {ref.dataset: {"uri": ref.uri, "digest": ref.digest} for ref in refs},
        "evaluation": dataclasses.asdict(config),
    }
    page = build_report(
        title=f"Evaluation of {export.uri.rstrip('/').rpartition('/')[2]}",
        facts={
            "model": export.uri,
            "digest": export.digest,
            "trained steps": ", ".join(f"{stage} {step}" for stage, step in reversed(steps.items())) or "none",
            "split": f"{config.split}, {len(answers)} questions of {len(refs)} datasets",
        },
        verdict=verdict,
        metrics=metrics,
        blind_metrics=blind_metrics,
        counts=asked,
        drawn=drawn,
    )
    lines = (json.dumps(answer.to_json(), sort_keys=True, ensure_ascii=False) for answer in answers)
    (folder / PREDICTIONS).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    (folder / REPORT).write_text(json.dumps(details, sort_keys=True, indent=1) + "\n")
    (folder / PAGE).write_text(page, encoding="utf-8")
    return result


def _result(
    verdict: Verdict, metrics: dict[str, float], blind_metrics: dict[str, float], questions: int
) -> dict[str, Any]:
    return {
        "reasons": list(verdict.reasons),
        "metrics": metrics,
        "blind_metrics": blind_metrics,
        "questions": questions,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m molmo2core.stages.evaluate --section S --exported REF --shards REF [...] --output REF`."""
    parser = argparse.ArgumentParser(prog="python -m molmo2core.stages.evaluate", description=__doc__)
    parser.add_argument("--section", type=Path, required=True, help="JSON file of an EvaluateSection")
    parser.add_argument("--exported", type=Path, required=True, help="JSON file of an ExportRef")
    parser.add_argument("--shards", type=Path, action="append", required=True, help="JSON file of a ShardsRef")
    parser.add_argument("--output", type=Path, required=True, help="where the EvaluationRef is written")
    parser.add_argument("--html", type=Path, help="where a copy of the report is written")
    options = parser.parse_args(arguments)
    try:
        section = from_json(storage.read_bytes(str(options.section)).decode(), EvaluateSection)
        run(section, exported=options.exported, shards=options.shards, output=options.output, html=options.html)
    except Exception as error:
        return exit_with_message(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
