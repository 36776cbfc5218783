"""Runs another module's `main(arguments) -> int` in a process that dies with its parent and reports its error.

    python -m molmo2core.launch.child MODULE ARGUMENT...

torchrun's ranks live in sessions of their own, so that a killed launcher leaves them training on as orphans
(composer_streaming.md 1).  Launcher, torchrun's agent and each rank are therefore all started through this module.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import sys
from collections.abc import Sequence

from molmo2core import errors

PARENT_VARIABLE = "MOLMO2_PARENT_PID"
ERROR_VARIABLE = "MOLMO2_ERROR_FILE"
_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent dies (Linux); children started from here inherit the duty."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if int(os.environ.get(PARENT_VARIABLE, os.getppid())) != os.getppid():  # it died before the line above
        os._exit(1)
    os.environ[PARENT_VARIABLE] = str(os.getpid())


def main(arguments: Sequence[str]) -> int:
    """Run `arguments[0]`'s main with the other arguments; return its exit code."""
    die_with_parent()
    # torchrun does not set it, and Composer raises without it on a monolithic load.
    os.environ.setdefault("NODE_RANK", os.environ.get("GROUP_RANK", "0"))
    try:
        return int(importlib.import_module(arguments[0]).main(list(arguments[1:])) or 0)
    except errors.Molmo2Error as error:
        _leave_error(error)
        return errors.exit_with_message(error)
    except Exception as error:
        if type(error).__name__ == "ChildFailedError":  # torchrun's: the rank has said what happened
            return 1
        return errors.exit_with_message(error)


def read_error(path: str) -> errors.Molmo2Error | None:
    """The first error that a child left in the file at `path`, if any."""
    try:
        with open(path) as file:
            fields = json.load(file)
    except (OSError, ValueError):
        return None
    kind: type[errors.Molmo2Error] = getattr(errors, fields.pop("kind"))
    return kind(**fields)


def _leave_error(error: errors.Molmo2Error) -> None:
    path = os.environ.get(ERROR_VARIABLE)
    if not path:
        return
    fields = {"kind": type(error).__name__, "where": error.where, "found": error.found}
    fields |= {"expected": error.expected, "mend": error.mend}
    try:
        with open(path, "x") as file:  # the first rank to fail knows the cause; the others see its absence
            json.dump(fields, file)
    except FileExistsError:
        pass


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
