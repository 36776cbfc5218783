"""Each guard against an upstream fault, beside the fault that it is for."""

from __future__ import annotations

import logging
import resource
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from composer import Callback, Time, Trainer
from composer.loggers import LoggerDestination
from composer.utils import collect_env

from molmo2core.errors import PlatformError, RecipeError
from molmo2core.testing.tiny_model import random_model, tiny_model
from molmo2core.testing.training import PACKING, pack_loader, training_config
from molmo2core.testing.training_ranks import metrics_of, signal_after, train_tiny
from molmo2core.training import trainer
from molmo2core.training.checkpoint_folders import saved_steps
from molmo2core.training.config import DropoutConfig
from molmo2core.training.optimizer import learning_rate

DROPOUT = DropoutConfig(residual=0.2, response_residual=0.2)
COMPOSERS_OWN = collect_env.get_cpu_model
"""Before any training in this process has replaced it."""


def assert_identical(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if not found[name].equal(expected[name])] == []


def test_a_resumed_run_goes_on_with_the_dropout_of_the_undisturbed_one(tmp_path: Path) -> None:
    """Whatever the state of the random generators, which Composer restores at batch 0 only: masks follow from the pack.
    Here they are another at each step."""
    config = training_config(dropout=DROPOUT)
    whole, _ = train_tiny(tmp_path / "whole", config)
    with signal_after(2), pytest.raises(PlatformError, match="asked to stop after step 2 of 4"):
        train_tiny(tmp_path / "stopped", config)

    class Reseed(Callback):  # type: ignore[misc]
        def batch_start(self, state: Any, logger: Any) -> None:
            torch.manual_seed(1234 + state.timestamp.batch.value)

    def reseeded(**arguments: Any) -> Trainer:
        return Trainer(**arguments | {"callbacks": [Reseed(), *arguments["callbacks"]]})

    with mock.patch.object(trainer, "Trainer", reseeded):
        resumed, lines = train_tiny(tmp_path / "stopped", config)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert_identical(resumed, whole)
    without, _ = train_tiny(tmp_path / "without", training_config())
    assert not without["decoder.embedding.base"].equal(whole["decoder.embedding.base"])


def test_a_run_killed_after_its_last_step_only_hands_its_weights_over(tmp_path: Path) -> None:
    """Composer refuses to fit a run that has no step left."""
    first, lines = train_tiny(tmp_path, training_config())
    again, same = train_tiny(tmp_path, training_config())
    assert_identical(again, first)
    assert same == lines


def test_another_recipes_training_is_taken_up_with_the_own_recipe(tmp_path: Path) -> None:
    """Would catch AdamW's constants that come back with its moments, where only learning rates were set anew; weights
    of more steps that pass for those of fewer; and a model with fewer layers, which Composer fills without a word."""
    config = training_config(steps=3)
    train_tiny(tmp_path, config)
    used: list[Any] = []

    class Note(Callback):  # type: ignore[misc]
        def batch_end(self, state: Any, logger: Any) -> None:
            groups = state.optimizers[0].param_groups
            used.extend((group["betas"], group["eps"], group["weight_decay"]) for group in groups)

    def noted(**arguments: Any) -> Trainer:
        return Trainer(**arguments | {"callbacks": [*arguments["callbacks"], Note()]})

    other = replace(config.optimizer, betas=(0.5, 0.6), eps=1e-3, weight_decay=0.1)
    with mock.patch.object(trainer, "Trainer", noted):
        train_tiny(tmp_path, replace(config, steps=4, optimizer=other))
    assert used == [((0.5, 0.6), 1e-3, 0.1)] * 3, "three groups in one step"
    with pytest.raises(RecipeError, match=r"training.steps: 3, and .*/ba4 of step 4 .* expected 4 or more"):
        train_tiny(tmp_path, config)
    sizes = tiny_model().config
    shallow = random_model(replace(sizes, decoder=replace(sizes.decoder, num_layers=2)), seed=0)
    with pytest.raises(RecipeError, match=r"/ba4, of another model"):
        train_tiny(tmp_path, replace(config, steps=5), model=shallow)


