"""MLflow runs on a real sqlite store: found again by a retry, ended truthfully, created once under load and kills."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from molmo2core.errors import PlatformError, RecipeError
from molmo2core.references import (
    CheckpointRef,
    EvaluationRef,
    ExportRef,
    ManifestsRef,
    PackPlanRef,
    Reference,
    ShardsRef,
)
from molmo2core.tracking.config import TrackingConfig
from molmo2core.tracking.lineage import checkpoints_of, datasets_of, lineage_mermaid, lineage_text
from molmo2core.tracking.mlflow_run import ATTEMPT_TAG, connect, open_run, tracking_uri, ui_command


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    workspace = tmp_path_factory.mktemp("a workspace")  # with a space, as people have
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        return tracking_uri(TrackingConfig(), str(workspace))


def test_the_store_is_the_configured_one_else_the_environments_else_the_workspaces(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server:5000")
    assert tracking_uri(TrackingConfig(uri="http://mine"), str(tmp_path)) == "http://mine"
    assert tracking_uri(TrackingConfig(), str(tmp_path)) == "http://server:5000"
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    local = tracking_uri(TrackingConfig(), str(tmp_path))
    assert local == f"sqlite:///{tmp_path}/mlflow/mlflow.db"
    assert ui_command(local) == f"mlflow ui --backend-store-uri {local}"
    with pytest.raises(RecipeError, match="MLFLOW_TRACKING_URI"):
        tracking_uri(TrackingConfig(), "s3://bucket/workspace")


def test_a_run_keeps_what_is_logged(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch artifacts in the current directory, MLflow's default on sqlite, and cut digests."""
    monkeypatch.chdir(tmp_path)
    report = tmp_path / "report.html"
    report.write_text("<p>")
    with open_run(uri, "logged", "a run", "logged-1", {"stage": "sft"}) as run:
        run.log_params({"seed": 3, "betas": [0.9, 0.95], "name": "x"})
        run.log_metrics({f"loss/{n}": n / 2 for n in range(1200)}, step=7)
        run.log_dataset("captions", "ab" * 32, str(tmp_path), "training", {"samples.train": "8"})
        run.log_artifact(report, "evaluation")
        run.log_text("lineage", "lineage.txt")
    found = run.client.get_run(run.run_id)
    assert found.info.status == "FINISHED"
    assert found.data.params == {"seed": "3", "betas": "[0.9, 0.95]", "name": "x"}
    assert found.data.tags["stage"] == "sft"
    assert found.data.metrics["loss/1199"] == 599.5
    (dataset,) = found.inputs.dataset_inputs
    assert (dataset.dataset.name, dataset.dataset.digest) == ("captions", "ab" * 16)
    tags = {tag.key: tag.value for tag in dataset.tags}
    assert tags["mlflow.data.context"] == "training"
    assert tags["sha256"] == "ab" * 32
    names = {entry.path for entry in run.client.list_artifacts(run.run_id)}
    assert names == {"evaluation", "lineage.txt"}
    assert sorted(os.listdir(tmp_path)) == ["report.html"]


def test_a_retry_reopens_the_run(uri: str) -> None:
    """Would catch a second run per retry, and a curve that doubles when it is replayed."""
    with pytest.raises(ValueError, match="boom"), open_run(uri, "retried", "train", "key-1") as first:
        first.log_metrics({"loss": 2.0}, step=1, timestamp_ms=1000)
        raise ValueError("boom")
    assert first.client.get_run(first.run_id).info.status == "FAILED"
    with open_run(uri, "retried", "train", "key-1") as second:
        assert second.client.get_run(second.run_id).info.status == "RUNNING"
        second.log_metrics({"loss": 2.0}, step=1, timestamp_ms=1000)
        second.log_metrics({"loss": 1.0}, step=2, timestamp_ms=2000)
    assert second.run_id == first.run_id
    found = second.client.get_run(second.run_id)
    assert (found.info.status, found.data.tags[ATTEMPT_TAG]) == ("FINISHED", "2")
    history = second.client.get_metric_history(second.run_id, "loss")
    assert sorted((point.step, point.value) for point in history) == [(1, 2.0), (2, 1.0)]
    with open_run(uri, "retried", "train", "key-2") as other:
        assert other.run_id != first.run_id


def test_an_interrupted_run_is_killed_not_running(uri: str) -> None:
    with pytest.raises(KeyboardInterrupt), open_run(uri, "interrupted", "train", "key-1") as run:
        raise KeyboardInterrupt
    assert run.client.get_run(run.run_id).info.status == "KILLED"


