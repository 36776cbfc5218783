"""Checkpoints to go on from as they lie on a disk and in an object store.  Torch-free.

    <folder>/ba<step>/    committed (storage.py): state.pt of one rank, or shards/ of several; records/ so far
    <store>/ba<step>/     copies of them, when the workspace is an object store

A folder without its marker is no checkpoint, and one whose files are not as the marker says is passed over.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from molmo2core import storage
from molmo2core.errors import DataError
from molmo2core.training.validation_files import PAGES

RECORDS = "records"
SAVES = "saves.jsonl"
"""Record of all saves, also of those that failed, beside the checkpoints."""
SHARDS = "shards"
WHOLE = "state.pt"
_RECORDED = ("*.jsonl", f"{PAGES}/*.html")
SAVING, CONVERTED = ".saving", ".converted"
"""Names of folders that are not checkpoints yet, or only for as long as one is read."""
_STEP = re.compile(r"ba(\d+)")
_FETCHED, _REPLACED = ".fetched", ".replaced"


@dataclass(frozen=True, kw_only=True)
class CheckpointPlace:
    """Where one training saves."""

    folder: Path
    """On this machine."""
    store: str = ""
    """`s3://` prefix that outlives the machine; empty if the folder does."""


def checkpoint_name(step: int) -> str:
    """Of the checkpoint after `step` steps."""
    return f"ba{step}"


def saved_steps(uri: str) -> list[int]:
    """Steps of the committed checkpoints of a folder or store, newest first.

    Raises:
        DataError: no such bucket, or no access to it.
        PlatformError: the object store failed.
    """
    return sorted((step for step in _found_steps(uri) if storage.is_committed(_at(uri, step))), reverse=True)


def whole_checkpoint(place: CheckpointPlace, *, up_to: int | None = None) -> int | None:
    """Step of the newest checkpoint that is as it was saved; fetched, if only the store has it so.

    What is wrong with newer ones is printed.  Nothing is removed: a disk that fails to read once is not an empty one.

    Args:
        up_to: newer ones do not count.

    Raises:
        DataError: no such bucket, or no access to it.
        PlatformError: the object store failed.
    """
    local = saved_steps(str(place.folder))
    stored = saved_steps(place.store) if place.store else []
    passed_over: list[int] = []
    for step in sorted({*local, *stored}, reverse=True):
        if up_to is not None and step > up_to:
            continue
        problems = []
        if step in local:
            problems.append(storage.damage(place.folder / checkpoint_name(step)))
        if step in stored and problems != [""]:
            problems.append(_fetch(place, step))
        if "" in problems:
            if passed_over:
                print(f"checkpoint: going on from step {step} instead", flush=True)
            return step
        passed_over.append(step)
        print(f"warning: the checkpoint of step {step} is damaged: {'; '.join(problems)}", flush=True)
    if passed_over:
        print("warning: no checkpoint is whole; training starts at step 0", flush=True)
    return None


def _fetch(place: CheckpointPlace, step: int) -> str:
    """Bring a checkpoint from the store; what is wrong with it, or nothing."""
    try:
        fetched = storage.fetch_committed(_at(place.store, step), place.folder / _FETCHED)
        replace_folder(fetched, place.folder / checkpoint_name(step))
    except DataError as error:
        return str(error)
    finally:
        shutil.rmtree(place.folder / _FETCHED, ignore_errors=True)
    print(f"checkpoint: step {step} fetched from {place.store}", flush=True)
    return ""


def copy_records(source: Path, destination: Path) -> list[str]:
    """Copy what training records (metrics and other lines of JSON, pages of answers); return the relative names."""
    names = sorted(str(path.relative_to(source)) for pattern in _RECORDED for path in source.glob(pattern))
    for name in names:
        (destination / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, destination / name)
    return names


def tidy_up(folder: Path) -> None:
    """Remove what killed saves, fetches and conversions left."""
    for old in folder.glob(f"{_REPLACED}-*"):
        if not (place := folder / old.name.removeprefix(f"{_REPLACED}-")).exists():
            os.rename(old, place)
        shutil.rmtree(old, ignore_errors=True)
    half_removed = folder.glob(f"{storage.ATTEMPT}*")  # as large as a checkpoint
    for path in (folder / SAVING, folder / CONVERTED, folder / _FETCHED, *half_removed):
        shutil.rmtree(path, ignore_errors=True)


def replace_folder(new: Path, place: Path) -> None:
    """Rename `new` to `place`, whose former content is removed; killed in between, `tidy_up` puts that back.

    The former content is that of the same step: damaged, or of a training with other settings.
    """
    old = place.with_name(f"{_REPLACED}-{place.name}")
    shutil.rmtree(old, ignore_errors=True)
    if place.exists():
        os.rename(place, old)
    os.rename(new, place)
    descriptor = os.open(place.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # else the name may be lost with the power, and older checkpoints are removed next
    finally:
        os.close(descriptor)
    shutil.rmtree(old, ignore_errors=True)


def remove_outdated(uri: str, *, saved: int, keep: int, keep_every: int) -> None:
    """Remove checkpoints of `uri`, whole or not, that need no longer be kept now that step `saved` is safely in it.

    Newer ones are not touched.

    Args:
        keep: the newest so many stay; 1 or more.
        keep_every: those of steps that it divides stay, too; 0: none.
    """
    for step in outdated_steps(_found_steps(uri), saved=saved, keep=keep, keep_every=keep_every):
        storage.remove_folder(_at(uri, step))


def outdated_steps(steps: Iterable[int], *, saved: int, keep: int, keep_every: int) -> list[int]:
    """See remove_outdated.  The step `saved` is never among them."""
    older = sorted((step for step in steps if step < saved), reverse=True)
    return [step for step in older[keep - 1 :] if not is_lasting(step, keep_every)]


def is_lasting(step: int, keep_every: int) -> bool:
    """Whether the checkpoint of `step` is kept for ever."""
    return keep_every > 0 and step % keep_every == 0


def _found_steps(uri: str) -> list[int]:
    return [int(match[1]) for name in storage.list_folders(uri) if (match := _STEP.fullmatch(name))]


def _at(uri: str, step: int) -> str:
    return storage.join(uri, checkpoint_name(step))
