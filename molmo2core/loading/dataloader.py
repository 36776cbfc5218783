"""Plan, shards and preprocessing put together as a torch DataLoader of batches.

Workers hand over single packs, so that what is held ahead of training is bounded by packs and not by the size of the
global batch.  One pack of stage 2 (16,384 tokens, 128 crops of 378 x 378 pixels as bytes) is at most 56.7 MB, one of
stage 3 (36,864 tokens, 384 frames) 168.6 MB (`pack_bytes`).
"""

from __future__ import annotations

import atexit
import functools
import itertools
import math
import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.utils.data import DataLoader

from molmo2core.errors import Molmo2Error, PlatformError
from molmo2core.loading.collator import INDEX_BYTES, TOKEN_BYTES, join_batches
from molmo2core.loading.dataset import PackDataset
from molmo2core.packing.config import PackingConfig
from molmo2core.packing.plan import PackPlan
from molmo2core.preprocessing.config import VisualGeometry
from molmo2core.references import PackPlanRef

if TYPE_CHECKING:
    from molmo2core.examples import Batch
    from molmo2core.preprocessing.preprocessor import Preprocessor
    from molmo2core.shards.reader import ExampleReader

WORKER_TIMEOUT_SECONDS = 600.0
"""A worker that gives no pack for so long is taken for hung: an error instead of a silent stop."""
SHARED_MEMORY = Path("/dev/shm")
"""Where workers put the packs that they hand over."""


class PackSharing(Protocol):
    """How ranks that train on the same packs take turns in loading them (parallel/pack_exchange.py)."""

    rank: int
    size: int

    def __call__(self, found: Batch | Molmo2Error | None, source: int) -> Batch | Molmo2Error:
        """Called by all of them, for each pack: this rank's share of what rank `source` found."""


class PackLoader(DataLoader[Any]):
    """A DataLoader whose workers' errors arrive as they were raised, and whose dead or hung workers are PlatformErrors.

    Args:
        dataset: gives batches of one pack.
        num_workers: loader processes; 0 loads in this process.
        sharing: with ranks that train on the same packs, each of which loads those of its turn.
        timeout_seconds: how long a worker may take for one pack.
    """

    dataset: PackDataset

    def __init__(
        self,
        dataset: PackDataset,
        *,
        num_workers: int,
        sharing: PackSharing | None = None,
        timeout_seconds: float = WORKER_TIMEOUT_SECONDS,
    ) -> None:
        self.sharing = sharing
        self.packs_per_batch = dataset.packs_per_rank
        super().__init__(
            dataset,
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=num_workers,
            prefetch_factor=prefetch_factor(dataset.loaded_per_batch, num_workers) if num_workers else None,
            timeout=timeout_seconds if num_workers else 0,
            worker_init_fn=_start_worker,
            pin_memory=torch.cuda.is_available(),
        )

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]  # torch wants its private iterator class
        packs = super().__iter__()
        # Workers ignore SIGTERM, by which torch and multiprocessing end them at exit: they must be told before.
        stop = functools.partial(_stop_workers, packs)
        atexit.register(stop)
        numbers = itertools.count()
        try:
            while True:
                started = time.monotonic()
                batch = join_batches([self._take(packs, next(numbers)) for _ in range(self.packs_per_batch)])
                batch["data_wait_seconds"] = time.monotonic() - started
                yield batch
        except StopIteration:
            return  # a dataset that ends; PackDataset never does
        finally:
            atexit.unregister(stop)
            stop()

    def _take(self, packs: Iterator[Batch | Molmo2Error], number: int) -> Batch:
        """Pack `number` since the start, loaded here or by another rank."""
        sharing = self.sharing
        if sharing is None:
            return _checked(_next(packs))
        source = number % sharing.size
        found: Batch | Molmo2Error | None = None
        if source == sharing.rank:
            try:
                found = _next(packs)
            except Molmo2Error as error:  # the others wait: they must hear of it
                found = error
        return _checked(sharing(found, source))


