"""streaming 0.13's dataset with guards against its faults; each is shown by a test in test_streaming_guards.py.

1. A shard that cannot be had ends an epoch early or hangs it: the downloading process leaves the shard's state
   "preparing", on which everybody else waits.  Here the state is put back and the error raised.
2. A download whose checksum fails stays in the cache and is read without complaint by the next process.  Here a
   file gets its name only after its checksum was right, and files of another length are removed at the start.
3. "Reused local directory": two readers of one cache, or one after a `kill -9` that left its shared memory behind,
   are refused.  Here streams are local to streaming (`remote=None`), and the download is ours.
4. Two processes that start at once pick the same name for their shared memory; one dies, or worse, both share it.
   Here construction is done under a lock of the machine.
5. Shared memory, also that of other datasets that the constructor only looks at, stays open until the process ends:
   a few dozen datasets use up all file handles.  Here it goes with its dataset, and the looked-at at once.
6. Left alone with `WORLD_SIZE` set, the constructor starts and ends a process group of its own.  Here that is an error.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
import uuid
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

from streaming import Stream, StreamingDataset
from streaming.base.dataset import _ShardState
from streaming.base.distributed import get_local_rank, get_world_size
from streaming.base.hashing import get_hash
from streaming.base.shared import memory as memory_module
from streaming.base.shared.memory import SharedMemory
from torch import distributed

from molmo2core import storage
from molmo2core.errors import DataError, PlatformError
from molmo2core.shards import index


class GuardedStream(Stream):  # type: ignore[misc]  # untyped
    """One split of one dataset: read in place, or through a cache folder.

    Args:
        local: folder that holds (or caches) the shards, without the split.
        split: name of the split.
        source: address of the same folder in the object store; empty when it is read in place.

    Raises:
        DataError: no valid index; or, in place, a shard is missing or of another length than recorded.
    """

    def __init__(self, *, local: Path, split: str, source: str = "") -> None:
        self.source = storage.join(source, split) if source else ""
        folder = local / split
        if self.source and not (folder / index.FILE).is_file():
            content = storage.read_bytes(storage.join(self.source, index.FILE))
            index.parse_index(content, self.source)
            storage.write_bytes(str(folder / index.FILE), content)
        listed = index.parse_index(storage.read_bytes(str(folder / index.FILE)), str(folder / index.FILE))
        self.files = {file.name: file for file in listed}
        for file in listed:
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

    def _download_file(self, from_basename: str, to_basename: str | None = None) -> str:
        """Fetch one shard; it gets its name only when its length and checksum are as recorded."""
        path = Path(self.local) / self.split / (to_basename or from_basename)
        if not self.source:
            raise DataError(str(path), found="no such file", mend="build these shards again")
        file = self.files[from_basename]
        attempt = path.with_name(f".{uuid.uuid4().hex}.{path.name}")
        try:
            storage.download(storage.join(self.source, from_basename), attempt)
            content = attempt.read_bytes()
            for algorithm, expected in file.hashes.items():
                found = get_hash(algorithm, content)
                if found != expected:
                    raise DataError(
                        storage.join(self.source, from_basename),
                        found=f"{algorithm} {found}, {len(content)} bytes",
                        expected=f"{expected}, {file.num_bytes} bytes",
                        mend="the stored shard is damaged: remove its folder and build it again",
                    )
            os.replace(attempt, path)
        finally:
            attempt.unlink(missing_ok=True)
        return str(path)


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
            with _one_construction_at_a_time(), _shared_memory_collected_in(opened):
                super().__init__(streams=list(streams), shuffle=False, num_canonical_nodes=1, batch_size=1)
        except BaseException:
            _release(opened, os.getpid())
            raise
        arrays = (self._shared_barrier._arr, self._next_epoch.arr, self._cache_usage.arr)
        owned = [self._locals_shm, *(array.shm for array in (*arrays, self._shard_states, self._shard_access_times))]
        _release([memory for memory in opened if not any(memory is mine for mine in owned)], os.getpid())
        weakref.finalize(self, _release, owned, os.getpid())

    def prepare_shard(self, shard_id: int, blocking: bool = True) -> None:
        """Download a shard unless it is here; after a failure others may try again instead of waiting for ever."""
        try:
            super().prepare_shard(shard_id, blocking)
        except BaseException:
            self._shard_states[shard_id] = _ShardState.REMOTE
            raise


@contextmanager
def _one_construction_at_a_time() -> Iterator[None]:
    """Hold the machine's lock on local rank 0; other ranks go on once it is held."""
    shared_memory = Path("/dev/shm")
    folder = shared_memory if os.access(shared_memory, os.W_OK) else Path(tempfile.gettempdir())
    with (folder / f"molmo2core-streaming-{os.getuid()}.lock").open("w") as lock:
        if get_local_rank() == 0:
            fcntl.flock(lock, fcntl.LOCK_EX)
        if distributed.is_available() and distributed.is_initialized():
            distributed.barrier()
        yield


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
