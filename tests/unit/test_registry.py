"""Register, promote, roll back on a real MLflow store; the served version really answers."""

from __future__ import annotations

import dataclasses
import io
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from molmo2core import storage
from molmo2core.checkpoints.config import ExportConfig
from molmo2core.checkpoints.export_hf import export_model
from molmo2core.checkpoints.model_card import Lineage
from molmo2core.errors import CheckpointError, DataError
from molmo2core.preprocessing.config import PreprocessingConfig
from molmo2core.recipe.sections import RegisterSection
from molmo2core.references import (
    CheckpointRef,
    EvaluationRef,
    ExportRef,
    ModelVersionRef,
    PackPlanRef,
    ShardsRef,
    read_reference,
    write_reference,
)
from molmo2core.sources.shapes_tokenizer import save_tokenizer
from molmo2core.stages import register
from molmo2core.testing.tiny_model import tiny_model
from molmo2core.testing.tiny_tokenizer import tiny_tokenizer
from molmo2core.tracking import ledger as ledger_module
from molmo2core.tracking import registry as registry_module
from molmo2core.tracking.config import TrackingConfig
from molmo2core.tracking.ledger import Decision, Ledger, champions
from molmo2core.tracking.mlflow_run import tracking_uri
from molmo2core.tracking.registry import CANDIDATE, CHAMPION, DECISION_TAG, REASON_TAG, Registry, open_registry

