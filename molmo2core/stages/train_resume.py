"""Where an unfinished training lies, and how another one goes on from it."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from molmo2core import storage
from molmo2core.errors import DataError
from molmo2core.recipe.sections import TrainSection
from molmo2core.training.checkpoint_folders import CheckpointPlace, checkpoint_name, is_lasting, saved_steps

_SUFFIX = ".resume"


def resume_place(uri: str) -> CheckpointPlace:
    """Where the training that will be committed at `uri` keeps what it needs to go on.

    For an object store that is a folder in this machine's cache, and copies in the store for another machine.
    """
    if not storage.is_remote(uri):
        return CheckpointPlace(folder=Path(f"{uri}{_SUFFIX}"))
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    folder = cache / "molmo2core" / "training" / f"{storage.content_key(uri)}{_SUFFIX}"
    return CheckpointPlace(folder=folder, store=f"{uri}{_SUFFIX}")


@contextmanager
def exclusive(folder: Path) -> Iterator[Path]:
    """`folder`, made if missing, for this process alone: a retry waits until the run before is really gone."""
    lock_file = folder / ".lock"
    storage.create_bytes(str(lock_file), b"")  # replaces none: two that start at once lock the same file
    with lock_file.open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for the process that trains in {folder} to end", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        folder.mkdir(parents=True, exist_ok=True)  # the one before may have committed and removed it
        yield folder


@contextmanager
def taken_up(section: TrainSection, stage_uri: str, place: CheckpointPlace) -> Iterator[CheckpointPlace | None]:
    """Where the training that `resume_from` names has saved, held and left as it is; None if it names none.

    Args:
        section: of the training that starts.
        stage_uri: place of all checkpoints of the stage.
        place: of the training that starts.

    Raises:
        DataError: there is no such training, or it has saved nothing yet.
    """
    key = section.training.resume_from
    unfinished = unfinished_trainings(stage_uri)
    if not key:
        others = [name for name in unfinished if resume_place(storage.join(stage_uri, name)) != place]
        if others and not _has_saved(place):
            print(
                f"train.{section.stage}: starts at step 0; unfinished trainings of other recipes: {', '.join(others)} "
                f"(to go on from one: train.{section.stage}.resume_from)",
                flush=True,
            )
        yield None
        return
    other = resume_place(storage.join(stage_uri, key))
    if not _has_saved(other):
        if _has_saved(place):  # it was taken up long ago
            yield None
            return
        raise DataError(
            f"train.{section.stage}.resume_from",
            found=f"{key!r}, and no checkpoint in {other.store or other.folder}",
            expected=f"one of {', '.join(unfinished)}" if unfinished else "the key of an unfinished training",
            mend="a training that finished leaves its weights only; delete resume_from to start at step 0",
        )
    with exclusive(other.folder):
        yield other


def unfinished_trainings(stage_uri: str) -> list[str]:
    """Keys of the trainings of a stage that have saved something and no weights."""
    folders = [name for name in storage.list_folders(stage_uri) if name.endswith(_SUFFIX)]
    keys = [name.removesuffix(_SUFFIX) for name in sorted(folders)]
    return [
        key
        for key in keys
        if saved_steps(storage.join(stage_uri, key + _SUFFIX))
        and not storage.is_committed(storage.join(stage_uri, key))
    ]


def _has_saved(place: CheckpointPlace) -> bool:
    return bool(saved_steps(str(place.folder)) or (place.store and saved_steps(place.store)))


def remove_all_but_lasting(uri: str, keep_every: int) -> None:
    """What a training that is done leaves of `uri`, a folder or store: checkpoints to keep for ever, or nothing."""
    lasting = [checkpoint_name(step) for step in saved_steps(uri) if is_lasting(step, keep_every)]
    if not lasting:
        storage.remove_folder(uri)
        return
    for name in storage.list_folders(uri):
        if name not in lasting:
            storage.remove_folder(storage.join(uri, name))
