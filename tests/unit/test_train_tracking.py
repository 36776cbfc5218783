"""Metrics on their way to MLflow, with a store that fails and settings that change."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from molmo2core.recipe.sections import TrainSection
from molmo2core.stages import train_tracking
from molmo2core.stages.train_tracking import following
from molmo2core.testing.training import train_section, training_config
from molmo2core.tracking.config import TrackingConfig
from molmo2core.tracking.mlflow_run import connect


def section_in(folder: Path, uri: str) -> TrainSection:
    training = training_config(steps=4, log_interval_steps=1)
    return train_section(folder, training, tracking=TrackingConfig(uri=uri))


def write_steps(folder: Path, *steps: int) -> None:
    with (folder / "metrics.jsonl").open("a") as file:
        for step in steps:
            line = {"step": step, "loss": 7.0 / step, "drawn": {"d": 2}, "examples": 2, "packs": 1, "time_ms": step}
            line |= {"tokens": 9, "seconds": 0.5, "fill": {"tokens": 0.5}, "gradient_norm": {"decoder": 1.0}}
            file.write(json.dumps(line) + "\n")


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_store_that_is_down_for_a_while_misses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Down when training starts; later the training is resumed with another interval of saving.  Would catch a curve
    that ends with the first failure, for days; one that doubles when it is sent again; and a run whose
    parameters refuse a retry."""
    monkeypatch.setattr(train_tracking, "_RETRY_SECONDS", (0.05, 0.1))
    monkeypatch.setattr(train_tracking, "_POLL_SECONDS", 0.05)
    place = tmp_path / "store"
    place.touch()
    section = section_in(tmp_path, f"sqlite:///{place}/mlflow.db")
    printed = ""

    def said(text: str) -> bool:
        nonlocal printed
        printed += capsys.readouterr().out
        return text in printed

    with following(tmp_path, section, key="k", inputs=[], changeable=["save_interval_steps"]):
        write_steps(tmp_path, 1, 2)
        wait_for(lambda: said("warning: training is not tracked in MLflow"))
        place.unlink()
        wait_for(lambda: (place / "mlflow.db").is_file())
        client = connect(section.tracking.uri)

        def points() -> list[tuple[int, float]]:
            runs = client.search_runs(["1"])
            history = client.get_metric_history(runs[0].info.run_id, "loss") if runs else []
            return sorted((point.step, point.value) for point in history)

        wait_for(lambda: len(points()) == 2)
        write_steps(tmp_path, 3)
    assert points() == [(step, 7.0 / step) for step in (1, 2, 3)]
    capsys.readouterr()
    section = replace(section, training=replace(section.training, save_interval_steps=7))
    with following(tmp_path, section, key="k", inputs=[], changeable=["save_interval_steps"]):
        write_steps(tmp_path, 4)
    assert "warning" not in capsys.readouterr().out
    assert points() == [(step, 7.0 / step) for step in (1, 2, 3, 4)]
    (run,) = client.search_runs(["1"])
    assert (run.info.status, run.data.tags["training.save_interval_steps"]) == ("FINISHED", "7")
    assert run.data.params["global_batch_packs"] == "4" and "save_interval_steps" not in run.data.params
