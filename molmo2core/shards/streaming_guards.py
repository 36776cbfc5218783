"""streaming 0.13's dataset with guards against its faults; each is shown by a test in test_streaming_guards.py.

1. A shard that cannot be had ends an epoch early or hangs it: the downloading process leaves the shard's state
   "preparing", on which everybody else waits.  Here the state is put back and the error raised.
2. A download whose checksum fails stays in the cache and is read without complaint by the next process, and what lies
   in a folder already is never checked.  Here a file gets its name only after its checksum was right, and each shard
   that is there already is checked once on each node, before its first sample is read; a bad one is fetched again.
3. "Reused local directory": two readers of one cache, or one after a `kill -9` that left its shared memory behind,
   are refused.  Here streams are local to streaming (`remote=None`), and the download is ours.
4. Names of shared memory are counted up from 0, past those of all other datasets of the machine.  Two processes that
   start at once take the same; one dies, or worse, both share it.  Here counting starts at a random number.
5. Shared memory, also that of other datasets that the constructor only looks at, stays open until the process ends:
   a few dozen datasets use up all file handles; and lock files stay in the temporary folder for ever.  Here they go
   with their dataset.
6. Left alone with `WORLD_SIZE` set, the constructor starts and ends a process group of its own.  Here that is an error.
"""

from __future__ import annotations

import itertools
import os
import secrets
import sys
import time
import uuid
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from streaming import Stream, StreamingDataset
from streaming.base.dataset import _ShardState
from streaming.base.distributed import get_world_size
from streaming.base.format import Reader
from streaming.base.shared import memory as memory_module
from streaming.base.shared import prefix as prefix_module
from streaming.base.shared.memory import SharedMemory
from torch import distributed

from molmo2core import storage
from molmo2core.errors import DataError, PlatformError
from molmo2core.shards import index
from molmo2core.shards.mds import HASH, file_checksum

_NUMBERS = 10**12
PAUSES_SECONDS = (1.0, 3.0, 10.0, 20.0, 30.0)
"""Between tries to download a shard from an object store that fails."""
_DEAD_SECONDS = 3600.0
"""A download to which nothing was added for so long is a killed process's: the object store's client waits a minute."""


class GuardedStream(Stream):  # type: ignore[misc]  # untyped
    """One split of one dataset: read in place, or through a cache folder.

    Args:
        local: folder that holds (or caches) the shards, without the split.
        split: name of the split.
        listing: content of its index; a cached one that differs is replaced.
        source: address of the same folder in the object store; empty when it is read in place.

    Raises:
        DataError: no valid index; or, in place, a shard is missing or of another length than recorded.
    """

    def __init__(self, *, local: Path, split: str, listing: bytes, source: str = "") -> None:
        self.source = storage.join(source, split) if source else ""
        folder = local / split
        self.files = {file.name: file for file in index.parse_index(listing, self.source or str(folder))}
        cached = folder / index.FILE
        if self.source:
            _remove_dead_downloads(folder)
            if not (cached.is_file() and cached.read_bytes() == listing):
                storage.write_bytes(str(cached), listing)
        for file in self.files.values():
            path = folder / file.name
            found = path.stat().st_size if path.is_file() else None
            if found == file.num_bytes:
                continue
            if self.source:
                path.unlink(missing_ok=True)
            else:
                raise DataError(
                    str(path),
                    found="no such file" if found is None else f"{found} bytes",
                    expected=f"{file.num_bytes} bytes",
                    mend="remove the folder of these shards and build them again",
                )
        super().__init__(local=str(local), split=split)

    def set_up_local(self, shards: list[Reader], cache_usage_per_shard: Any) -> None:
        """As the parent; but no shard counts as present before it was checked."""
        super().set_up_local(shards, cache_usage_per_shard)
        cache_usage_per_shard[:] = 0

    def prepare_shard(self, shard: Reader) -> int:
        """See that a shard is here and whole; the bytes that were downloaded."""
        ((facts, _),) = shard.file_pairs
        file = self.files[facts.basename]
        path = Path(self.local) / self.split / file.name
        if path.is_file():
            if file_checksum(path) == file.checksum:
                return 0
            if not self.source:
                self._check(path, file, str(path))
            path.unlink(missing_ok=True)
        self._download_file(file.name)
        return file.num_bytes

    def _download_file(self, from_basename: str, to_basename: str | None = None) -> str:
        """Fetch one shard; it gets its name only when its checksum is as recorded."""
        path = Path(self.local) / self.split / (to_basename or from_basename)
        if not self.source:
            raise DataError(str(path), found="no such file", mend="build these shards again")
        attempt = path.with_name(f".{uuid.uuid4().hex}.{path.name}")
        try:
            source = storage.join(self.source, from_basename)
            storage.download(source, attempt)
            self._check(attempt, self.files[from_basename], source)
            os.replace(attempt, path)
        finally:
            attempt.unlink(missing_ok=True)
        return str(path)

    def _check(self, path: Path, file: index.ShardFile, where: str) -> None:
        found = file_checksum(path)
        if found != file.checksum:
            raise DataError(
                where,
                found=f"{HASH} {found}, {path.stat().st_size} bytes",
                expected=f"{file.checksum}, {file.num_bytes} bytes",
                mend="the shard is damaged: remove the folder of these shards and build them again",
            )


