"""Plan, shards and preprocessing put together as a torch DataLoader of batches."""

from __future__ import annotations

import atexit
import signal
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader

from molmo2core.errors import Molmo2Error, PlatformError
from molmo2core.loading.collator import collate_packs
from molmo2core.loading.dataset import PackDataset
from molmo2core.packing.plan import PackPlan

if TYPE_CHECKING:
    from molmo2core.examples import Batch
    from molmo2core.preprocessing.preprocessor import Preprocessor
    from molmo2core.shards.reader import ExampleReader

WORKER_TIMEOUT_SECONDS = 600.0
"""A worker that gives no batch for so long is taken for hung: an error instead of a silent stop."""


class PackLoader(DataLoader[Any]):
    """A DataLoader whose workers' errors arrive as they were raised, and whose dead workers are a PlatformError."""

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]  # torch wants its private iterator class
        batches = super().__iter__()
        # Workers ignore SIGTERM, by which torch and multiprocessing end them at exit: they must be told before.
        stop_workers = getattr(batches, "_shutdown_workers", None)
        if stop_workers:
            atexit.register(stop_workers)
        try:
            for batch in batches:
                if isinstance(batch, Molmo2Error):
                    raise batch
                yield batch
        except RuntimeError as error:
            if not str(error).startswith("DataLoader"):  # "DataLoader worker ... killed", "DataLoader timed out"
                raise
            raise PlatformError("data loader", found=str(error), mend="check memory and /dev/shm") from error
        finally:
            if stop_workers:
                atexit.unregister(stop_workers)
                stop_workers()


def build_dataloader(
    plan: PackPlan,
    reader: ExampleReader,
    preprocessor: Preprocessor,
    *,
    fingerprint: str,
    global_batch_packs: int,
    data_parallel_rank: int = 0,
    data_parallel_size: int = 1,
    num_workers: int = 0,
    strict: bool = False,
) -> PackLoader:
    """A loader that yields `examples.Batch`, one per step, with this rank's share of each global batch.

    Its dataset has `state_dict(num_packs, True)` and `load_state_dict`, which Composer calls; load before iterating.

    Args:
        plan: packs in training order.
        reader: examples of the plan's shards, in the order of its parents.
        preprocessor: of the plan's stage.
        fingerprint: `PackPlanRef.digest`.
        global_batch_packs: packs of one step on all ranks.
        data_parallel_rank: which share; equal on all ranks of a context-parallel group.
        data_parallel_size: number of shares.
        num_workers: loader processes; 0 loads in this process.
        strict: raise when a pack is larger than planned, instead of leaving branches out.

    Raises:
        DataError: see PackDataset.
    """
    dataset = PackDataset(
        plan,
        fingerprint=fingerprint,
        reader=reader,
        preprocessor=preprocessor,
        global_batch_packs=global_batch_packs,
        data_parallel_rank=data_parallel_rank,
        data_parallel_size=data_parallel_size,
        strict=strict,
    )
    return PackLoader(
        dataset,
        batch_size=dataset.packs_per_rank,
        collate_fn=collate_packs,
        num_workers=num_workers,
        timeout=WORKER_TIMEOUT_SECONDS if num_workers else 0,
        worker_init_fn=_start_worker,
        pin_memory=torch.cuda.is_available(),
    )


def _start_worker(_worker: int) -> None:
    """Launchers signal the whole process group: workers must outlive the SIGTERM on which rank 0 saves."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(1)
