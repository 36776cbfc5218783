"""Copies checkpoints to the object store while training goes on.

The process that waits for the ranks does it, in a thread: training never waits for the store, a store that is down
costs warnings, and the copy of what a dying rank had saved is finished after its end.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from molmo2core import storage
from molmo2core.errors import DataError, Molmo2Error, PlatformError
from molmo2core.training.checkpoint_folders import (
    CheckpointPlace,
    checkpoint_name,
    is_lasting,
    remove_outdated,
    saved_steps,
)
from molmo2core.training.config import TrainingConfig

UPLOADS = "uploads.log"
"""Lines of JSON, in the folder of the checkpoints."""
_POLL_SECONDS = 0.5
_WAIT_SECONDS = (2.0, 60.0)
"""After a failure, and the longest; each wait is twice the one before."""
_LAST_TRIES = 3
_HELD = ".uploading"


@contextmanager
def uploading(place: CheckpointPlace, config: TrainingConfig, name: str) -> Iterator[None]:
    """Copy new checkpoints of `place` to its store while the body runs.

    After an error in the body, the newest one is copied before that error goes on: the next machine needs it.
    """
    if not place.store:
        yield
        return
    uploader = _Uploader(place, config, name)
    uploader.start()
    try:
        yield
        uploader.is_wanted = False
    finally:
        uploader.done.set()
        uploader.join()


class _Uploader(threading.Thread):
    def __init__(self, place: CheckpointPlace, config: TrainingConfig, name: str) -> None:
        super().__init__(name="uploads", daemon=True)
        self.place, self.config, self.label = place, config, name
        self.done = threading.Event()
        self.is_wanted = True
        """What was saved last is of use after the body; not if training is complete."""
        self._settled: dict[int, str] = {}
        """Step -> the save of it that needs no copying any more."""
        self._found = {
            step: _save_of(str(place.folder / checkpoint_name(step))) for step in saved_steps(str(place.folder))
        }

    def run(self) -> None:
        wait, tries_left = _WAIT_SECONDS[0], _LAST_TRIES
        while True:
            ends = self.done.is_set()
            if ends and not self.is_wanted:
                return
            problem = self._upload_pending()
            if ends:
                tries_left -= 1
                if not problem or not tries_left:
                    return
            pause = wait if problem else _POLL_SECONDS
            wait = min(2 * wait, _WAIT_SECONDS[1]) if problem else _WAIT_SECONDS[0]
            if ends:
                time.sleep(min(pause, _WAIT_SECONDS[0]))
            else:
                self.done.wait(pause)

    def _upload_pending(self) -> str:
        """What went wrong; nothing if all that is to be in the store is there."""
        steps = saved_steps(str(self.place.folder))
        lasting = [step for step in steps[1:] if is_lasting(step, self.config.keep_every_steps)]
        for step in [*steps[:1], *lasting]:
            started = time.monotonic()
            try:
                num_bytes = self._upload(step)
            except Exception as error:  # whatever it is, it is not the training's
                if not storage.is_committed(str(self.place.folder / checkpoint_name(step))):
                    continue  # removed while it was looked at: there is a newer one
                problem = str(error) if isinstance(error, Molmo2Error) else f"{type(error).__name__}: {error}"
                self._record(step, time.monotonic() - started, 0, problem)
                return problem
            if num_bytes:
                self._record(step, time.monotonic() - started, num_bytes, "")
        return ""

    def _upload(self, step: int) -> int:
        """Bytes that were copied; 0 if there was nothing to do."""
        folder = self.place.folder / checkpoint_name(step)
        save = _save_of(str(folder))
        if self._settled.get(step) == save:
            return 0
        uri = storage.join(self.place.store, checkpoint_name(step))
        is_there = storage.is_committed(uri) and _save_of(uri) == save
        # One of an earlier run may have been damaged since; copied, it would count as the newest in the store.
        if is_there or (self._found.get(step) == save and storage.damage(folder)):
            self._settled[step] = save
            return 0
        held = self.place.folder / _HELD
        try:
            shutil.rmtree(held, ignore_errors=True)
            shutil.copytree(folder, held, copy_function=_link)  # the trainer may remove it before it is copied
            storage.upload_committed(held, uri)
            num_bytes = sum(path.stat().st_size for path in held.rglob("*") if path.is_file())
        finally:
            shutil.rmtree(held, ignore_errors=True)
        self._settled[step] = save
        with suppress(DataError, PlatformError):  # no right to remove is no reason to fail
            keep, keep_every = self.config.checkpoints_kept, self.config.keep_every_steps
            remove_outdated(self.place.store, saved=step, keep=keep, keep_every=keep_every)
        return num_bytes

    def _record(self, step: int, seconds: float, num_bytes: int, problem: str) -> None:
        if problem:
            print(
                f"{self.label}: WARNING: the checkpoint of step {step} is on this machine only ({problem}); "
                "training goes on, and so do attempts to copy it",
                flush=True,
            )
        line = {"step": step, "seconds": round(seconds, 3), "bytes": num_bytes, "problem": problem}
        with suppress(OSError), (self.place.folder / UPLOADS).open("a") as file:
            file.write(json.dumps(line) + "\n")


def _save_of(uri: str) -> str:
    """Which save this checkpoint is: the same step may be saved twice, after a damage or with other settings."""
    return str(storage.open_committed(uri).meta["save"])


def _link(source: str, destination: str) -> None:
    try:
        os.link(source, destination)
    except OSError:  # not every file system has links
        shutil.copyfile(source, destination)