def test_the_run_that_kfp_opened_is_used_and_left_open(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch a second run beside the pipeline's own (mlflow_gx_mds_s3.md, finding 9)."""
    client = connect(uri)
    experiment = client.create_experiment("of-kfp")
    theirs = client.create_run(experiment, run_name="task").info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", theirs)
    with open_run(uri, "ours", "train", "key-1") as run:
        run.log_params({"seed": 1})
    found = client.get_run(theirs)
    assert (run.run_id, run.experiment_id) == (theirs, experiment)
    assert (found.info.status, found.info.run_name, found.data.params) == ("RUNNING", "task", {"seed": "1"})


def test_a_changed_parameter_is_a_clear_error(uri: str) -> None:
    with pytest.raises(PlatformError, match="seed"), open_run(uri, "params", "train", "key-1") as run:
        run.log_params({"seed": 1})
        run.log_params({"seed": 1})
        run.log_params({"seed": 2})


def test_a_long_parameter_is_an_error_and_not_cut(uri: str) -> None:
    """MLflow's default is to keep 6000 characters without a word."""
    with pytest.raises(PlatformError, match="6000 characters"), open_run(uri, "params", "train", "key-2") as run:
        run.log_params({"recipe": "x" * 7000})


def test_the_process_environment_is_not_redirected(uri: str) -> None:
    """mlflow.set_tracking_uri writes MLFLOW_TRACKING_URI, which would look like the user's choice later on."""
    before = os.environ.get("MLFLOW_TRACKING_URI")
    with open_run(uri, "environment", "train", "key-1"):
        pass
    assert os.environ.get("MLFLOW_TRACKING_URI") == before


TOUCH = """
import sys
from molmo2core.tracking.mlflow_run import open_run
with open_run(sys.argv[1], "shared", "run", sys.argv[2]) as run:
    run.log_metrics({"x": 1.0})
"""


def touch(uri: str, key: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", TOUCH, uri, key], stdout=subprocess.DEVNULL)


def test_first_touch_by_several_processes_and_a_kill_in_the_middle(tmp_path: Path) -> None:
    """Would catch MLflow's own unlocked creation: several first touches fail, a killed one breaks the file for ever."""
    uri = f"sqlite:///{tmp_path}/mlflow/mlflow.db"
    unfinished = tmp_path / "mlflow" / "mlflow.db.unfinished"
    first = touch(uri, "killed")
    deadline = time.monotonic() + 60
    while not (unfinished.exists() and unfinished.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.01)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert unfinished.stat().st_size  # it was killed half way through
    assert not (tmp_path / "mlflow" / "mlflow.db").exists()
    processes = [touch(uri, f"key-{n}") for n in range(2)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    client = connect(uri)
    experiment = client.get_experiment_by_name("shared")
    assert len(client.search_runs([experiment.experiment_id])) == 2


def reference(kind: type[Reference], name: str, *parents: Reference, **fields: object) -> Reference:
    return kind(uri=f"/w/{name}", digest=name * 4, parents=parents, **fields)  # type: ignore[arg-type]


def evaluated() -> EvaluationRef:
    """Two stages on two datasets, evaluated on those and a third."""
    manifests = reference(ManifestsRef, "manifests", datasets=("a", "b", "c"))
    shards = {
        name: reference(
            ShardsRef,
            f"shards-{name}",
            manifests,
            dataset=name,
            tokenizer_digest="t",
            num_samples={"train": 8, "test": 2},
        )
        for name in "abc"
    }
    plans = [
        reference(PackPlanRef, f"plan-{stage}", shards["b"], shards["a"], stage=stage, num_packs=4)
        for stage in ("pretrain", "sft")
    ]
    first = reference(CheckpointRef, "ckpt-1", plans[0], stage="pretrain", step=10, recipe_fingerprint="f")
    second = reference(CheckpointRef, "ckpt-2", plans[1], first, stage="sft", step=20, recipe_fingerprint="f")
    export = reference(ExportRef, "export", second, step=20)
    found = reference(
        EvaluationRef, "evaluation", export, *shards.values(), passed=True, reasons=(), metrics={}, blind_metrics={}
    )
    assert isinstance(found, EvaluationRef)
    return found


def test_datasets_are_told_apart_by_use() -> None:
    """Would catch training data logged as evaluation data, and one of the two uses lost (one context per name)."""
    uses = [(use.name, use.context) for use in datasets_of(evaluated())]
    assert uses == [
        ("a", "training"),
        ("b", "training"),
        ("a.held-out", "evaluation"),
        ("b.held-out", "evaluation"),
        ("c.held-out", "evaluation"),
    ]


def test_checkpoints_come_in_order_of_training() -> None:
    assert [(ref.stage, ref.step) for ref in checkpoints_of(evaluated())] == [("pretrain", 10), ("sft", 20)]


def test_lineage_names_everything_once_and_draws_every_edge() -> None:
    found = evaluated()
    text, chart = lineage_text(found), lineage_mermaid(found)
    ancestors = list(found.ancestors())
    assert all(ref.uri in text for ref in ancestors)
    assert text.splitlines()[0].startswith("evaluation, passed")
    assert chart.count("-->") == sum(len(ref.parents) for ref in ancestors)
    assert chart.count("[") == len(ancestors) == 10
    assert "shards of a" in chart