PREPROCESSING = PreprocessingConfig(max_crops=2, max_frames=4)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with a committed export of a random tiny model."""
    folder = tmp_path_factory.mktemp("workspace")
    tokenizer = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(tiny_tokenizer().backend, tokenizer)

    def export(path: Path) -> dict[str, Any]:
        export_model(
            path,
            tiny_model(1),
            tokenizer,
            export=ExportConfig(),
            preprocessing=PREPROCESSING,
            lineage=Lineage(),
        )
        return {}

    storage.commit_folder(str(folder / "exports" / "one"), export)
    return folder


@pytest.fixture(autouse=True)
def no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def evaluation(workspace: Path, name: str, *reasons: str) -> Path:
    """An EvaluationRef as stages.evaluate leaves it, behind it the committed export."""

    def fill(folder: Path) -> dict[str, Any]:
        report = {"evaluation": {"preprocessing": dataclasses.asdict(PREPROCESSING)}, "name": name}
        (folder / "report.json").write_text(json.dumps(report))
        (folder / "report.html").write_text(f"<p>{name}</p>")
        return {}

    shards = ShardsRef(
        uri="/w/shards", digest="5" * 64, dataset="image_qa", tokenizer_digest="t", num_samples={"train": 8, "test": 2}
    )
    plan = PackPlanRef(uri="/w/plan", digest="6" * 64, stage="sft", num_packs=4, parents=(shards,))
    checkpoint = CheckpointRef(
        uri="/w/checkpoint", digest="7" * 64, stage="sft", step=30, recipe_fingerprint="f", parents=(plan,)
    )
    exported = storage.open_committed(str(workspace / "exports" / "one"))
    export = ExportRef(uri=exported.uri, digest=exported.digest, step=30, parents=(checkpoint,))
    folder = storage.commit_folder(str(workspace / "evaluations" / name), fill)
    path = workspace / f"{name}.json"
    reference = EvaluationRef(
        uri=folder.uri,
        digest=folder.digest,
        parents=(export, shards),
        passed=not reasons,
        reasons=reasons,
        metrics={"image_qa/accuracy": 0.75},
        blind_metrics={"image_qa/accuracy": 0.25},
    )
    write_reference(reference, path)
    return path


def section(workspace: Path, model_name: str) -> RegisterSection:
    return RegisterSection(
        workspace=str(workspace),
        run_name="tiny",
        recipe_fingerprint="f",
        recipe_yaml="seed: 3\nmodel:\n  size: tiny\n",
        tracking=TrackingConfig(model_name=model_name),
    )


def registered(workspace: Path, model_name: str, name: str, *reasons: str) -> ModelVersionRef:
    output = workspace / f"{name}.version.json"
    register.run(section(workspace, model_name), evaluation=evaluation(workspace, name, *reasons), output=output)
    return read_reference(output, ModelVersionRef)


def registry_of(workspace: Path, model_name: str) -> Registry:
    return open_registry(tracking_uri(TrackingConfig(), str(workspace)), model_name)


def versions_of(registry: Registry) -> list[str]:
    found = registry.client.search_model_versions(f"name = '{registry.name}'")
    return sorted((str(entry.version) for entry in found), key=int)


def test_a_passing_model_becomes_champion_with_its_lineage(workspace: Path) -> None:
    found = registered(workspace, "passing", "good")
    assert (found.version, found.aliases) == ("1", (CANDIDATE, CHAMPION))
    registry = registry_of(workspace, "passing")
    version = registry.client.get_model_version_by_alias("passing", CHAMPION)
    assert version.tags[DECISION_TAG] == "promoted"
    assert version.tags["checkpoint.uri"] == str(workspace / "exports" / "one")
    run = registry.client.get_run(version.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["seed"] == "3"
    assert run.data.params["sft.step"] == "30"
    assert run.data.metrics == {"image_qa/accuracy": 0.75, "blind/image_qa/accuracy": 0.25}
    assert {entry.dataset.name for entry in run.inputs.dataset_inputs} == {"image_qa", "image_qa.held-out"}
    artifacts = {entry.path for entry in registry.client.list_artifacts(version.run_id)}
    assert artifacts == {"evaluation", "lineage.mmd", "lineage.txt", "recipe.yaml"}
    (model,) = registry.client.search_logged_models([run.info.experiment_id], f"name = '{registry.name}'")
    assert {metric.key: metric.value for metric in model.metrics} == {"image_qa/accuracy": 0.75}
    assert version.source == f"models:/{model.model_id}"


def test_registering_again_changes_nothing(workspace: Path) -> None:
    first = registered(workspace, "again", "same")
    registry = registry_of(workspace, "again")
    records = registry.ledger.records()
    second = registered(workspace, "again", "same")
    assert second.version == first.version
    assert second.report["reused"]
    assert not first.report["reused"]
    assert versions_of(registry) == ["1"]
    assert registry.ledger.records() == records


def test_a_refused_model_is_candidate_only_and_says_why(workspace: Path) -> None:
    champion = registered(workspace, "refusing", "accepted")
    refused = registered(workspace, "refusing", "weak", "image_qa/accuracy is 0.1, below", "and so on")
    registry = registry_of(workspace, "refusing")
    assert refused.aliases == (CANDIDATE,)
    assert registry.aliases() == {CANDIDATE: refused.version, CHAMPION: champion.version}
    tags = registry.client.get_model_version("refusing", refused.version).tags
    assert (tags[DECISION_TAG], tags[REASON_TAG]) == ("refused", "image_qa/accuracy is 0.1, below; and so on")
    assert len(registry.ledger.records()) == 1


def test_roll_back_walks_down_the_champions_and_a_retry_does_not_undo_it(workspace: Path) -> None:
    """Would catch rolling back and forth between two versions, and a cached rerun that promotes again."""
    for name in ("r1", "r2", "r3"):
        registered(workspace, "rolling", name)
    registry = registry_of(workspace, "rolling")
    assert registry.roll_back("3 is slow") == "2"
    assert registry.roll_back("2 is worse") == "1"
    with pytest.raises(CheckpointError, match="no earlier champion"):
        registry.roll_back("nothing left")
    assert registry.aliases()[CHAMPION] == "1"
    again = registered(workspace, "rolling", "r3")
    assert again.version == "3"
    assert CHAMPION not in again.aliases
    assert registry.aliases()[CHAMPION] == "1"
    assert [record.action for record in registry.ledger.records()] == ["promote"] * 3 + ["roll back"] * 2


def test_roll_back_to_a_deleted_version_is_refused(workspace: Path) -> None:
    for name in ("d1", "d2"):
        registered(workspace, "deleting", name)
    registry = registry_of(workspace, "deleting")
    registry.client.delete_model_version("deleting", "1")
    with pytest.raises(CheckpointError, match="deleted"):
        registry.roll_back("x")
    assert registry.aliases()[CHAMPION] == "2"


def test_the_alias_follows_the_ledger(workspace: Path) -> None:
    """Somebody moves the alias by hand, or dies between ledger and alias: the ledger wins."""
    registered(workspace, "moved", "m1")
    registered(workspace, "moved", "m2", "weak")
    registry = registry_of(workspace, "moved")
    registry.client.set_registered_model_alias("moved", CHAMPION, "2")
    assert registry.reconcile() == "1"
    assert registry.aliases()[CHAMPION] == "1"
    registry.client.delete_registered_model_alias("moved", CHAMPION)
    registered(workspace, "moved", "m1")
    assert registry.aliases()[CHAMPION] == "1"


class Killed(BaseException):
    """Stands for the end of the process: nothing handles it."""


KILL_POINTS: list[tuple[str, Callable[[pytest.MonkeyPatch, Callable[..., Any]], None]]] = [
    ("before the logged model is ready", lambda p, die: p.setattr("mlflow.MlflowClient.finalize_logged_model", die)),
    ("before the version", lambda p, die: p.setattr("mlflow.MlflowClient.create_model_version", die)),
    ("before the candidate", lambda p, die: p.setattr(registry_module.Registry, "set_candidate", die)),
    ("before the ledger", lambda p, die: p.setattr(ledger_module.Ledger, "append", die)),
    ("before the alias", lambda p, die: p.setattr(registry_module.Registry, "reconcile", die)),
    ("before the decision's tags", lambda p, die: p.setattr(registry_module.Registry, "_tag", die)),
    ("before the reference", lambda p, die: p.setattr(register, "write_reference", die)),
]


@pytest.mark.parametrize(("when", "patch"), KILL_POINTS, ids=[when for when, _ in KILL_POINTS])
def test_killed_anywhere_it_is_completed(
    workspace: Path, when: str, patch: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Would catch a duplicate version, a lost promotion or a champion promoted twice after a kill."""
    model_name = when.replace(" ", "-").replace("'", "")

    def die(*args: Any, **kwargs: Any) -> None:
        raise Killed

    with monkeypatch.context() as context:
        patch(context, die)
        with pytest.raises(Killed):
            registered(workspace, model_name, model_name)
    assert not (workspace / f"{model_name}.version.json").exists()
    found = registered(workspace, model_name, model_name)
    registry = registry_of(workspace, model_name)
    assert found.aliases == (CANDIDATE, CHAMPION)
    assert versions_of(registry) == ["1"]
    assert [(record.action, record.version) for record in registry.ledger.records()] == [("promote", "1")]
    assert registry.client.get_model_version(model_name, "1").tags[DECISION_TAG] == "promoted"


