"""Where training saves, what it goes on from, and what is said when a checkpoint cannot be written."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from composer import Time
from composer.utils import dist

from molmo2core.errors import PlatformError
from molmo2core.training.composer_guards import delete_other_checkpoints, newest_checkpoint
from molmo2core.training.config import TrainingConfig

CHECKPOINTS_KEPT = 2
_CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def checkpoint_to_load(folder: Path, resume_from: Path | None) -> Path | None:
    """The newest whole checkpoint of `folder`, whose others are removed; or else of `resume_from`.

    Called by all ranks.
    """
    checkpoint = newest_checkpoint(folder)
    dist.barrier()  # all have looked before rank 0 tidies up
    if dist.get_global_rank() == 0:
        delete_other_checkpoints(folder, checkpoint)
    if checkpoint is None and resume_from is not None:
        checkpoint = newest_checkpoint(resume_from)
    return checkpoint


def checkpoint_arguments(config: TrainingConfig, folder: Path, checkpoint: Path | None) -> dict[str, Any]:
    """What Composer's Trainer is told of checkpoints."""
    return {
        "load_path": str(checkpoint) if checkpoint else None,
        "load_progress_bar": False,
        "save_folder": str(folder),
        "save_filename": "ba{batch}-rank{rank}.pt",
        "save_latest_filename": None,
        "save_interval": Time.from_batch(config.save_interval_steps),
        "save_num_checkpoints_to_keep": CHECKPOINTS_KEPT,
        "save_overwrite": True,
    }


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turns an error of a full disk into one that says so.

    Raises:
        PlatformError: a checkpoint cannot be written.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        # torch's writer reports a short write as a RuntimeError of its own, after the OSError that tells why.
        causes = [error, error.__context__]
        if not any(isinstance(cause, OSError) and cause.errno in _CANNOT_WRITE for cause in causes):
            raise
        raise PlatformError(
            str(folder), found=f"cannot write a checkpoint: {causes[-1] or error}", mend="free space and run it again"
        ) from error
