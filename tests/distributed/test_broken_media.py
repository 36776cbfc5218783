"""Broken media are counted over all ranks and over a resume, and listed with reason and substitute."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from molmo2core.loading.deviations import DEVIATIONS
from molmo2core.testing.distributed import run_distributed
from molmo2core.testing.loading import GLOBAL_BATCH, PACKS, loading_examples, open_loading_data, write_loading_data
from molmo2core.testing.loading_ranks import train_with_broken_media
from molmo2core.testing.training import training_config

STEPS = PACKS // GLOBAL_BATCH


def occurrences(folder: Path) -> dict[str, list[tuple[int, int]]]:
    """uid -> (step, rank of two) of each of its packs."""
    data, examples = open_loading_data(folder), loading_examples()
    found: dict[str, list[tuple[int, int]]] = {}
    for pack in range(PACKS):
        step, slot = divmod(pack, GLOBAL_BATCH)
        for entry in data.plan.pack(pack):
            found.setdefault(examples[entry["sample"]].uid, []).append((step + 1, slot // (GLOBAL_BATCH // 2)))
    return found


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, list[dict[str, str]]]:
    """Two media are broken: one is first met in step 1, on one rank only, and not again until the other one is met, on
    the other rank.  (folder, that step, results of both ranks)"""
    data, out = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("out")
    write_loading_data(data)
    places = {uid: found for uid, found in occurrences(data).items() if uid.startswith("images")}
    first, second, step = next(
        (one, other, places[other][0][0])
        for one in places
        for other in places
        if places[one][0][0] == 1 < places[other][0][0]
        and places[one][0][1] != places[other][0][1]
        and (len(places[one]) == 1 or places[one][1][0] > places[other][0][0])
    )
    config = training_config(steps=STEPS, global_batch_packs=GLOBAL_BATCH, num_processes=2, save_interval_steps=1)
    return out, step, run_distributed(train_with_broken_media, 2, data, out, (first, second), config)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_list_is_the_same_after_a_resume(trained: tuple[Path, int, list[dict[str, str]]]) -> None:
    """Catches lines of one rank only, lines twice after a resume, and a count that starts again at zero."""
    out, _, results = trained
    assert {result["undisturbed"] for result in results} == {"no error"}
    assert all("asked to stop after step 1" in result["stopped"] for result in results)
    assert {result["gone on"] for result in results} == {"no error"}
    listed = lines(out / "undisturbed" / DEVIATIONS)
    assert listed == lines(out / "stopped" / DEVIATIONS)
    assert {line["kind"] for line in listed} == {"replaced"}
    assert all("truncated JPEG" in line["why"] for line in listed)
    assert {line["pack"] % GLOBAL_BATCH // 2 for line in listed} == {0, 1}, "both ranks"
    assert all(line["step"] == line["pack"] // GLOBAL_BATCH + 1 for line in listed)
    for name in ("undisturbed", "stopped"):
        counts = [line["replaced"] for line in lines(out / name / "metrics.jsonl")]
        assert counts == [sum(line["step"] <= step for line in listed) for step in range(1, STEPS + 1)]


def test_too_many_end_training_on_all_ranks_at_once(trained: tuple[Path, int, list[dict[str, str]]]) -> None:
    """Each rank saw one broken medium, and the resumed run again only the second.  Catches a limit per rank, per worker
    or per attempt, and a rank that stops alone."""
    _, step, results = trained
    assert results[0]["strict"] == results[1]["strict"]
    assert results[0]["strict"].startswith(f"DataError: training step {step}: 2 of ")
    assert "2 media do not decode, among them images/" in results[0]["strict"]
    assert [result["strict gone on"] for result in results] == [results[0]["strict"]] * 2