def image_bytes() -> bytes:
    written = io.BytesIO()
    Image.fromarray(np.full((60, 80, 3), 90, dtype=np.uint8)).save(written, "PNG")
    return written.getvalue()


def test_the_champion_is_loaded_by_alias_and_answers(workspace: Path, tmp_path: Path) -> None:
    """MLflow's own loader, from the stored code and reference; the same answer as the model gives without MLflow."""
    import mlflow
    import pandas as pd

    from molmo2core.evaluation.serving import load_answerer
    from molmo2core.tracking.pyfunc_model import Request

    registered(workspace, "served", "served")
    uri = tracking_uri(TrackingConfig(), str(workspace))
    (tmp_path / "image.png").write_bytes(image_bytes())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", uri)
        mlflow.set_tracking_uri(uri)
        mlflow.set_registry_uri(uri)
        try:
            served = mlflow.pyfunc.load_model("models:/served@champion")
            table = pd.DataFrame(
                {
                    "prompt": ["what is this?", "what is this?", "hello"],
                    "images": [[image_bytes()], None, None],
                    "image_uris": [None, [str(tmp_path / "image.png")], None],
                }
            )
            answers = served.predict(table, params={"max_new_tokens": 12})
        finally:
            mlflow.set_registry_uri(None)
            mlflow.set_tracking_uri(None)
    export = storage.open_committed(str(workspace / "exports" / "one"))
    checkpoint = {"uri": export.uri, "digest": export.digest, "preprocessing": dataclasses.asdict(PREPROCESSING)}
    requests = [Request(prompt="what is this?", images=(image_bytes(),)), Request(prompt="hello")]
    expected = [response.text for response in load_answerer(checkpoint)(requests, 12)]
    assert list(answers["text"]) == [expected[0], expected[0], expected[1]]
    assert expected[0] != expected[1]  # the image mattered
    with pytest.raises(CheckpointError, match="digest"):
        load_answerer(checkpoint | {"digest": "0" * 64})