class GuardedStreamingDataset(StreamingDataset):  # type: ignore[misc]  # untyped
    """Random access by id over the concatenation of `streams`.  Collective: all ranks of a process group call it.

    Raises:
        PlatformError: several ranks, but no process group yet.
    """

    def __init__(self, streams: Sequence[GuardedStream]) -> None:
        if get_world_size() > 1 and not distributed.is_initialized():
            raise PlatformError(
                "StreamingDataset",
                found=f"WORLD_SIZE is {get_world_size()}, but there is no process group",
                mend="call torch.distributed.init_process_group before building readers",
            )
        opened: list[SharedMemory] = []
        try:
            with _names_of_its_own(), _shared_memory_collected_in(opened):
                super().__init__(streams=list(streams), shuffle=False, num_canonical_nodes=1, batch_size=1)
        except BaseException:
            _release(opened, os.getpid())
            raise
        weakref.finalize(self, _release, opened, os.getpid())
        if self._unique_rank_world.is_local_leader:
            locks = Path(self._cache_filelock_path), Path(self._shared_barrier.filelock_path)
            weakref.finalize(self, _remove_locks, locks, os.getpid())

    def get_item(self, sample_id: int, retry: int = 7) -> Any:
        """One sample; its shard was checked on this node before.

        An object store that restarts takes longer than its client's three quick tries: it is waited for.

        Raises:
            DataError: the shard is missing or damaged: at once.
            PlatformError: the object store failed for about a minute; or the disk is full, which is said at once.
        """
        shard_id, _ = self.spanner[sample_id]
        pauses = iter(PAUSES_SECONDS)
        while self._shard_states[shard_id] != _ShardState.LOCAL:  # it is not when another process's try has failed
            try:
                self.prepare_shard(shard_id)
            except PlatformError as error:
                pause = next(pauses, None)
                if pause is None or not storage.is_remote(error.where):
                    raise
                print(f"shards: {error}; next try in {pause:g} s", file=sys.stderr, flush=True)
                time.sleep(pause)
        try:
            return super().get_item(sample_id, retry)
        except (ValueError, IndexError) as error:
            ((facts, _),) = self.shards[shard_id].file_pairs
            stream = self.streams[self.stream_per_shard[shard_id]]
            raise DataError(
                storage.join(stream.local, stream.split, facts.basename),
                found=f"sample {sample_id} cannot be read ({error})",
                mend="the file was changed while it was read: start again",
            ) from error

    def unready_shards(self, sample_ids: Iterable[int]) -> list[int]:
        """Shards of these samples that nobody on this node has checked yet, in order of first use."""
        shards = dict.fromkeys(int(self.spanner[sample_id][0]) for sample_id in sample_ids)
        return [shard for shard in shards if self._shard_states[shard] == _ShardState.REMOTE]

    def prepare_shard(self, shard_id: int, blocking: bool = True) -> None:
        """Download a shard unless it is here; after a failure others may try again instead of waiting for ever."""
        try:
            super().prepare_shard(shard_id, blocking)
        except BaseException:
            self._shard_states[shard_id] = _ShardState.REMOTE
            raise

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_cache_filelock"}  # made when needed


@contextmanager
def _names_of_its_own() -> Iterator[None]:
    """Let streaming count names from a number that no other dataset has; ranks of a process group agree on it."""
    first = [secrets.randbelow(_NUMBERS)]
    if distributed.is_available() and distributed.is_initialized():
        distributed.broadcast_object_list(first, src=0)
    original = prefix_module._each_prefix_int
    prefix_module._each_prefix_int = lambda: itertools.count(first[0])
    try:
        yield
    finally:
        prefix_module._each_prefix_int = original


@contextmanager
def _shared_memory_collected_in(opened: list[SharedMemory]) -> Iterator[None]:
    """Note the shared memory that streaming would keep open until the process ends, instead of keeping it."""
    original = memory_module.atexit
    memory_module.atexit = SimpleNamespace(register=lambda cleanup: opened.append(cleanup.__self__))
    try:
        yield
    finally:
        memory_module.atexit = original


def _release(memories: Sequence[SharedMemory], owner: int) -> None:
    """Close shared memory, and delete it where it was made; a forked worker leaves it to its parent."""
    if os.getpid() == owner:
        for memory in memories:
            memory.cleanup()


def _remove_dead_downloads(folder: Path) -> None:
    for attempt in folder.glob(".*"):
        with suppress(FileNotFoundError):  # another reader removes it too
            if time.time() - attempt.stat().st_mtime > _DEAD_SECONDS:
                attempt.unlink()


def _remove_locks(paths: Sequence[Path], owner: int) -> None:
    """Without them the next dataset takes the number again; streaming passes over numbers that have a lock file."""
    if os.getpid() == owner:
        for path in paths:
            path.unlink(missing_ok=True)
