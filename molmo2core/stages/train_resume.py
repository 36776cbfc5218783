"""Where an unfinished training lies, and how another one goes on from it."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from molmo2core import storage
from molmo2core.errors import DataError
from molmo2core.loading.deviations import DEVIATIONS
from molmo2core.recipe.sections import TrainSection
from molmo2core.stages.train_rank import METRICS

_SUFFIX = ".resume"
_CHECKPOINTS = "*ba[0-9]*"


def resume_folder(uri: str) -> Path:
    """Where the training that will be committed at `uri` keeps what it needs to go on; always on this machine."""
    if not storage.is_remote(uri):
        return Path(f"{uri}{_SUFFIX}")
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return cache / "molmo2core" / "training" / f"{storage.content_key(uri)}{_SUFFIX}"


@contextmanager
def exclusive(folder: Path) -> Iterator[Path]:
    """`folder`, made if missing, for this process alone: a retry waits until the run before is really gone."""
    lock_file = folder / ".lock"
    storage.create_bytes(str(lock_file), b"")  # replaces none: two that start at once lock the same file
    with lock_file.open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        folder.mkdir(parents=True, exist_ok=True)  # the one before may have committed and removed it
        yield folder


@contextmanager
def taken_up(section: TrainSection, stage_uri: str, folder: Path) -> Iterator[Path | None]:
    """The folder of the training that `resume_from` names, held and left as it is; None if it names none.

    Its metrics and deviations become the beginning of those in `folder`, unless that has its own.

    Args:
        section: of the training that starts.
        stage_uri: place of all checkpoints of the stage.
        folder: of the training that starts.

    Raises:
        DataError: there is no such training, or it has saved nothing yet.
    """
    key = section.training.resume_from
    unfinished = unfinished_trainings(stage_uri)
    if not key:
        others = [name for name in unfinished if resume_folder(storage.join(stage_uri, name)) != folder]
        if others and not any(folder.glob(_CHECKPOINTS)):
            print(
                f"train.{section.stage}: starts at step 0; unfinished trainings of other recipes: {', '.join(others)} "
                f"(to go on from one: train.{section.stage}.resume_from)",
                flush=True,
            )
        yield None
        return
    other = resume_folder(storage.join(stage_uri, key))
    if not any(other.glob(_CHECKPOINTS)):
        raise DataError(
            f"train.{section.stage}.resume_from",
            found=f"{key!r}, and no checkpoint in {other}",
            expected=f"one of {', '.join(unfinished)}" if unfinished else "the key of an unfinished training",
            mend="a training that finished leaves its weights only; delete resume_from to start at step 0",
        )
    with exclusive(other):
        if not (folder / METRICS).exists():
            for name in (METRICS, DEVIATIONS):
                if (other / name).is_file():
                    shutil.copyfile(other / name, folder / name)
        yield other


def unfinished_trainings(stage_uri: str) -> list[str]:
    """Keys of the trainings of a stage that have saved something; of an `s3://` workspace none are known."""
    if storage.is_remote(stage_uri):
        return []
    folders = Path(stage_uri).glob(f"*{_SUFFIX}")
    return sorted(folder.name.removesuffix(_SUFFIX) for folder in folders if any(folder.glob(_CHECKPOINTS)))