def decision(version: str) -> Decision:
    return Decision(action="promote", version=version, key=f"key-{version}", reason="r")


def test_an_altered_ledger_is_noticed(tmp_path: Path) -> None:
    ledger = Ledger(folder=str(tmp_path / "ledger"))
    for version in ("1", "2", "3"):
        ledger.append(lambda records, version=version: decision(version))  # type: ignore[misc]
    assert champions(ledger.records()) == ["1", "2", "3"]
    second = tmp_path / "ledger" / "000002.json"
    second.write_text(second.read_text().replace('"r"', '"another reason"'))
    with pytest.raises(DataError, match="altered"):
        ledger.records()
    second.unlink()
    with pytest.raises(DataError):
        ledger.records()


def append_at_once(ledger: Ledger, writers: int) -> None:
    """Every thread reads the ledger before any of them writes."""
    barrier = threading.Barrier(writers)

    def write(version: str) -> None:
        waited = []

        def decide(records: object) -> Decision:
            if not waited:
                waited.append(barrier.wait(timeout=20))
            return decision(version)

        ledger.append(decide)

    threads = [threading.Thread(target=write, args=(str(n),)) for n in range(writers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)


def test_simultaneous_writers_lose_nothing(tmp_path: Path) -> None:
    """Would catch a ledger in which the second writer overwrites the first."""
    ledger = Ledger(folder=str(tmp_path / "ledger"))
    append_at_once(ledger, 6)
    assert sorted(champions(ledger.records())) == [str(n) for n in range(6)]


def test_simultaneous_writers_lose_nothing_in_an_object_store(s3_bucket: str) -> None:
    ledger = Ledger(folder=f"{s3_bucket}/promotions/m")
    append_at_once(ledger, 4)
    assert sorted(champions(ledger.records())) == [str(n) for n in range(4)]


def test_command_line_shows_and_rolls_back(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("c1", "c2"):
        registered(workspace, "commanded", name)
    where = ["--workspace", str(workspace), "--name", "commanded"]
    assert registry_module.main(["rollback", *where, "--reason", "too slow"]) == 0
    assert registry_module.main(["show", *where]) == 0
    shown = capsys.readouterr().out
    assert "version 1  [champion]" in shown
    assert "roll back -> version 1" in shown
    assert "too slow" in shown
    assert registry_module.main(["reconcile", *where]) == 0
    assert registry_module.main(["rollback", *where, "--reason", "again"]) == 2
    assert capsys.readouterr().err.startswith("CheckpointError")


def test_command_line_without_a_store_makes_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert registry_module.main(["show", "--workspace", str(tmp_path)]) == 2
    assert "no such tracking store" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
