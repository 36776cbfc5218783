"""Which checkpoint training goes on from, and in which form Composer reads it.

Composer's own files are unpickled when they are read (`torch.load(weights_only=False)`): a checkpoint can run any code,
so only those of this project's own trainings are to be put where training looks.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from composer.utils import dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save, torch_save_to_dcp

from molmo2core import storage
from molmo2core.errors import PlatformError, RecipeError
from molmo2core.training.checkpoint_folders import (
    CONVERTED,
    RECORDS,
    SHARDS,
    WHOLE,
    CheckpointPlace,
    checkpoint_name,
    copy_records,
    tidy_up,
    whole_checkpoint,
)


def checkpoint_to_load(places: Sequence[CheckpointPlace]) -> Path | None:
    """The newest whole checkpoint of the first place that has one, on this machine.  Called by all ranks.

    One rank of each node reads all of it to know.  Nodes that have not the same ones take the newest that all have.

    Raises:
        DataError: no such bucket, or no access to it.
        PlatformError: the object store failed.
    """
    for place in places:
        if (step := _agreed_step(place)) is not None:
            return place.folder / checkpoint_name(step)
    return None


def check_not_past(checkpoint: Path, steps: int) -> None:
    """Whether a training of so many steps may go on from a checkpoint.

    Raises:
        RecipeError: it has done more: its weights would pass for those of fewer steps.
    """
    step = storage.open_committed(str(checkpoint)).meta["step"]
    if step > steps:
        raise RecipeError(
            "training.steps",
            found=f"{steps}, and {checkpoint} of step {step} to go on from",
            expected=f"{step} or more",
            mend="raise steps, or delete resume_from to start at step 0",
        )


def _agreed_step(place: CheckpointPlace) -> int | None:
    looks = dist.get_local_rank() == 0
    if looks:
        place.folder.mkdir(parents=True, exist_ok=True)
        tidy_up(place.folder)
    limit: int | None = None
    while True:
        found = whole_checkpoint(place, up_to=limit) if looks else None
        answers = [step for is_answer, step in dist.all_gather_object((looks, found)) if is_answer]
        if None in answers:
            return None
        if len(set(answers)) == 1:
            return int(answers[0])
        limit = min(answers)


def restore_records(checkpoint: Path, folder: Path) -> None:
    """Let rank 0 put what was recorded up to the checkpoint (metrics and the like) into `folder`, in place of its own.

    Another machine's folder has none, and one that another machine has trained past would lack steps.
    """
    if dist.get_global_rank() == 0:
        copy_records(checkpoint / RECORDS, folder)


@contextmanager
def readable(checkpoint: Path | None, ranks: int, scratch: Path) -> Iterator[str | None]:
    """What Composer's `load_path` is to be on so many ranks.  Called by all of them.

    Composer reads a file into an unsharded model only, a folder of shards into a sharded one only.  So that the form of
    the next checkpoint depends on the ranks that write it alone, the form of this one is changed where needed.

    Args:
        scratch: local folder that holds the other form for as long as the block lasts; that takes as much room there,
            and in the memory of one rank, as the checkpoint.

    Raises:
        PlatformError: there is no room for the other form.
    """
    if checkpoint is None:
        yield None
        return
    wanted = SHARDS if ranks > 1 else WHOLE
    if (checkpoint / wanted).exists():
        yield str(checkpoint / wanted)
        return
    converted = scratch / CONVERTED / wanted
    if dist.get_local_rank() == 0:
        _convert(checkpoint, converted)
    dist.barrier()
    yield str(converted)
    dist.barrier()  # after an error nobody waits here; `tidy_up` does it then
    if dist.get_local_rank() == 0:
        shutil.rmtree(converted.parent, ignore_errors=True)


def _convert(checkpoint: Path, converted: Path) -> None:
    try:
        converted.parent.mkdir(parents=True)
        if converted.name == SHARDS:
            torch_save_to_dcp(checkpoint / WHOLE, converted)
        else:
            dcp_to_torch_save(checkpoint / SHARDS, converted)
    except (OSError, RuntimeError, CheckpointException) as error:
        if not (problem := writing_problem(error)):
            raise
        raise PlatformError(
            str(checkpoint),
            found=f"no room to bring it into the form of another number of ranks: {problem}",
            mend="free space or go on with as many ranks as before",
        ) from error


def writing_problem(error: BaseException) -> str:
    """What a disk or file system had against a save; empty if that is not what `error` is about.

    torch's writer reports a short write as a RuntimeError of its own, after the OSError that tells why; a sharded save
    gathers the errors of all ranks, and they lose what they came after.
    """
    if isinstance(error, CheckpointException):
        problems = [writing_problem(failure) for failure, _ in error.failures.values()]
        return problems[0] if all(problems) else ""
    for cause in (error, error.__cause__, error.__context__):
        if isinstance(cause, (OSError, PlatformError)):
            return str(cause)
    return "the disk took only a part of a file" if "unexpected pos" in str(error) else ""
