"""Losses on held-out examples, and answers, while training goes on: real Composer and shards, one and two ranks."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from molmo2core.annotations import TASKS
from molmo2core.loading.collator import collate_packs
from molmo2core.packing.concat import pack_examples
from molmo2core.references import ShardsRef
from molmo2core.shards.reader import ExampleReader
from molmo2core.testing import validation_ranks as ranks
from molmo2core.testing.distributed import run_distributed
from molmo2core.testing.tiny_model import tiny_model
from molmo2core.testing.training import training_config
from molmo2core.testing.validation_ranks import Found
from molmo2core.training.composer_model import TrainedMolmo2
from molmo2core.training.config import DropoutConfig, ValidationConfig
from molmo2core.training.microbatch import MicrobatchMaker
from molmo2core.training.validation_files import ANSWERS, PAGES, VALIDATION

DUE = [2, 4, 5]
"""Every second step, and the last."""


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[ShardsRef]:
    return ranks.write_held_out_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def alone(shards: list[ShardsRef], tmp_path_factory: pytest.TempPathFactory) -> tuple[Found, Found]:
    """One process, without and with validation."""
    folder = tmp_path_factory.mktemp("alone")
    plain = ranks.train_validated(folder / "plain", shards, validation=ValidationConfig())
    return plain, ranks.train_validated(folder / "validated", shards)


@pytest.fixture(scope="module")
def together(shards: list[ShardsRef], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Found]:
    """Rank 0 of two."""
    folder = tmp_path_factory.mktemp("together")
    return run_distributed(ranks.validate_in_every_way, 2, folder, shards, timeout_seconds=300)[0]


def lines_of(found: Found, name: str = VALIDATION) -> list[dict[str, Any]]:
    """Without times."""
    lines = [json.loads(line) for line in found[name]]
    return [{key: value for key, value in line.items() if key not in ("seconds", "time_ms")} for line in lines]


def largest_difference(found: Found, expected: Found) -> float:
    assert found["weights"].keys() == expected["weights"].keys()
    return max(float((found["weights"][name] - value).abs().max()) for name, value in expected["weights"].items())


@torch.no_grad()
def losses_one_by_one(weights: dict[str, torch.Tensor], shards: Sequence[ShardsRef], folder: Path) -> dict[str, Any]:
    """The same losses from a plain loop over examples, each alone in its sequence: no packs, no ranks, no Composer."""
    model = tiny_model()
    model.load_state_dict(weights)
    trained = TrainedMolmo2(model, z_coefficient=training_config().z_loss).eval()
    reader = ExampleReader(shards, "validation", folder)
    maker = MicrobatchMaker(im_patch_id=model.im_patch_id, dropout=DropoutConfig())
    sums: defaultdict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for numbers in reader.ranges.values():
        for number in numbers[: ranks.VALIDATION_CONFIG.examples_per_dataset]:
            example = reader.example(number)
            tokenized = ranks.PREPROCESSOR.tokenize(example, epoch=0)
            batch = collate_packs([pack_examples([tokenized], ranks.PREPROCESSOR.geometry.max_pool)])
            microbatch: Any = maker.make(batch["packs"], batch["tasks"])
            trained.loss(trained(microbatch), microbatch)
            assert trained.parts is not None
            sums["z"][0] += float(trained.parts.z)
            sums["z"][1] += float(microbatch["loss_weight"])
            for place, loss in zip(trained.parts.places.tolist(), trained.parts.token_losses.tolist(), strict=True):
                weight = float(microbatch["loss_weights"][place])
                for name in ("all", example.dataset, TASKS[microbatch["task_ids"][place]]):
                    sums[name][0] += weight * loss
                    sums[name][1] += weight
    return {name: total / weight for name, (total, weight) in sums.items()}


def test_losses_are_those_of_the_examples(alone: tuple[Found, Found], shards: list[ShardsRef], tmp_path: Path) -> None:
    """Would catch dropout left on, other loss weights than training's, examples counted twice or not at all, tasks or
    datasets that get each other's targets in a merged pack, padding that is counted, and a z-loss that is no mean.

    Tolerance: sums of float32 logits in another order; measured 2e-7 relative.
    """
    _, validated = alone
    assert [line["step"] for line in lines_of(validated)] == DUE
    last = lines_of(validated)[-1]
    expected = losses_one_by_one(validated["weights"], shards, tmp_path)
    assert set(last["loss_by_dataset"]) == {"images", "texts"} and set(last["loss_by_task"]) == {"image_qa", "text"}
    assert last["loss"] == pytest.approx(expected["all"], rel=2e-6)
    assert last["z"] == pytest.approx(expected["z"], rel=2e-6)
    for name in ("images", "texts"):
        assert last["loss_by_dataset"][name] == pytest.approx(expected[name], rel=2e-6), name
    for name in ("image_qa", "text"):
        assert last["loss_by_task"][name] == pytest.approx(expected[name], rel=2e-6), name
    assert last["loss_by_task"]["text"] != pytest.approx(last["loss"], rel=1e-3)
    assert last["examples"] == 7 + 5
    assert lines_of(validated)[0]["loss"] > last["loss"]


def test_training_does_not_notice(alone: tuple[Found, Found], together: dict[str, Found]) -> None:
    """Bit for bit, with dropout, on one and two ranks.  Would catch a random number drawn, a model left in evaluation
    mode, parameters left gathered or a position moved."""
    assert largest_difference(alone[1], alone[0]) == 0.0
    assert largest_difference(together["validated"], together["plain"]) == 0.0
    for plain, validated in (alone, (together["plain"], together["validated"])):
        assert torch.equal(validated["random"], plain["random"])
    assert alone[0][VALIDATION] == together["plain"][VALIDATION] == []
    for name in ("step", "loss", "packs", "tokens"):
        plain, validated = (lines_of(together[way], "metrics.jsonl") for way in ("plain", "validated"))
        assert [line[name] for line in validated] == [line[name] for line in plain], name


@pytest.mark.parametrize("way", ["validated", "shared"])
def test_two_ranks_find_the_same_losses(alone: tuple[Found, Found], together: dict[str, Found], way: str) -> None:
    """Each with its packs, or sharing every sequence.  Would catch targets counted by both ranks or lost at the border
    of two, losses averaged by rank, and a rank without a last pack, which the other would wait for.

    Tolerance: weights of two ranks differ from one's by 3e-8 after these steps; measured 4e-7 relative.
    """
    assert together["validated"]["packs"] % 4 in (1, 2)  # of ranks that take two at a time, one has none at the end
    found, expected = lines_of(together[way]), lines_of(alone[1])
    assert [line["step"] for line in found] == DUE
    for line, other in zip(found, expected, strict=True):
        assert line["weight"] == pytest.approx(other["weight"], rel=1e-12)
        assert line["loss"] == pytest.approx(other["loss"], rel=5e-6)
        assert line["z"] == pytest.approx(other["z"], rel=5e-6)
        assert line["loss_by_dataset"] == pytest.approx(other["loss_by_dataset"], rel=5e-6)
        assert line["loss_by_task"] == pytest.approx(other["loss_by_task"], rel=5e-6)


@pytest.mark.parametrize(("way", "written"), [("within", [2]), ("after", [2, 4])])
def test_stopped_while_validating_nothing_is_twice_or_lost(
    together: dict[str, Found], way: str, written: list[int]
) -> None:
    """At step 4, after the checkpoint of step 3: the step and its validation are done again, to equal bits.  Would
    catch half a validation that is written, one that is written twice, and one that is left out after a resume."""
    stopped, resumed, undisturbed = (together[name] for name in (f"stopped {way}", f"resumed {way}", "validated"))
    assert stopped["how"] == "stopped"
    assert [line["step"] for line in lines_of(stopped)] == written
    assert len(stopped[ANSWERS]) == 4 * (4 in written) and list(stopped[PAGES]) == ["step-4.html"] * (4 in written)
    assert lines_of(resumed) == lines_of(undisturbed)
    assert resumed[ANSWERS] == undisturbed[ANSWERS]
    assert resumed[PAGES] == undisturbed[PAGES]
    assert largest_difference(resumed, undisturbed) == 0.0


def test_a_training_that_is_asked_to_stop_stops(together: dict[str, Found]) -> None:
    """At step 3, when nothing is due.  Composer's own intervals count the end of every training: a validation of
    minutes when seconds are left, and one that an undisturbed training does not have."""
    stopped = together["asked to stop"]
    assert [line["step"] for line in lines_of(stopped, "metrics.jsonl")] == [1, 2, 3]
    assert [line["step"] for line in lines_of(stopped)] == [2] and stopped[PAGES] == {}


def test_answers_are_written_with_their_pictures(alone: tuple[Found, Found], together: dict[str, Found]) -> None:
    """Of both tasks, the same questions at each step, also where weights are gathered from two ranks.  Would catch
    answers of old weights or of weights that were not gathered whole (the other rank's halves would be zeros)."""
    for found in (alone[1], together["validated"], together["shared"]):
        lines = [json.loads(line) for line in found[ANSWERS]]
        asked = [(line["task"], line["uid"]) for line in lines]
        assert asked[:4] == asked[4:] and len(lines) == 8
        assert sorted(task for task, _ in asked[:4]) == ["image_qa", "image_qa", "text", "text"]
        assert [line["step"] for line in lines] == [4] * 4 + [5] * 4
        assert {line["expected"] for line in lines if line["task"] == "text"} == {"one two"}
        assert sorted(found[PAGES]) == ["step-4.html", "step-5.html"]
        assert all(page.count("<img") == 2 for page in found[PAGES].values())
    answers = [[json.loads(line)["answer"] for line in found[ANSWERS]] for found in (alone[1], together["validated"])]
    assert answers[0] == answers[1] and len(set(answers[0])) > 2


def test_an_empty_split_is_said(together: dict[str, Found], capsys: pytest.CaptureFixture[str], shards: Any) -> None:
    """A recipe whose manifests hold no validation rows trains all the same."""
    assert together["empty"][VALIDATION] == [] and together["empty"]["packs"] == 0
    assert largest_difference(together["empty"], together["plain"]) == 0.0
    config = ranks.training_config(validation=ValidationConfig(interval_steps=1, split="test"))
    opened = ranks.open_held_out(
        ranks.section_of(config), ranks.plan_of(shards), ranks.PREPROCESSOR, Path("cache"), speaks=True
    )
    assert opened is None
    assert "no validation: no dataset has examples in split 'test'" in capsys.readouterr().out
