"""Who is champion: an append-only ledger, of which MLflow's alias is only the projection.

MLflow's aliases have no history and no compare-and-swap, and anybody may move them.  So each change is one numbered
JSON file that is written only if there is none of that number, and holds the sha256 of the file before it:

    <folder>/000001.json  {"action": "promote", "version": "3", "key": ..., "reason": ..., "previous": "", ...}
    <folder>/000002.json  {"action": "roll back", "version": ...}

Promotions stack: rolling back makes the champion before the last promotion champion again.
"""

from __future__ import annotations

import dataclasses
import getpass
import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

from molmo2core import storage
from molmo2core.errors import DataError, PlatformError

_NAME = re.compile(r"\d{6}\.json")
_ATTEMPTS = 20


@dataclass(frozen=True, kw_only=True)
class Record:
    """One change of champion."""

    number: int
    action: Literal["promote", "roll back"]
    version: str
    """Champion after this change."""
    key: str
    """What was decided about, so that a retry does not decide twice; empty for a person's roll back."""
    reason: str
    actor: str
    time: str
    previous: str
    """sha256 of the record before; empty in the first."""


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """The ledger of one registered model."""

    folder: str
    """Local folder or `s3://` prefix."""

    def records(self) -> list[Record]:
        """All records, oldest first.

        Raises:
            DataError: a record is missing or was altered.
        """
        return [record for record, _ in self._read()]

    def append(self, decide: Callable[[Sequence[Record]], Decision | None]) -> Record | None:
        """Append what `decide` makes of the records so far; it is asked again if somebody else was faster.

        Returns:
            The new record, or None if there was nothing to decide.

        Raises:
            DataError: a record is missing or was altered.
            PlatformError: others kept being faster.
        """
        for _ in range(_ATTEMPTS):
            read = self._read()
            decision = decide([record for record, _ in read])
            if decision is None:
                return None
            record = Record(
                number=len(read) + 1,
                action=decision.action,
                version=decision.version,
                key=decision.key,
                reason=decision.reason,
                actor=_actor(),
                time=datetime.now(UTC).isoformat(timespec="seconds"),
                previous=read[-1][1] if read else "",
            )
            content = (json.dumps(dataclasses.asdict(record), sort_keys=True, indent=1) + "\n").encode()
            if storage.create_bytes(self._address(record.number), content):
                return record
        raise PlatformError(self.folder, found=f"lost the race {_ATTEMPTS} times", mend="run again")

    def _read(self) -> list[tuple[Record, str]]:
        """Records with the sha256 of their files."""
        count = sum(bool(_NAME.fullmatch(name)) for name in storage.list_files(self.folder))
        found: list[tuple[Record, str]] = []
        for number in range(1, count + 1):
            address = self._address(number)
            content = storage.read_bytes(address)
            try:
                record = Record(**json.loads(content))
            except (ValueError, TypeError) as error:
                raise DataError(address, found=f"not a ledger record ({error})") from error
            expected = found[-1][1] if found else ""
            if record.previous != expected or record.number != number:
                raise DataError(
                    address,
                    found=f"it follows a record {record.previous[:12] or '(none)'}",
                    expected=f"{expected[:12] or '(none)'}: the ledger was altered",
                    mend="restore the folder from a backup",
                )
            found.append((record, hashlib.sha256(content).hexdigest()))
        return found

    def _address(self, number: int) -> str:
        return storage.join(self.folder, f"{number:06d}.json")


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What a record will say; the ledger adds number, actor, time and chain."""

    action: Literal["promote", "roll back"]
    version: str
    key: str
    reason: str


def champions(records: Sequence[Record]) -> list[str]:
    """Versions from the first champion still below to the present one; rolling back takes off the last."""
    stack: list[str] = []
    for record in records:
        if record.action == "promote":
            stack.append(record.version)
        else:
            stack.pop()
    return stack


def _actor() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user id without a name
        return "unknown"
