"""Steps that are refused: before they change a weight, with the names of what was in them, and spikes that stay."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from molmo2core.errors import PlatformError, RecipeError
from molmo2core.stages.inspect_data import _parser
from molmo2core.testing.tiny_model import tiny_model
from molmo2core.testing.training import training_config
from molmo2core.testing.training_ranks import signal_after, train_tiny
from molmo2core.training import batches
from molmo2core.training.callbacks.group_clipping import GroupClipping
from molmo2core.training.callbacks.step_guard import StepGuard
from molmo2core.training.config import GroupSchedule, OptimizerConfig, SpikeGuardConfig, TrainingConfig
from molmo2core.training.refused_steps import described, inspect_command, suspects

BAD_PACK = 6
"""Of the second step: a global batch is four packs."""


def refused(folder: Path, config: TrainingConfig, **named: Any) -> tuple[RecipeError, dict[str, Any]]:
    """The error, and what is in the file beside the metrics."""
    with pytest.raises(RecipeError) as error:
        train_tiny(folder, config, **named)
    (file,) = folder.glob("refused-step-*.json")
    return error.value, json.loads(file.read_text())


def microbatch(loss: float, *packs: int, rank: int = 0) -> dict[str, Any]:
    named = [{"pack": number, "examples": [f"images/tree-{number}"]} for number in packs]
    return {"rank": rank, "loss": str(loss), "packs": named}


def test_a_step_that_is_no_number_is_refused_before_it_changes_a_weight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Would catch a guard that looks after the update (all weights are NaN then), names of another step's examples, and
    packs of the step before in the command."""
    monkeypatch.setattr(batches, "MERGED_TOKENS", 64)  # a pass for each pack, as on a GPU
    model = tiny_model()
    error, file = refused(tmp_path / "bad", training_config(), loader={"bad_pack": BAD_PACK}, model=model)
    assert error.where == "test: training step 2"
    assert f"loss nan on rank 0, pack {BAD_PACK}: images/tree-6, texts/text-6" in error.found
    assert f"inspect PLAN --recipe RECIPE --stage test --pack {BAD_PACK}`" in error.mend
    assert [[pack["pack"] for pack in part["packs"]] for part in file["microbatches"]] == [[4], [5], [6], [7]]
    assert file["suspects"] == [file["microbatches"][2]]
    assert all(float(part["loss"]) > 0 for part in file["microbatches"] if part["packs"][0]["pack"] != BAD_PACK)
    one_step = tiny_model()
    with signal_after(1), pytest.raises(PlatformError):
        train_tiny(tmp_path / "good", training_config(), model=one_step)
    for name, weight in one_step.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name
    unguarded = tiny_model()
    with (
        mock.patch.object(StepGuard, "after_train_batch", lambda *_: None),
        mock.patch.object(StepGuard, "batch_end", lambda *_: None),
    ):
        train_tiny(tmp_path / "unguarded", training_config(), loader={"bad_pack": BAD_PACK}, model=unguarded)
    assert not torch.isfinite(unguarded.decoder.norm.weight).any()


def test_losses_that_stay_high_end_training_and_a_single_one_does_not(tmp_path: Path) -> None:
    """Training that explodes by a rate of 1.  Would catch spikes that raise their own measure, a patience that is one
    more or less, and a resume that forgets what it had seen."""
    schedule = GroupSchedule(learning_rate=1.0, warmup_steps=0)
    config = training_config(
        steps=12,
        save_interval_steps=1,
        optimizer=OptimizerConfig(vision_encoder=schedule, connector=schedule, decoder=schedule),
        spike_guard=SpikeGuardConfig(window=1, factor=1.5, patience=3),
    )
    error, file = refused(tmp_path / "whole", config)
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, file["step"]))
    assert [line["spikes"] for line in lines][-2:] == [1, 2]
    before = [line["loss"] for line in lines if not line["spikes"]]
    assert f"less than {1.5 * before[-1]:.3f}, 1.5 times the mean of 1 steps" in error.expected
    assert "spike number 3 in a row" in error.found
    assert all(line["loss"] >= 1.5 * before[-1] for line in lines[-2:])
    with signal_after(file["step"] - 1), pytest.raises(PlatformError):
        train_tiny(tmp_path / "resumed", config)
    again, same = refused(tmp_path / "resumed", config)
    assert (again.found, same["step"]) == (error.found, file["step"])
    off = replace(config, steps=file["step"], spike_guard=replace(config.spike_guard, patience=0))
    _, lines = train_tiny(tmp_path / "off", off)
    assert {line["spikes"] for line in lines} == {0}


def test_noise_beside_a_loss_of_nothing_is_no_spike(tmp_path: Path) -> None:
    """A model that knows its data by heart has losses of 0.01, some of them 0.1: four in a row would end it."""
    clipping = GroupClipping(1.0)
    found = []
    for least_rise in (0.0, 0.5):
        spikes = SpikeGuardConfig(window=2, least_rise=least_rise)
        guard = StepGuard(tmp_path / "metrics.jsonl", name="test", clipping=clipping, spikes=spikes)
        for loss in (0.01, 0.02):
            guard._count(loss)
        found.append(guard.limit)
    assert found == pytest.approx([0.03, 0.515])


def test_suspects_are_what_is_worst() -> None:
    good, high, bad = microbatch(2.0, 1), microbatch(9.0, 2), microbatch(float("nan"), 3)
    assert suspects([good, bad, high], limit=4.0) == [bad]
    assert suspects([good, high], limit=4.0) == [high]
    assert suspects([good, high], limit=float("inf")) == [high], "finite losses of a gradient that is not"


def test_a_message_stays_short_and_its_command_is_understood(tmp_path: Path) -> None:
    """Would catch a command that the parser of `inspect` refuses, and a message with a thousand names."""
    many = [microbatch(3.0, *range(100), rank=rank) for rank in range(64)]
    assert len(described(many)) < 2000 and described(many).endswith("and 58 more")
    (tmp_path / "plan.json").touch()
    command = inspect_command(tmp_path, "sft", [microbatch(3.0, 17, 4)]).split()
    assert command[:3] == ["python", "-m", "molmo2core.loading"]
    options = _parser().parse_args(command[3:])
    assert (options.data, options.stage, options.pack) == ([str(tmp_path / "plan.json")], "sft", [4, 17])
