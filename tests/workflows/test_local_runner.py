"""Our output around KFP's local runner, with small real pipelines."""

import inspect
import json
import logging
import sys
from pathlib import Path
from typing import List  # noqa: UP035

import pytest
from kfp import dsl, local
from kfp.local import subprocess_task_handler

from workflows.local_runner import TaskFailed, run_pipeline, task_label, without_executor_noise


@dsl.component(base_image="any", install_kfp_package=False)
def train(section: str, checkpoint: dsl.Output[dsl.Model]):
    print(f"step 1/1 of {section}")
    with open(checkpoint.path, "w") as file:
        file.write("weights")


@dsl.component(base_image="any", install_kfp_package=False)
def list_datasets() -> List[str]:  # noqa: UP006
    return ["good", "bad"]


@dsl.component(base_image="any", install_kfp_package=False)
def build_shards(dataset: str, code: int):
    from molmo2core.errors import DataError, PlatformError, message_first

    with message_first():
        if dataset == "bad" and code == 2:
            raise DataError("a.jsonl:3", found="no JSON", mend="mend line 3")
        if dataset == "bad" and code == 75:
            raise PlatformError("s3://x", found="gone")
        if dataset == "bad":
            raise ZeroDivisionError("by zero")


@dsl.pipeline(name="good")
def good_pipeline(section: str):
    train(section=section)


@dsl.pipeline(name="bad")
def bad_pipeline(code: int):
    with dsl.ParallelFor(list_datasets().output) as dataset:
        done = build_shards(dataset=dataset, code=code)
    train(section="never").after(done)


def test_stage_lines_are_shown_and_kfps_are_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    section = json.dumps({"stage": "sft"})
    run = run_pipeline(good_pipeline, {"section": section}, root=tmp_path / "kfp")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "train.sft: started"
    assert lines[1] == f"  train.sft | step 1/1 of {section}"
    assert lines[2].startswith("train.sft: done after") and len(lines) == 3
    assert "Got executor_input" in run.log.read_text(), "the log file must have everything"
    assert (run.folder / "train" / "checkpoint").read_text() == "weights"
    assert run.peak_bytes >= 0 and run.seconds > 0


@pytest.mark.parametrize(
    ("code", "first"),
    [
        (2, "DataError: a.jsonl:3: no JSON; to mend it: mend line 3"),
        (75, "PlatformError: s3://x: gone"),
        (1, "internal error: ZeroDivisionError: by zero"),
    ],
)
def test_failure_names_task_message_and_exit_code(
    code: int, first: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """KFP alone tells only 'Inner task failed: build-shards inside for-loop-1-iteration-1'."""
    with pytest.raises(TaskFailed) as failed:
        run_pipeline(bad_pipeline, {"code": code}, root=tmp_path / "kfp")
    assert (failed.value.task, failed.value.exit_code, failed.value.message) == ("build_shards.bad", code, first)
    lines = capsys.readouterr().out.splitlines()
    own = [line for line in lines if line.startswith("  build_shards.bad |")]
    assert own[0] == f"  build_shards.bad | {first}", "the message comes before any trace"
    assert not any("train" in line for line in lines), "a step after the failure ran"


def test_the_replaced_function_is_the_one_kfp_calls() -> None:
    """An upgrade of kfp that renames or changes it must be noticed here, not by silence on the screen."""
    assert list(inspect.signature(subprocess_task_handler.run_local_subprocess).parameters) == [
        "full_command",
        "env_vars",
    ]
    assert "run_local_subprocess(" in inspect.getsource(subprocess_task_handler.SubprocessTaskHandler.run)


@dsl.component(base_image="any", install_kfp_package=False)
def name_section() -> str:
    return "the section"


@dsl.component(base_image="any", install_kfp_package=False)
def show(section: str, dataset: str, seen: dsl.Output[dsl.Artifact]):
    with open(seen.path, "w") as file:
        file.write(f"{dataset}: {section}")


@dsl.pipeline(name="loop")
def loop_pipeline():
    section = name_section()
    with dsl.ParallelFor(list_datasets().output) as dataset:
        show(section=section.output, dataset=dataset)


def test_kfp_leaves_no_logger_behind(tmp_path: Path) -> None:
    """Its loop threads can leave a handler on our closed log file; later lines then print '--- Logging error ---'."""
    root = logging.getLogger()
    before = (root.level, list(root.handlers))
    stray = logging.NullHandler()

    def pipeline(section: str) -> None:
        good_pipeline(section=section)
        root.addHandler(stray)

    run_pipeline(pipeline, {"section": "x"}, root=tmp_path / "stray")
    assert (root.level, list(root.handlers)) == before


def seen(folder: Path) -> list[str]:
    return sorted(path.read_text() for path in folder.rglob("seen"))


def test_other_outputs_keep_their_value_inside_a_loop(tmp_path: Path) -> None:
    """kfp 2.17 alone hands every step's output that enters a loop over as the loop's item."""
    local.init(local.SubprocessRunner(use_venv=False), pipeline_root=str(tmp_path / "alone"))
    loop_pipeline()
    assert seen(tmp_path / "alone") == ["bad: bad", "good: good"], "kfp is mended: take our function out"
    run_pipeline(loop_pipeline, {}, root=tmp_path / "ours")
    assert seen(tmp_path / "ours") == ["bad: the section", "good: the section"]


def test_steps_run_in_this_environment(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Another python on PATH would lack the project's packages."""
    run_pipeline(where_pipeline, {}, root=tmp_path)
    out = capsys.readouterr().out
    assert sys.executable in out
    assert str(Path(__file__).parents[2] / "molmo2core") in out


@dsl.component(base_image="any", install_kfp_package=False)
def where():
    import sys

    import molmo2core.errors

    print(sys.executable, molmo2core.errors.__file__)


@dsl.pipeline(name="where")
def where_pipeline():
    where()


def test_label_falls_back_to_the_component() -> None:
    def command(parameters: dict[str, object]) -> list[str]:
        text = json.dumps({"inputs": {"parameterValues": parameters}})
        return ["sh", "-c", "x", "--executor_input", text, "--function_to_execute", "plan_packs"]

    assert task_label(command({"section": '{"stage": "sft"}'})) == "plan_packs.sft"
    assert task_label(command({"section": "no json"})) == "plan_packs"
    assert task_label(command({"section": "[1]"})) == "plan_packs"
    assert task_label(command({"dataset": "text", "section": "{}"})) == "plan_packs.text"


def test_only_the_executors_own_json_is_hidden() -> None:
    """A stage that prints JSON of its own must not lose it."""
    lines = [
        "{",
        "}",
        "[KFP Executor 1 INFO]: Got executor_input:",
        "{",
        '    "a": 1',
        "}",
        "mine",
        "[KFP Executor 2]: x",
    ]
    shown = [line for line, ours in without_executor_noise(iter(lines)) if ours]
    assert shown == ["{", "}", "mine"]
