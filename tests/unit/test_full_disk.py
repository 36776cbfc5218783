"""No disk space, from the kernel itself: libraries that hide it, by their own errors or by going on."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from molmo2core import storage
from molmo2core.checkpoints.weight_files import write_weights
from molmo2core.errors import PlatformError
from molmo2core.manifest.expectations import INDEX, run_suite
from molmo2core.manifest.rules import RULES
from molmo2core.packing.config import PackingConfig
from molmo2core.packing.plan import ENTRY, PackPlan, PlannedPacks
from molmo2core.packing.plan_files import write_plan
from molmo2core.tracking.config import TrackingConfig
from molmo2core.tracking.mlflow_run import open_run, tracking_uri


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def weights(folder: Path) -> None:
    write_weights(folder, [("weight", torch.zeros(100_000))], shard_bytes=1 << 30)


def plan(folder: Path) -> None:
    entries, offsets = np.zeros(10_000, ENTRY), np.array([0, 10_000])
    packs = PackPlan(entries=entries, pack_offsets=offsets, packing=PackingConfig(sequence_tokens=8, crop_budget=1))
    planned = PlannedPacks(
        plan=packs, tokens=np.array([8]), crops=np.array([0]), draws={"d": 10_000}, num_samples={"d": 9}, left_out=()
    )
    write_plan([planned], {"d": 1.0}, folder)


def data_docs(folder: Path) -> None:
    row: dict[str, Any] = {INDEX: 0, "dataset": "d"} | dict.fromkeys(RULES, 0) | {"num_annotations": 1}
    run_suite([row], run_name="t", docs=folder / "data_docs")


@pytest.mark.parametrize("write", [weights, plan, data_docs])
def test_a_full_disk_is_named_and_leaves_nothing(
    write: Callable[[Path], None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """safetensors raises no OSError, numpy one without errno, Great Expectations logs a stack trace and goes on."""

    def fill(folder: Path) -> dict[str, Any]:
        write(folder)
        return {}

    with files_of_at_most(20_000), pytest.raises(PlatformError, match=r"cannot write.*File too large.*free space"):
        storage.commit_folder(str(tmp_path / "made"), fill)
    assert list(tmp_path.iterdir()) == []
    assert "Traceback" not in caplog.text


def test_a_full_artifact_store_is_worth_another_try(tmp_path: Path) -> None:
    """MLflow lets the OSError of copying a file through."""
    report = tmp_path / "report.html"
    report.write_bytes(bytes(4_000_000))
    uri = tracking_uri(TrackingConfig(), str(tmp_path))
    with (
        pytest.raises(PlatformError, match=r"File too large.*has space"),
        open_run(uri, "experiment", "run", "key", {}) as run,
        files_of_at_most(2_000_000),
    ):
        run.log_artifact(report)
