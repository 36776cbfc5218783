"""Trainings that are killed with SIGKILL, by another process, at a given moment of their start, a step or a save."""

from __future__ import annotations

import os
import resource
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import torch
from composer import Callback, Trainer
from composer.utils import dist

from molmo2core.errors import PlatformError
from molmo2core.stages import train_rank
from molmo2core.testing.tiny_model import tiny_model
from molmo2core.testing.training_ranks import train_tiny
from molmo2core.training import trainer
from molmo2core.training.callbacks import checkpoint_writer
from molmo2core.training.checkpoint_folders import CheckpointPlace, saved_steps
from molmo2core.training.checkpointing import checkpoint_to_load
from molmo2core.training.config import TrainingConfig

Phase = Literal["start", "step", "save", "stop"]
_NEEDED = {"start": b"", "step": b"b", "save": b"s", "stop": b"s"}
"""What the trainer writes when such a moment begins."""


@dataclass(frozen=True, kw_only=True)
class Kill:
    """SIGKILL some time after a phase begins; `stop` is a save after SIGTERM, cut short as by a grace period's end."""

    phase: Phase
    number: int = 1
    """The so manyth step or save of this process."""
    seconds: float = 0.0
    """Into the phase."""
    rank: int = 0


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a training that ended by itself left."""

    weights: dict[str, torch.Tensor] | None
    lines: list[dict[str, Any]]
    durations: dict[Phase, float]
    """Seconds that a phase takes at least."""


def train_or_die(folder: Path, config: TrainingConfig, kill: Kill | None) -> Run:
    """Train a tiny model on this rank, with dropout's state and all; perhaps be killed."""
    started = time.monotonic()
    events = _start_killer(kill) if kill is not None and dist.get_global_rank() == kill.rank else None
    watch = _Watch(events, started)
    with _watched(watch):
        weights, lines = train_tiny(folder, config)
    return Run(weights=weights, lines=lines, durations=watch.durations)


def stage_rank_or_die(arguments: list[str], kill: Kill | None) -> int:
    """What `launch.torchrun` runs on a rank of a training stage; perhaps be killed."""
    started = time.monotonic()
    with _watched(_Watch(_start_killer(kill) if kill is not None else None, started)):
        return train_rank.main(arguments)


def _start_killer(kill: Kill) -> int:
    """A process that kills this one; the descriptor on which it hears what this one begins."""
    reader, writer = os.pipe()
    parent = os.getpid()
    if os.fork():
        os.close(reader)
        return writer
    os.close(writer)
    with suppress(BaseException):
        number = kill.number
        if kill.phase == "stop":
            _hear(reader, b"b", kill.number)
            os.kill(parent, signal.SIGTERM)
            number = 1
        if wanted := _NEEDED[kill.phase]:
            _hear(reader, wanted, number)
        time.sleep(kill.seconds)
        if os.getppid() == parent:
            os.kill(parent, signal.SIGKILL)
    os._exit(0)


def _hear(reader: int, wanted: bytes, times: int) -> None:
    while times:
        heard = os.read(reader, 1)
        if not heard:
            os._exit(0)  # the trainer has ended before that
        times -= heard == wanted


class _Watch(Callback):  # type: ignore[misc]
    def __init__(self, events: int | None, started: float) -> None:
        self.events, self.durations = events, dict[Phase, float]()
        self._began = started

    def say(self, event: bytes) -> None:
        """To the killer."""
        self._began = time.monotonic()
        if self.events is not None:
            os.write(self.events, event)

    def ends(self, phase: Phase) -> None:
        """Note how long it took."""
        self.durations[phase] = min(self.durations.get(phase, 1e9), time.monotonic() - self._began)

    def fit_start(self, state: Any, logger: Any) -> None:
        self.ends("start")

    def batch_start(self, state: Any, logger: Any) -> None:
        self.say(b"b")

    def batch_end(self, state: Any, logger: Any) -> None:
        self.ends("step")


@contextmanager
def _watched(watch: _Watch) -> Iterator[None]:
    save = checkpoint_writer.CheckpointWriter._save

    def saved(self: Any, state: Any, step: int) -> Any:
        watch.say(b"s")
        try:
            return save(self, state, step)
        finally:
            watch.ends("save")

    def with_watch(**arguments: Any) -> Trainer:
        return Trainer(**arguments | {"callbacks": [*arguments["callbacks"], watch]})

    with (
        mock.patch.object(trainer, "Trainer", with_watch),
        mock.patch.object(checkpoint_writer.CheckpointWriter, "_save", saved),
    ):
        yield


def train_on_full_disk(folder: Path, config: TrainingConfig, after_step: int, until_step: int) -> tuple[Any, str]:
    """Train while files on rank 1 cannot grow between two steps; weights (on rank 0), or the error that ends it."""

    class Quota(Callback):  # type: ignore[misc]
        def batch_start(self, state: Any, logger: Any) -> None:
            full = dist.get_global_rank() == 1 and after_step <= state.timestamp.batch.value < until_step
            limit = 200_000 if full else resource.RLIM_INFINITY
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

    def with_quota(**arguments: Any) -> Trainer:
        return Trainer(**arguments | {"callbacks": [*arguments["callbacks"], Quota()]})

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with mock.patch.object(trainer, "Trainer", with_quota):
            return train_tiny(folder, config)[0], ""
    except PlatformError as error:
        return None, str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def step_agreed_on(folder: Path) -> tuple[Path | None, list[Path]]:
    """What each rank goes on from if it is a node of its own, with its checkpoints in a folder with its number."""
    place = CheckpointPlace(folder=folder / f"node-{dist.get_global_rank()}")
    with mock.patch.dict(os.environ, LOCAL_RANK="0"):
        return checkpoint_to_load([place]), sorted(place.folder.iterdir())


def load_and_go_on(folder: Path, config: TrainingConfig, steps: int) -> tuple[Any, Any]:
    """Weights as they are loaded from `folder`'s newest checkpoint, and those after some more steps (on rank 0)."""
    step = max(saved_steps(str(folder)))
    loaded, _ = train_tiny(folder, replace(config, steps=step), model=tiny_model(seed=1))
    trained, _ = train_tiny(folder, replace(config, steps=steps), model=tiny_model(seed=1))
    return loaded, trained