def test_zero_steps_hand_over_the_weights_as_they_are(tmp_path: Path) -> None:
    model = tiny_model()
    device, _, _ = trainer.start_ranks(training_config(steps=0))
    config = training_config(steps=0)
    weights = trainer.train(
        model,
        pack_loader(model.config, config),
        config,
        device=device,
        folder=tmp_path,
        metrics=tmp_path / "metrics.jsonl",
        name="test",
        seed=0,
        packing=PACKING,
    )
    assert_identical(weights, tiny_model().state_dict())


def test_composers_autoresume_loses_a_run_between_two_links(tmp_path: Path) -> None:
    """A fault behind `CheckpointWriter`: Composer deletes its link before it makes the next one."""

    class Seen(logging.Handler):
        def __init__(self) -> None:
            super().__init__()
            self.messages: list[str] = []

        def emit(self, record: logging.LogRecord) -> None:
            self.messages.append(record.getMessage())

    seen = Seen()
    log = logging.getLogger("composer.trainer.trainer")
    log.addHandler(seen)
    log.setLevel(logging.INFO)

    def with_composers_saver(**arguments: Any) -> Trainer:
        named = {"autoresume": True, "load_path": None, "callbacks": arguments["callbacks"][:-1]}
        named |= {"save_folder": str(tmp_path), "save_filename": "ba{batch}.pt", "save_latest_filename": "latest.pt"}
        return Trainer(**arguments | named, save_interval="2ba", save_overwrite=True)

    try:
        with mock.patch.object(trainer, "Trainer", with_composers_saver), mock.patch.dict("os.environ", NODE_RANK="0"):
            train_tiny(tmp_path, training_config())
            (tmp_path / "latest.pt").unlink()
            assert (tmp_path / "ba4.pt").is_file()
            seen.messages.clear()
            train_tiny(tmp_path, training_config())
    finally:
        log.removeHandler(seen)
        log.setLevel(logging.NOTSET)
    assert "No previous autoresume checkpoint found" in seen.messages


def test_composers_scheduler_would_repeat_the_first_rate(tmp_path: Path) -> None:
    """The fault behind `GroupLearningRates`, and the rates that training really uses."""
    from composer.optim import LinearWithWarmupScheduler

    config = training_config(steps=6)
    rates: list[float] = []

    class Rates(LoggerDestination):  # type: ignore[misc]
        def after_train_batch(self, state: Any, logger: Any) -> None:
            rates.append(state.optimizers[0].param_groups[0]["lr"])

    def with_scheduler(**arguments: Any) -> Trainer:
        arguments["callbacks"] = [*arguments["callbacks"][1:], Rates()]
        for group in arguments["optimizers"].param_groups:
            group["lr"] = 1e-3
        schedule = LinearWithWarmupScheduler(t_warmup=Time.from_batch(2))
        return Trainer(**arguments, schedulers=schedule, step_schedulers_every_batch=True)

    with mock.patch.object(trainer, "Trainer", with_scheduler):
        train_tiny(tmp_path / "composer", config)
    assert rates[0] == rates[1] == 0.0
    train_tiny(tmp_path / "ours", config)
    found = [line["learning_rate"]["decoder"] for line in metrics_of(tmp_path / "ours")]
    schedule = config.optimizer.decoder
    assert found == [learning_rate(schedule, step=step, steps=6, final_fraction=0.1) for step in range(1, 7)]
    assert found[0] == 5e-4 and found[1] == 1e-3


def test_an_infinite_loss_stops_before_a_checkpoint(tmp_path: Path) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.decoder.norm.weight.fill_(float("inf"))
    with pytest.raises(RecipeError, match="training step 1"):
        train_tiny(tmp_path, training_config(save_interval_steps=1), model=model)
    assert saved_steps(str(tmp_path)) == []


