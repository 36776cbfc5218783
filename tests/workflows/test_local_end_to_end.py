"""The whole workflow with KFP's local runner on a very small corpus: promoted, refused, broken.

One workspace for all tests, in order: each run after the first must find what it can reuse.
"""

import json
from pathlib import Path

import pytest

from molmo2core.references import (
    CheckpointRef,
    EvaluationRef,
    ManifestsRef,
    ModelVersionRef,
    Reference,
    ShardsRef,
)
from workflows.run import main
from workflows.summary import read_references

TINY = (Path(__file__).parents[2] / "workflows" / "recipes" / "tiny.yaml").read_text()
SMALL = [
    "data.shapes={images: 15, image_sets: 4, videos: 12, texts: 5, vocab_size: 768}",
    "train.pretrain.steps=2", "train.sft.steps=2", "train.long_context.steps=2",
    "train.pretrain.global_batch_packs=2", "train.sft.global_batch_packs=2", "train.long_context.global_batch_packs=2",
    "evaluate.max_examples_per_dataset=2", "evaluate.max_new_tokens=4",
]  # fmt: skip
ANY_MODEL = "evaluate.gate=[{metric: image_qa/accuracy, minimum: 0.0}]"
STAGES = [
    "validate_data", *[f"build_shards.{name}" for name in (
        "captions", "image_pointing", "image_qa", "text", "tracking", "video_pointing", "video_qa")],
    "plan_packs.pretrain", "plan_packs.sft", "plan_packs.long_context",
    "train.pretrain", "train.sft", "train.long_context", "export_checkpoint", "evaluate", "register_model",
]  # fmt: skip


class Runs:
    """Runs the command line in one workspace and reads what each run left."""

    def __init__(self, folder: Path) -> None:
        self.workspace = folder / "workspace"
        self.recipe = folder / "recipe.yaml"  # one recipe for all runs, whatever happens to the file meanwhile
        self.recipe.write_text(TINY)

    def run(self, *overrides: str) -> tuple[int, list[Reference]]:
        arguments = ["local", "--recipe", str(self.recipe), "--workspace", str(self.workspace)]
        for override in (*SMALL, *overrides):
            arguments += ["--set", override]
        code = main(arguments)
        newest = max(path for path in (self.workspace / "kfp").iterdir() if path.is_dir())
        return code, read_references(newest)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("OMP_NUM_THREADS", "1")
        environment.delenv("MLFLOW_TRACKING_URI", raising=False)
        return Runs(tmp_path_factory.mktemp("end_to_end"))


def only(references: list[Reference], kind: type[Reference]) -> Reference:
    (found,) = (reference for reference in references if isinstance(reference, kind))
    return found


def test_nothing_to_promoted_model(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    code, references = runs.run(ANY_MODEL)
    shown = capsys.readouterr()
    assert code == 0, shown.out[-4000:] + shown.err
    assert sorted(r.report["stage"] for r in references) == sorted(STAGES)
    version = only(references, ModelVersionRef)
    assert isinstance(version, ModelVersionRef)
    assert version.version == "1" and set(version.aliases) == {"candidate", "champion"}
    lineage = list(version.ancestors())
    assert [r.stage for r in lineage if isinstance(r, CheckpointRef)] == ["long_context", "sft", "pretrain"]
    assert len([r for r in lineage if isinstance(r, ShardsRef)]) == 7
    assert len([r for r in lineage if isinstance(r, ManifestsRef)]) == 1
    assert "gate: passed" in shown.out and "version 1" in shown.out and "Got executor_input" not in shown.out
    pages = [
        line.split(":", 1)[1].strip() for line in shown.out.splitlines() if line.startswith(("Data Docs:", "report:"))
    ]
    assert len(pages) == 2 and all(Path(page).is_file() for page in pages), pages
    metrics = json.dumps([r.metrics for r in references if isinstance(r, EvaluationRef)])
    assert "image_pointing" in metrics


def test_recipe_without_training_reuses_the_data_and_is_refused_with_its_reason(
    runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is upstream of the change must not be computed again, and champion must not move to the untrained model."""
    code, references = runs.run(ANY_MODEL, *[f"train.{stage}.steps=0" for stage in ("pretrain", "sft", "long_context")])
    shown = capsys.readouterr().out
    assert code == 3, shown[-4000:]
    reused = {r.report["stage"] for r in references if r.report["reused"]}
    handed_on = {"train.sft", "train.long_context"}
    assert reused == handed_on | {stage for stage in STAGES if stage.startswith(("validate_data", "build_shards"))}
    assert [r.stage for r in references if isinstance(r, CheckpointRef)] == ["pretrain"] * 3
    assert "gate: refused" in shown and "trained 0 steps" in shown
    version = only(references, ModelVersionRef)
    assert isinstance(version, ModelVersionRef)
    assert version.version == "2" and "champion" not in version.aliases


def test_broken_branch_stops_the_run_with_its_message_first(
    runs: Runs, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code, references = runs.run(ANY_MODEL, f"data.manifests.text={json.dumps(str(tmp_path / 'missing.jsonl'))}")
    shown = capsys.readouterr()
    assert code == 2
    assert shown.err.splitlines()[0].startswith("DataError:") and "missing.jsonl" in shown.err.splitlines()[0]
    assert "failed in step validate_data" in shown.err
    assert references == [], "no step after the failure may leave anything"