def build_dataloader(
    plan: PackPlan,
    reference: PackPlanRef,
    reader: ExampleReader,
    preprocessor: Preprocessor,
    *,
    global_batch_packs: int,
    data_parallel_rank: int = 0,
    data_parallel_size: int = 1,
    num_workers: int = 0,
    sharing: PackSharing | None = None,
    strict: bool = False,
    accept_changed_data: bool = False,
) -> PackLoader:
    """A loader that yields `examples.Batch`, one per step, with this rank's share of each global batch.

    Its dataset has `state_dict(num_packs, True)` and `load_state_dict`, which Composer calls; load before iterating.

    Args:
        plan: packs in training order.
        reference: of the plan.
        reader: examples of the plan's shards, in the order of its parents.
        preprocessor: of the plan's stage.
        global_batch_packs: packs of one step on all ranks.
        data_parallel_rank: which share; equal on all ranks of a context-parallel group.
        data_parallel_size: number of shares.
        num_workers: loader processes; 0 loads in this process.
        sharing: with the other ranks of a context-parallel group.
        strict: raise when a pack is larger than planned, instead of leaving branches out.
        accept_changed_data: go on from a position that was saved with other data, mixture or limits.

    Raises:
        DataError: see PackDataset.
        PlatformError: /dev/shm has no room for the packs that the workers hold ahead.
    """
    dataset = PackDataset(
        plan,
        reference=reference,
        reader=reader,
        preprocessor=preprocessor,
        global_batch_packs=global_batch_packs,
        data_parallel_rank=data_parallel_rank,
        data_parallel_size=data_parallel_size,
        turn=(sharing.rank, sharing.size) if sharing is not None else (0, 1),
        strict=strict,
        accept_changed_data=accept_changed_data,
    )
    if num_workers:
        ahead = num_workers * prefetch_factor(dataset.loaded_per_batch, num_workers)
        _check_shared_memory(ahead, pack_bytes(plan.packing, preprocessor.geometry))
    return PackLoader(dataset, num_workers=num_workers, sharing=sharing)


@contextmanager
def worker_errors(*of_connections: type[Exception]) -> Iterator[None]:
    """What torch raises when a worker is dead or silent, as a PlatformError.

    It comes out of whatever the main thread does when a worker dies, not only out of the loader.

    Args:
        of_connections: errors that also mean it, unless a worker raised them itself: a tensor's memory is fetched from
            the worker, which may be gone before torch knows.
    """
    caught: tuple[type[Exception], ...] = (RuntimeError, *of_connections)
    try:
        yield
    except caught as error:
        # "DataLoader worker (pid 7) is killed", "DataLoader timed out"; "Caught EOFError in DataLoader worker process"
        said = str(error)
        if "in DataLoader worker process" in said or (
            isinstance(error, RuntimeError) and not said.startswith("DataLoader")
        ):
            raise
        raise PlatformError(
            "data loader",
            found=said or type(error).__name__,
            expected="living workers that give packs",
            mend="check memory, /dev/shm and the storage of the shards, then run it again",
        ) from error


def prefetch_factor(packs_per_batch: int, num_workers: int) -> int:
    """Packs that each worker may hold ready: together a whole batch and one more each, and no less than two."""
    return max(2, math.ceil(packs_per_batch / num_workers) + 1)


def pack_bytes(packing: PackingConfig, geometry: VisualGeometry) -> int:
    """Most bytes of one pack's tensors: its crops, its tokens and, if every token were visual, its pooling rows."""
    crops = packing.crop_budget * geometry.num_patches * geometry.patch_bytes
    return crops + packing.sequence_tokens * (TOKEN_BYTES + geometry.max_pool * INDEX_BYTES)


def _check_shared_memory(packs_ahead: int, bytes_of_pack: int) -> None:
    """A container's /dev/shm holds 64 MB unless it is told otherwise; a worker that fills it dies by SIGBUS."""
    if not SHARED_MEMORY.is_dir():
        return
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    needed, found = ranks * packs_ahead * bytes_of_pack, shutil.disk_usage(SHARED_MEMORY).total
    if needed > found:
        raise PlatformError(
            str(SHARED_MEMORY),
            found=f"{found / 1e6:,.0f} MB",
            expected=f"{needed / 1e6:,.0f} MB: {ranks} ranks with {packs_ahead} packs ahead of "
            f"{bytes_of_pack / 1e6:,.1f} MB each",
            mend="give the container more shared memory, or lower loader_workers",
        )


def _next(packs: Iterator[Batch | Molmo2Error]) -> Batch | Molmo2Error:
    with worker_errors(ConnectionError, EOFError, FileNotFoundError):
        return next(packs)


def _checked(element: Batch | Molmo2Error) -> Batch:
    if isinstance(element, Molmo2Error):
        raise element
    return element


def _as_it_is(element: Any) -> Any:
    """torch's own conversion makes lists of tuples."""
    return element


def _stop_workers(packs: Any) -> None:
    """Ask the workers of a DataLoader's iterator to end, and kill those that do not: they ignore SIGTERM."""
    stop = getattr(packs, "_shutdown_workers", None)
    if stop is None:
        return
    stop()
    for worker in packs._workers:
        if worker.is_alive():
            worker.kill()
            worker.join()


def _start_worker(_worker: int) -> None:
    """Launchers signal the whole process group: workers must outlive the SIGTERM on which rank 0 saves."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(1)