def test_no_process_that_may_spin_for_ever_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """py-cpuinfo's, which a Trainer starts to learn the processor's name.  Left alone, Composer asks it."""

    class Asked(Exception):
        pass

    def ask() -> None:
        raise Asked

    monkeypatch.setattr(collect_env.cpuinfo, "get_cpu_info", ask)
    with pytest.raises(Asked):
        COMPOSERS_OWN.__wrapped__()  # it remembers an answer
    monkeypatch.setattr(collect_env, "get_cpu_model", COMPOSERS_OWN.__wrapped__)
    train_tiny(tmp_path, training_config(steps=1))


def test_half_precision_on_a_cpu_is_refused() -> None:
    with pytest.raises(RecipeError, match="amp_bf16"):
        trainer.start_ranks(training_config(precision="amp_bf16"))


def test_metrics_of_steps_that_are_done_again_are_dropped(tmp_path: Path) -> None:
    """A killed run wrote lines past its last checkpoint, the last of them in part."""
    train_tiny(tmp_path, training_config(save_interval_steps=2))
    path = tmp_path / "metrics.jsonl"
    shutil.rmtree(tmp_path / "ba4")
    path.write_text(path.read_text() + '{"step": 5, "lo')
    _, lines = train_tiny(tmp_path, training_config(save_interval_steps=2))
    assert [line["step"] for line in lines] == [1, 2, 3, 4]


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    """On one rank, where torch says `unexpected pos`.  Would catch a bare error of torch's, and an end at the first.

    tests/distributed/test_training_faults.py has several ranks, and room that comes back."""
    config = training_config(save_interval_steps=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    try:
        with pytest.raises(
            PlatformError, match=r"cannot write a checkpoint, 3 times in a row: .*File too large.*free space"
        ):
            train_tiny(tmp_path, config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [line["step"] for line in metrics_of(tmp_path)] == [1, 2, 3] and saved_steps(str(tmp_path)) == []
    _, lines = train_tiny(tmp_path, config)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]


def test_saves_that_fail_now_and_then_end_nothing(tmp_path: Path) -> None:
    """Two fail, one is good, one fails: never three in a row.  Would catch failures that are counted over the run."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    class Quota(Callback):  # type: ignore[misc]
        def batch_start(self, state: Any, logger: Any) -> None:
            limit = soft if state.timestamp.batch.value == 2 else 1_000_000
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))

    def with_quota(**arguments: Any) -> Trainer:
        return Trainer(**arguments | {"callbacks": [*arguments["callbacks"], Quota()]})

    try:
        with mock.patch.object(trainer, "Trainer", with_quota):
            _, lines = train_tiny(tmp_path, training_config(save_interval_steps=1, failed_saves_allowed=3))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(lines) == 4 and saved_steps(str(tmp_path)) == [3]


def test_a_disk_without_room_for_metrics_is_named(tmp_path: Path) -> None:
    """Where lines are added, no name of a file is in the system's error.  Would catch a bare `File too large`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (900, hard))
    try:
        with pytest.raises(PlatformError, match=r"metrics.jsonl: cannot write: File too large.*free space"):
            train_tiny(tmp_path, training_config())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    _, lines = train_tiny(tmp_path, training_config())
    assert [line["step"] for line in lines] == [1, 2, 3, 4]


def test_a_flipped_bit_costs_the_steps_of_one_interval(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Composer loads it without a word: the fault behind the checksums.  Found, training ends with the same weights."""
    config = training_config(steps=6, save_interval_steps=2)
    expected, _ = train_tiny(tmp_path, config)
    path = tmp_path / "ba6" / "state.pt"
    content = bytearray(path.read_bytes())
    name = "model.decoder.embedding.base"
    weights = torch.load(path, weights_only=False)["state"]["model"][name]
    content[content.index(weights.numpy().tobytes()) + 2] ^= 1
    path.write_bytes(content)
    assert not torch.load(path, weights_only=False)["state"]["model"][name].equal(weights)
    found, lines = train_tiny(tmp_path, config)
    printed = capsys.readouterr().out
    assert "step 6 is damaged" in printed and "going on from step 4 instead" in printed
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert_identical(found, expected)
    assert saved_steps(str(tmp_path)) == [6, 4] and not (tmp_path / ".replaced-ba6").exists()
