"""The compiled pipeline: the same bytes each time, strictly valid, and the one that is kept in tests/golden."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from google.protobuf.json_format import ParseError

from workflows.run import main
from workflows.submit import compile_pipeline, parse_strictly

REPOSITORY = Path(__file__).parents[2]
RECIPES = REPOSITORY / "workflows" / "recipes"
GOLDEN = REPOSITORY / "tests" / "golden" / "full_recipe.yaml"


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ir") / "full_recipe.yaml"
    compile_pipeline(path)
    return path


def test_golden_file_is_current(compiled: Path) -> None:
    """A changed graph must be seen in review.  To renew it: see the assertion's message."""
    assert compiled.read_text() == GOLDEN.read_text(), (
        "python -m workflows.run compile --recipe workflows/recipes/tiny.yaml --output tests/golden/full_recipe.yaml"
    )


@pytest.mark.parametrize("recipe", ["tiny", "molmo2_4b", "molmo2_8b", "molmo2_o_7b", "molmo2_4b_lora"])
def test_every_recipe_compiles_to_the_same_bytes_in_a_fresh_process(recipe: str, tmp_path: Path) -> None:
    """Another hash seed in another process: nothing of the IR may depend on dict or set order, or on the recipe."""
    script = ["-m", "workflows.run"] if recipe == "tiny" else ["workflows/full_recipe.py"]
    output = tmp_path / "new" / "ir.yaml"
    subprocess.run(
        [sys.executable, *script, "compile", "--recipe", str(RECIPES / f"{recipe}.yaml"), "--output", str(output)],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONHASHSEED": str(len(recipe))},
        check=True,
        capture_output=True,
    )
    assert output.read_bytes() == GOLDEN.read_bytes()


def test_strict_parse_refuses_an_unknown_field() -> None:
    """The server parses strictly; a loose parse here would prove nothing."""
    document = yaml.safe_load(GOLDEN.read_text())
    document["root"]["dag"]["tasks"]["train"]["cachingOption"] = {}
    with pytest.raises(ParseError, match="cachingOption"):
        parse_strictly(yaml.safe_dump(document))


def test_graph_is_the_one_described() -> None:
    tasks = parse_strictly(GOLDEN.read_text()).root.dag.tasks
    assert {name: set(task.dependent_tasks) - {"resolve-recipe"} for name, task in tasks.items()} == {
        "resolve-recipe": set(),
        "validate-data": set(),
        "for-loop-1": {"validate-data"},
        "plan-packs": {"for-loop-1"},
        "train": {"plan-packs"},
        "plan-packs-2": {"for-loop-1"},
        "train-2": {"plan-packs-2", "train"},
        "plan-packs-3": {"for-loop-1"},
        "train-3": {"plan-packs-3", "train-2"},
        "export-checkpoint": {"train-3"},
        "evaluate": {"export-checkpoint", "for-loop-1"},
        "register-model": {"evaluate"},
    }
    sections = {
        name: task.inputs.parameters["section"].task_output_parameter.output_parameter_key
        for name, task in tasks.items()
        if name not in ("resolve-recipe", "for-loop-1")
    }
    assert sections == {
        "validate-data": "validate", "plan-packs": "plan_pretrain", "train": "train_pretrain",
        "plan-packs-2": "plan_sft", "train-2": "train_sft", "plan-packs-3": "plan_long_context",
        "train-3": "train_long_context", "export-checkpoint": "export", "evaluate": "evaluate",
        "register-model": "register",
    }  # fmt: skip


def test_everything_is_cached_but_the_registration() -> None:
    document = yaml.safe_load(GOLDEN.read_text())
    dags = [document["root"]["dag"], *(c["dag"] for c in document["components"].values() if "dag" in c)]
    cached = {
        name: t.get("cachingOptions", {}).get("enableCache", False) for dag in dags for name, t in dag["tasks"].items()
    }
    assert [name for name, on in cached.items() if not on and not name.startswith("for-loop")] == ["register-model"]
    assert cached["build-shards"]


def test_no_cache_reaches_tasks_inside_loops(tmp_path: Path) -> None:
    """kfp.Client(enable_caching=False) leaves build-shards cached (kubeflow.md 3.2)."""
    path = tmp_path / "ir.yaml"
    compile_pipeline(path, caching=False)
    assert "enableCache" not in path.read_text() and "build-shards" in path.read_text()


def test_graph_file_stays_a_page() -> None:
    assert len((REPOSITORY / "workflows" / "full_recipe.py").read_text().splitlines()) <= 120


def test_wrong_recipe_does_not_compile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "ir.yaml"
    arguments = ["compile", "--recipe", str(RECIPES / "tiny.yaml"), "--output", str(output)]
    assert main([*arguments, "--set", "train.long_context.context_parallel=3"]) == 2
    assert "3 ranks per sequence" in capsys.readouterr().err and not output.exists()
