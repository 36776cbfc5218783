"""Errors that say who can mend them.

`RecipeError`, `DataError` and `CheckpointError` are the user's to mend; `PlatformError` is worth another try
(storage, network, preempted node).  Every error names a place, what was found, what was expected and how to mend
it, and survives pickling, so that it can cross a process or rank boundary unchanged.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

EXIT_USER_CAN_MEND = 2
EXIT_WORTH_RETRYING = 75  # EX_TEMPFAIL of sysexits.h


class Molmo2Error(Exception):
    """Base of all errors this project raises on purpose.

    Args:
        where: file, row, key or address, as precise as known.
        found: what is there.
        expected: what should be there.
        mend: what the user can do about it.
    """

    exit_code = EXIT_USER_CAN_MEND

    def __init__(self, where: str, *, found: str, expected: str = "", mend: str = "") -> None:
        super().__init__(where, found, expected, mend)
        self.where, self.found, self.expected, self.mend = where, found, expected, mend

    def __str__(self) -> str:
        parts = [f"{self.where}: {self.found}"]
        if self.expected:
            parts.append(f"expected {self.expected}")
        if self.mend:
            parts.append(f"to mend it: {self.mend}")
        return "; ".join(parts)

    def __reduce__(self) -> tuple[Callable[..., Molmo2Error], tuple[object, ...]]:
        return _rebuild, (type(self), self.where, self.found, self.expected, self.mend)


class RecipeError(Molmo2Error):
    """The recipe is wrong: unknown key, impossible combination, missing section."""


class DataError(Molmo2Error):
    """Delivered data break the contract of the manifest, or shards and plans do not belong together."""


class CheckpointError(Molmo2Error):
    """A checkpoint or exported model is missing, incomplete or of another shape."""


class PlatformError(Molmo2Error):
    """Something outside user and program failed; another attempt may succeed."""

    exit_code = EXIT_WORTH_RETRYING


def _rebuild(kind: type[Molmo2Error], where: str, found: str, expected: str, mend: str) -> Molmo2Error:
    return kind(where, found=found, expected=expected, mend=mend)


def exit_with_message(error: BaseException) -> int:
    """Print `error` so that its first line is the message, never a stack trace; return the process's exit code."""
    if isinstance(error, Molmo2Error):
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    print(f"internal error: {type(error).__name__}: {error}", file=sys.stderr)
    traceback.print_exception(error, file=sys.stderr)
    return 1


@contextmanager
def message_first() -> Iterator[None]:
    """Turn any error inside into `exit_with_message` and its exit code: what a pipeline step shows when it fails."""
    try:
        yield
    except Exception as error:
        raise SystemExit(exit_with_message(error)) from None
