"""Broken media are counted over all ranks and over a resume, and listed with reason and substitute."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from molmo2core.loading.deviations import DEVIATIONS
from molmo2core.testing.distributed import run_distributed
from molmo2core.testing.loading import GLOBAL_BATCH, PACKS, write_loading_data
from molmo2core.testing.loading_ranks import train_with_broken_media
from molmo2core.testing.training import training_config

STEPS = PACKS // GLOBAL_BATCH


PLACES = {1: [0, 17], 2: [10, 23]}
"""Two samples that do not decode and the packs in which they stand: the first in step 1 on one rank and not again until
the second in step 3 on the other; later both again."""
LIMIT_STEP = 3


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, str]]]:
    """(folder, results of both ranks)"""
    data, out = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("out")
    write_loading_data(data)
    config = training_config(steps=STEPS, global_batch_packs=GLOBAL_BATCH, num_processes=2, save_interval_steps=1)
    return out, run_distributed(train_with_broken_media, 2, data, out, PLACES, config)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_list_is_the_same_after_a_resume(trained: tuple[Path, list[dict[str, str]]]) -> None:
    """Catches lines of one rank only, lines twice after a resume, and a count that starts again at zero."""
    out, results = trained
    assert {result["undisturbed"] for result in results} == {"no error"}
    assert all("asked to stop after step 1" in result["stopped"] for result in results)
    assert {result["gone on"] for result in results} == {"no error"}
    listed = lines(out / "undisturbed" / DEVIATIONS)
    assert listed == lines(out / "stopped" / DEVIATIONS)
    assert {line["kind"] for line in listed} == {"replaced"}
    assert all("truncated JPEG" in line["why"] for line in listed)
    assert [line["pack"] for line in listed] == [0, 10, 17, 23], "of both ranks"
    assert all(line["step"] == line["pack"] // GLOBAL_BATCH + 1 for line in listed)
    for name in ("undisturbed", "stopped"):
        counts = [line["replaced"] for line in lines(out / name / "metrics.jsonl")]
        assert counts == [sum(line["step"] <= step for line in listed) for step in range(1, STEPS + 1)]


def test_too_many_end_training_on_all_ranks_at_once(trained: tuple[Path, list[dict[str, str]]]) -> None:
    """Each rank saw one broken medium, and the resumed run again only the second.  Catches a limit per rank, per worker
    or per attempt, and a rank that stops alone."""
    _, results = trained
    assert results[0]["strict"] == results[1]["strict"]
    assert results[0]["strict"].startswith(f"DataError: training step {LIMIT_STEP}: 2 of ")
    assert "2 media do not decode, among them images/" in results[0]["strict"]
    assert [result["strict gone on"] for result in results] == [results[0]["strict"]] * 2
