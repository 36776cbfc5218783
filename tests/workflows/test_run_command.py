"""What a user gets to see before anything runs, and from a finished run."""

import os
from pathlib import Path

import pytest

from molmo2core.errors import PlatformError
from molmo2core.recipe.load import load_recipe
from molmo2core.references import (
    CheckpointRef,
    EvaluationRef,
    ManifestsRef,
    ModelVersionRef,
    PackPlanRef,
    Reference,
    write_reference,
)
from molmo2core.stages.report import StageReport
from workflows.run import check_writable, main
from workflows.summary import closing_lines, read_references

RECIPES = Path(__file__).parents[2] / "workflows" / "recipes"
TINY = str(RECIPES / "tiny.yaml")


def test_wrong_recipe_ends_before_anything_is_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    workspace = tmp_path / "ws"
    assert main(["local", "--recipe", TINY, "--workspace", str(workspace), "--set", "train.stf.steps=5"]) == 2
    assert "did you mean 'sft'" in capsys.readouterr().err and not workspace.exists()
    assert main(["local", "--recipe", str(tmp_path / "no.yaml")]) == 2
    assert capsys.readouterr().err.startswith("RecipeError")


def test_folder_without_rights_is_refused(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        blocked = tmp_path / "file"  # root may write anywhere, but no folder fits below a file
        blocked.write_text("")
    else:
        blocked = tmp_path / "locked"
        blocked.mkdir(mode=0o500)
    with pytest.raises(PlatformError, match="cannot write"):
        check_writable(blocked / "ws")


def test_folder_without_space_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlatformError, match=r"GiB free; expected at least 1048576\.00 GiB"):
        check_writable(tmp_path, 1 << 50)
    check_writable(tmp_path, 1)


def test_workspace_that_kfp_would_rewrite_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """KFP's local runner replaces `python3` everywhere in a task's command, also inside paths."""
    assert main(["local", "--recipe", TINY, "--workspace", str(tmp_path / "python3-runs")]) == 2
    assert "python3" in capsys.readouterr().err


def report(stage: str, seconds: float = 1.0, *, reused: bool = False, **metrics: float) -> dict[str, object]:
    return StageReport(stage=stage, seconds=seconds, reused=reused, metrics=metrics).to_json()


def a_run(folder: Path, *, passed: bool) -> list[Reference]:
    common = {"digest": "d"}
    references: dict[str, Reference] = {
        "validate-data/manifests": ManifestsRef(
            uri="/ws/manifests/k", datasets=("text",), report=report("validate_data", reused=True), digest="1"
        ),
        "plan-packs/plan": PackPlanRef(
            uri="/p", stage="sft", num_packs=8, report=report("plan_packs.sft", examples_per_pack=3.25), digest="2"
        ),
        "train-2/checkpoint": CheckpointRef(
            uri="/c2",
            stage="sft",
            step=5,
            recipe_fingerprint="f",
            report=report("train.sft", 12.5, last_loss=1.5),
            digest="3",
        ),
        "train/checkpoint": CheckpointRef(
            uri="/c1", stage="pretrain", step=5, recipe_fingerprint="f", report=report("train.pretrain"), digest="4"
        ),
        "evaluate/evaluation": EvaluationRef(
            uri="/ws/evaluations/k",
            passed=passed,
            reasons=() if passed else ("image_qa/accuracy 0.25 is below 0.5",),
            metrics={"image_qa/accuracy": 0.25},
            blind_metrics={"image_qa/accuracy": 0.125},
            report=report("evaluate"),
            digest="5",
        ),
        "register-model/version": ModelVersionRef(
            uri="/m", name="molmo2-tiny", version="3", aliases=("candidate",), report=report("register_model"), **common
        ),
    }
    for name, reference in references.items():
        write_reference(reference, folder / name)
    (folder / "resolve-recipe").mkdir(parents=True)
    (folder / "resolve-recipe" / "train_sft").write_text('{"stage": "sft"}')
    (folder / "train" / "executor_output.json").write_text("{}")
    return list(references.values())


@pytest.mark.parametrize("passed", [True, False])
def test_closing_table_has_everything_a_user_asks(
    tmp_path: Path, passed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    written = a_run(tmp_path, passed=passed)
    references = read_references(tmp_path)
    assert sorted(r.uri for r in references) == sorted(r.uri for r in written), "parameters are no references"
    recipe = load_recipe(Path(TINY).read_text(), ["workspace=/ws"])
    lines = closing_lines(references, recipe, seconds=100.0, peak_bytes=3 << 30)
    text = "\n".join(lines)
    stages = [line.split()[0] for line in lines if " s   " in line]
    assert stages == [
        "validate_data", "plan_packs.sft", "train.pretrain", "train.sft", "evaluate", "register_model", "all",
    ]  # fmt: skip
    assert "validate_data                    1.0 s   reused" in text
    assert "examples_per_pack 3.25" in text and "last_loss 1.5" in text and "12.5 s   made" in text
    assert any(line.split() == ["image_qa/accuracy", "0.250", "0.125"] for line in lines)
    assert ("gate: passed" in text) is passed and ("is below 0.5" in text) is not passed
    assert "molmo2-tiny version 3, alias candidate" in text and "3.0 GiB" in text
    assert "/ws/manifests/k/data_docs/index.html" in text and "/ws/evaluations/k/report.html" in text
    assert "mlflow ui --backend-store-uri sqlite:////ws/mlflow/mlflow.db" in text
