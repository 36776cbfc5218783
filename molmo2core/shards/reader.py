"""Examples by global index, from the committed shards of several datasets."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from molmo2core import storage
from molmo2core.errors import DataError
from molmo2core.examples import Example, Split
from molmo2core.references import ShardsRef
from molmo2core.shards import index
from molmo2core.shards.encoding import example_from_sample, lengths_from_sample
from molmo2core.shards.lengths import SampleLengths

if TYPE_CHECKING:
    from molmo2core.shards.streaming_guards import GuardedStreamingDataset


class ExampleReader:
    """Random access over the concatenation of `refs`, in their order; a real StreamingDataset underneath.

    Shards in a local workspace are read in place; shards behind `s3://` are cached below `cache`, in a folder named
    by content, each downloaded when first needed.  Reference, marker, index and shards are each checked by the
    checksum that the one before holds.  May be forked or pickled into loader workers.  In a process group,
    all ranks must build it together.

    Args:
        refs: shards; datasets without samples in `split` are skipped but keep their place.
        split: which split to read.
        cache: local folder for downloaded shards; several readers may share it.

    Raises:
        DataError: shards are missing, damaged or not those that `refs` name, or no dataset has samples in `split`.
    """

    def __init__(self, refs: Sequence[ShardsRef], split: Split, cache: Path) -> None:
        from molmo2core.shards.streaming_guards import GuardedStream, GuardedStreamingDataset

        self.ranges: dict[str, range] = {}
        """Dataset -> its global indices."""
        streams: list[GuardedStream] = []
        first = 0
        for ref in refs:
            size = ref.num_samples.get(split, 0)
            self.ranges[ref.dataset] = range(first, first + size)
            first += size
            if not size:
                continue
            found = storage.open_committed(ref.uri)
            if found.digest != ref.digest:
                raise DataError(ref.uri, found=f"digest {found.digest}", expected=ref.digest, mend="build them again")
            listing = found.read(f"{split}/{index.FILE}")
            if storage.is_remote(found.uri):
                stream = GuardedStream(local=cache / ref.digest, split=split, listing=listing, source=found.uri)
            else:
                stream = GuardedStream(local=Path(found.uri), split=split, listing=listing)
            listed = sum(file.num_samples for file in stream.files.values())
            if listed != size:
                raise DataError(storage.join(ref.uri, split), found=f"{listed} samples", expected=str(size))
            streams.append(stream)
        if not streams:
            raise DataError(f"split {split}", found="no samples", expected="at least one", mend="check the manifests")
        self._samples: GuardedStreamingDataset = GuardedStreamingDataset(streams)
        self._prefetcher: tuple[int, ThreadPoolExecutor] | None = None

    def __len__(self) -> int:
        return int(self._samples.num_samples)

    def example(self, index: int) -> Example:
        """The example at a global index; waits for its shard.

        Raises:
            IndexError: there is no such index.
            DataError: its shard is missing or damaged.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        return example_from_sample(self._samples[index])

    def lengths(self, index: int) -> SampleLengths:
        """What a plan was made from: the bounds of the example at a global index; errors as `example`."""
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        return lengths_from_sample(self._samples[index])

    def prefetch(self, indices: Iterable[int]) -> None:
        """Start downloading and checking the shards of these examples; errors wait for `example`."""
        waiting = self._samples.unready_shards(indices)
        if not waiting:
            return
        if self._prefetcher is None or self._prefetcher[0] != os.getpid():  # threads do not survive a fork
            self._prefetcher = os.getpid(), ThreadPoolExecutor(max_workers=2, thread_name_prefix="shards")
        for shard in waiting:
            self._prefetcher[1].submit(self._samples.prepare_shard, shard, False)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_prefetcher": None}
