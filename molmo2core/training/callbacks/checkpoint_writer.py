"""Saves what training needs to go on, whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from composer import Callback
from composer.utils import dist
from composer.utils.checkpoint import save_checkpoint
from torch.distributed.checkpoint.api import CheckpointException

from molmo2core import storage
from molmo2core.errors import PlatformError
from molmo2core.training.checkpoint_folders import (
    RECORDS,
    SAVES,
    SAVING,
    SHARDS,
    WHOLE,
    checkpoint_name,
    copy_records,
    remove_outdated,
    replace_folder,
)
from molmo2core.training.checkpointing import writing_problem

if TYPE_CHECKING:
    from composer import Logger, State

    from molmo2core.training.config import TrainingConfig
from molmo2core.training.trainable import model_key, what_is_trained


class CheckpointWriter(Callback):  # type: ignore[misc]
    """Every so many steps, and at the end of training, also when it is asked to stop.

    All ranks write at the same time, each its shard and its checksums; rank 0 then adds the marker and gives the folder
    its name.  Composer's own saver does neither, and removes older files before it knows whether the new one is good.

    A save that fails is said and recorded in `saves.jsonl`, and training goes on: what was saved before still stands,
    and somebody may make room.  Only `failed_saves_allowed` failures in a row end it.

    Args:
        folder: of the checkpoints; the same for all ranks.
        records: folder of what rank 0 records while training goes on; a copy of it goes into each checkpoint.
    """

    def __init__(self, folder: Path, *, config: TrainingConfig, records: Path, name: str) -> None:
        self.folder, self.config, self.records, self.name = folder, config, records, name
        self.saved_step = 0
        """The newest checkpoint that stands; the step that was resumed from at first."""
        self._failures = 0

    def fit_start(self, state: State, logger: Logger) -> None:
        """Training starts from what it has loaded."""
        self.saved_step = int(state.timestamp.batch.value)

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        """Save if it is time to.

        Raises:
            PlatformError: too many saves failed one after the other.
        """
        step = int(state.timestamp.batch.value)
        duration = state.get_elapsed_duration()
        ends = duration is not None and duration >= 1.0
        if step % self.config.save_interval_steps and not ends:
            return
        started = time.monotonic()
        num_bytes, problem = self._save(state, step)
        if dist.get_global_rank() == 0:
            line = {"step": step, "seconds": round(time.monotonic() - started, 3), "bytes": num_bytes}
            self._record(line | {"problem": problem})
        if not problem:
            self.saved_step, self._failures = step, 0
            return
        self._failures += 1
        if self._failures >= self.config.failed_saves_allowed:
            raise PlatformError(
                str(self.folder),
                found=f"cannot write a checkpoint, {self._failures} times in a row: {problem}",
                mend=f"free space for {self.config.checkpoints_kept + 1} checkpoints and run it again: it goes on "
                f"from step {self.saved_step}",
            )

    def _save(self, state: State, step: int) -> tuple[int, str]:
        """Bytes written by all ranks, and what went wrong on any of them."""
        part = self.folder / SAVING
        is_first = dist.get_global_rank() == 0

        def clear() -> None:
            if is_first:
                shutil.rmtree(part, ignore_errors=True)
                part.mkdir(parents=True)

        own: dict[str, dict[str, Any]] = {}

        def write() -> None:
            save_checkpoint(state, str(part / WHOLE))
            own.update({str(path.relative_to(part)): _settled(path) for path in _files_of_this_rank(part)})

        def commit() -> None:
            if not is_first:
                return
            for name in copy_records(self.records, part / RECORDS):
                files[f"{RECORDS}/{name}"] = _settled(part / RECORDS / name)
            for shards in part.glob("ep*-ba*"):  # Composer's name for them
                os.rename(shards, part / SHARDS)
            meta = {"step": step, "ranks": dist.get_world_size(), "save": uuid.uuid4().hex}
            meta |= {"trained": what_is_trained(self.config), "model": model_key(state.model.model.config)}
            storage.seal_folder(part, files, meta)
            replace_folder(part, self.folder / checkpoint_name(step))

        def remove_older() -> None:
            if is_first:
                remove_outdated(
                    str(self.folder),
                    saved=step,
                    keep=self.config.checkpoints_kept,
                    keep_every=self.config.keep_every_steps,
                )

        problem = _problem_of_any_rank(clear) or _problem_of_any_rank(write)
        files: dict[str, dict[str, Any]] = {}
        if not problem:
            for ranks_own in dist.all_gather_object(own):
                files |= {_with_our_name(name): facts for name, facts in ranks_own.items()}
            problem = _problem_of_any_rank(commit)
        if problem:
            if is_first:
                shutil.rmtree(part, ignore_errors=True)  # room for the metrics, if for nothing else
            return 0, problem
        if trouble := _problem_of_any_rank(remove_older):  # it takes up room, but nothing is lost
            self._say(f"cannot remove an old checkpoint: {trouble}")
        return sum(facts["bytes"] for facts in files.values()), ""

    def _record(self, line: dict[str, Any]) -> None:
        if line["problem"]:
            self._say(
                f"WARNING: no checkpoint of step {line['step']} ({line['problem']}); "
                f"if training ends now, it goes on from step {self.saved_step}"
            )
        try:
            with (self.records / SAVES).open("a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            self._say(f"cannot write {SAVES}: {error.strerror}")

    def _say(self, text: str) -> None:
        if dist.get_global_rank() == 0:
            print(f"{self.name}: {text}", flush=True)


def _files_of_this_rank(part: Path) -> list[Path]:
    rank = dist.get_global_rank()
    shards = [*part.glob(f"ep*-ba*/__{rank}_*")]
    return [*part.glob(WHOLE), *shards, *part.glob("ep*-ba*/.metadata")] if rank == 0 else shards


def _settled(path: Path) -> dict[str, Any]:
    """Checksum of a file that is on the disk, not in its cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return storage.file_facts(path)


def _with_our_name(name: str) -> str:
    folder, _, file = name.partition("/")
    return f"{SHARDS}/{file}" if file else folder


def _problem_of_any_rank(action: Callable[[], None]) -> str:
    """Run `action` on all ranks; what went wrong with writing on the first of them, or nothing."""
    problem = ""
    try:
        action()
    except (OSError, RuntimeError, PlatformError, CheckpointException) as error:
        problem = writing_problem(error)
        if not problem:
            raise
    return next(filter(None, dist.all_gather_object(problem)), "")
