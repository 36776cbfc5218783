"""Examples -> MDS shards and side table, one folder per split."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path

from molmo2core import storage
from molmo2core.annotations import Annotation
from molmo2core.errors import DataError, PlatformError
from molmo2core.examples import Example
from molmo2core.preprocessing.branch_lengths import annotation_tokens_bounds
from molmo2core.preprocessing.frame_times import tracking_grid
from molmo2core.preprocessing.lengths import subtitle_tokens
from molmo2core.preprocessing.seen_tracks import possibly_seen
from molmo2core.shards import index, lengths
from molmo2core.shards.config import ShardsConfig
from molmo2core.shards.encoding import COLUMNS, sample_from_example
from molmo2core.shards.lengths import SampleLengths
from molmo2core.special_tokens import TextTokenizer

PROGRESS_SECONDS = 2.0


def write_shards(
    examples: Iterable[Example],
    folder: Path,
    *,
    config: ShardsConfig,
    tokenizer: TextTokenizer,
    progress: Callable[[str], None] = print,
) -> dict[str, int]:
    """Write `<folder>/<split>/` with shards, `index.json` and `lengths.npz` for each split that occurs.

    Examples keep their order within a split.  An exception leaves an unfinished folder without index; call it inside
    `storage.commit_folder`, which throws that away.  (MDSWriter as a context manager would publish a valid-looking
    index after an error.)

    Returns:
        Samples by split.

    Raises:
        DataError: a uid occurs twice, or an example is too large.
        PlatformError: what was written is not what was meant to be (see also storage.commit_folder for a full disk).
    """
    from streaming import MDSWriter

    writers: dict[str, MDSWriter] = {}
    rows: dict[str, list[SampleLengths]] = {}
    uids: set[str] = set()
    started = reported = time.monotonic()
    try:
        for example in examples:
            if example.uid in uids:
                raise DataError(f"dataset {example.dataset}", found=f"uid {example.uid} twice", expected="unique uids")
            uids.add(example.uid)
            if example.split not in writers:
                out = folder / example.split
                writers[example.split] = MDSWriter(
                    out=str(out), columns=COLUMNS, hashes=[config.hash], size_limit=config.shard_bytes
                )
                rows[example.split] = []
            writers[example.split].write(sample_from_example(example))
            rows[example.split].append(sample_lengths(example, tokenizer))
            if time.monotonic() - reported > PROGRESS_SECONDS:
                reported = time.monotonic()
                rate = len(uids) / (reported - started)
                progress(f"  {example.dataset}: {len(uids)} examples written, {rate:.0f}/s")
        for writer in writers.values():
            writer.finish()
    finally:
        for writer in writers.values():
            writer.executor.shutdown(wait=False, cancel_futures=True)
    for split, split_rows in rows.items():
        shards = index.parse_index(storage.read_bytes(str(folder / split / index.FILE)), split)
        counts = [shard.num_samples for shard in shards]
        for shard in shards:
            path = folder / split / shard.name
            if not path.is_file() or path.stat().st_size != shard.num_bytes:
                raise PlatformError(str(path), found="missing or cut short after writing", mend="check the disk")
        (folder / split / lengths.FILE).write_bytes(lengths.encode_table(lengths.build_table(split_rows, counts)))
    return {split: len(split_rows) for split, split_rows in rows.items()}


def sample_lengths(example: Example, tokenizer: TextTokenizer) -> SampleLengths:
    """The side-table row of one example."""
    num_images = len(example.media.files)
    return SampleLengths(
        uid=example.uid,
        kind=example.media.kind,
        sizes=example.media.sizes,
        duration_seconds=example.media.duration_seconds,
        fps=example.media.fps,
        grid_fps=tracking_grid(example.annotations),
        subtitle_tokens=subtitle_tokens(example.media, tokenizer),
        branch_tokens=tuple(_branch_tokens(item, tokenizer, num_images) for item in example.annotations),
    )


def _branch_tokens(annotation: Annotation, tokenizer: TextTokenizer, num_images: int) -> tuple[int, ...]:
    """Bound of one branch in each style, as any stage may see it."""
    seen = (annotation_tokens_bounds(item, tokenizer, num_images) for item in possibly_seen(annotation))
    return tuple(map(max, zip(*seen, strict=True)))
