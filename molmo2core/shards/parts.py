"""The shards of a dataset, written side by side, part by part.

    rows -> cut_parts -> parts, one shard each -> write_part, in several processes -> build_shards collects them

What a part holds follows from the rows alone, so shards are the same for any number of writers.  A part is committed
as soon as it is written, below `<uri>.parts`, in a folder named by its content: a run after a kill finds what was
finished.  The last step makes the indices and commits the whole: shards are linked (copied within the object store),
not written again, and the parts removed.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from molmo2core import storage
from molmo2core.errors import DataError, Molmo2Error, PlatformError
from molmo2core.examples import Example, Split
from molmo2core.shards import index, lengths
from molmo2core.shards.lengths import LengthsTable, decode_table, encode_table, join_tables
from molmo2core.shards.writer import SHARD, write_part
from molmo2core.special_tokens import TextTokenizer

PROGRESS_SECONDS = 10.0
_PARTS = ".parts"
_PARTS_AHEAD = 2
"""Parts handed to the writers before the oldest is done, for each writer."""

Row = TypeVar("Row")


@dataclass(frozen=True, kw_only=True)
class SizedRow(Generic[Row]):
    """Something that becomes a sample, and what must be known of it to cut shards."""

    uid: str
    split: Split
    num_bytes: int
    """Of its media and its text."""
    row: Row


@dataclass(frozen=True, kw_only=True)
class Part:
    """Consecutive examples of one split, which become one shard.  Travels to a writer process."""

    split: Split
    key: str
    """Content key of the examples."""
    examples: Iterable[Example]
    """Media may be read while it is iterated."""


@dataclass(frozen=True, kw_only=True)
class _Written:
    split: Split
    folder: storage.CommittedFolder
    table: LengthsTable
    reused: bool


def cut_parts(rows: Iterable[SizedRow[Row]], shard_bytes: int) -> Iterator[tuple[Split, list[Row]]]:
    """Consecutive rows of each split, as many as `shard_bytes` holds, or one that is larger.

    Rows keep their order within a split.  At most one open part of each split is held.

    Raises:
        DataError: a uid occurs twice.
    """
    uids: set[str] = set()
    opened: dict[Split, list[Row]] = {}
    filled: dict[Split, int] = {}
    for row in rows:
        if row.uid in uids:
            raise DataError(f"example {row.uid}", found="its uid twice", expected="unique uids", mend="validate again")
        uids.add(row.uid)
        if row.split in opened and filled[row.split] + row.num_bytes > shard_bytes:
            yield row.split, opened.pop(row.split)
        if row.split not in opened:
            opened[row.split], filled[row.split] = [], 0
        opened[row.split].append(row.row)
        filled[row.split] += row.num_bytes
    yield from opened.items()


def build_shards(
    uri: str,
    parts: Iterable[Part],
    *,
    tokenizer: TextTokenizer,
    meta: dict[str, Any],
    writers: int = 1,
    total: int = 0,
    progress: Callable[[str], None] = print,
) -> storage.CommittedFolder:
    """Commit `<split>/index.json`, `<split>/lengths.npz` and shards at `uri`, or find them committed.

    Args:
        uri: destination folder, local or `s3://`.
        parts: all of them, in order.
        tokenizer: that lengths are measured with.
        meta: of the committed folder; `num_samples` (by split) is added.
        writers: processes; 1 writes in this one.
        total: number of examples, for the progress.
        progress: is given a line now and then.

    Raises:
        DataError: a medium or an annotation is wrong (the first in order), or there is no example.
        PlatformError: the disk is full, the object store failed or a writer died.  What was finished is kept.
    """
    if storage.is_committed(uri):
        return storage.open_committed(uri)
    try:
        committed = _build_shards(uri, parts, tokenizer, meta, writers, _Progress(total, progress))
    except (Molmo2Error, OSError):
        if not storage.is_committed(uri):
            raise
        committed = storage.open_committed(uri)  # another run was faster, and has removed the parts under our feet
    storage.remove_folder(uri + _PARTS)
    storage.remove_abandoned(uri.rpartition("/")[0], f"*{_PARTS}")
    return committed


def _build_shards(
    uri: str,
    parts: Iterable[Part],
    tokenizer: TextTokenizer,
    meta: dict[str, Any],
    writers: int,
    progress: _Progress,
) -> storage.CommittedFolder:
    written: dict[Split, list[_Written]] = {}
    with closing(_write_parts(uri + _PARTS, parts, tokenizer, writers)) as made:
        for part in made:
            written.setdefault(part.split, []).append(part)
            progress.add(part)
    progress.finish()
    if not written:
        raise DataError(uri, found="no examples", expected="at least one", mend="see the quarantine")
    num_samples = {split: sum(len(part.table) for part in found) for split, found in written.items()}

    def fill(folder: Path) -> dict[str, Any]:
        for split, found in written.items():
            (folder / split).mkdir()
            (folder / split / index.FILE).write_bytes(index.encode_index(p.folder.meta["entry"] for p in found))
            (folder / split / lengths.FILE).write_bytes(encode_table(join_tables([part.table for part in found])))
        return meta | {"num_samples": num_samples}

    shards = {
        f"{split}/{index.shard_name(number)}": part.folder.stored(SHARD)
        for split, found in written.items()
        for number, part in enumerate(found)
    }
    return storage.commit_folder(uri, fill, shards)


def _write_parts(
    folder: str, parts: Iterable[Part], tokenizer: TextTokenizer, writers: int
) -> Generator[_Written, None, None]:
    """Each part once it is committed, in order."""
    if writers == 1:
        for part in parts:
            yield _write(folder, part, tokenizer)
        return
    # Spawned, not forked: this process may have threads (of the object store's client), whose locks a fork would copy.
    pool = ProcessPoolExecutor(writers, multiprocessing.get_context("spawn"), _start_writer, (tokenizer,))
    try:
        waiting: deque[Future[_Written]] = deque()
        for part in parts:
            waiting.append(pool.submit(_write_in_process, folder, part))
            if len(waiting) >= _PARTS_AHEAD * writers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise PlatformError(
            "a writer of shards", found="died", mend="check memory; shards.writers lower needs less of it"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _write(folder: str, part: Part, tokenizer: TextTokenizer) -> _Written:
    uri = storage.join(folder, f"{part.split}-{part.key}")
    reused = storage.is_committed(uri)
    made = write_part(uri, part.examples, tokenizer)
    return _Written(split=part.split, folder=made, table=decode_table(made.read(lengths.FILE), uri), reused=reused)


_tokenizer: TextTokenizer | None = None


def _start_writer(tokenizer: TextTokenizer) -> None:
    """Runs first in each writer process."""
    global _tokenizer
    _tokenizer = tokenizer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt of the terminal is the parent's to handle
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:  # a pool's workers do not notice when it is killed
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _write_in_process(folder: str, part: Part) -> _Written:
    assert _tokenizer is not None
    return _write(folder, part, _tokenizer)


class _Progress:
    """Says how far the work is, at most every PROGRESS_SECONDS."""

    def __init__(self, total: int, say: Callable[[str], None]) -> None:
        self._total, self._say = total, say
        self._started = self._said = time.monotonic()
        self._examples = self._new_examples = self._reused = 0
        self._bytes = 0

    def add(self, part: _Written) -> None:
        """One more part is done."""
        self._examples += len(part.table)
        if part.reused:
            self._reused += 1
        else:
            self._new_examples += len(part.table)
            self._bytes += part.folder.stored(SHARD).num_bytes
        if (now := time.monotonic()) - self._said > PROGRESS_SECONDS:
            self._said = now
            seconds = now - self._started
            left = (self._total - self._examples) * seconds / max(self._new_examples, 1)
            of_total = f" of {self._total}" if self._total else ""
            more = f", about {left:.0f} s left" if self._total and self._new_examples else ""
            self._say(f"{self._examples}{of_total} examples, {self._bytes / seconds / 1e6:.1f} MB/s{more}")

    def finish(self) -> None:
        """All parts are done."""
        if self._reused:
            self._say(f"{self._reused} shards were finished by a run before")
