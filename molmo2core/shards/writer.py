"""Examples -> one shard with its rows of the side table, in a committed folder."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from molmo2core import storage
from molmo2core.annotations import Annotation
from molmo2core.errors import DataError
from molmo2core.examples import Example
from molmo2core.preprocessing.branch_lengths import annotation_tokens_bounds
from molmo2core.preprocessing.frame_times import tracking_grid
from molmo2core.preprocessing.lengths import subtitle_tokens
from molmo2core.preprocessing.seen_tracks import possibly_seen
from molmo2core.shards import lengths
from molmo2core.shards.encoding import COLUMNS, sample_from_example
from molmo2core.shards.lengths import SampleLengths, build_table, encode_table
from molmo2core.shards.mds import Value, write_shard
from molmo2core.special_tokens import TextTokenizer

SHARD = "shard.mds"


def write_part(uri: str, examples: Iterable[Example], tokenizer: TextTokenizer) -> storage.CommittedFolder:
    """Commit a folder with SHARD and lengths.FILE, or find it committed; `meta["entry"]` is for index.encode_index.

    Holds all of `examples` in memory.

    Raises:
        DataError: an example has no bound, or is too large; names it.
        PlatformError: the disk is full or the object store failed.
    """

    def fill(folder: Path) -> dict[str, Any]:
        rows: list[SampleLengths] = []

        def samples() -> Iterator[dict[str, Value]]:
            for example in examples:
                try:
                    rows.append(sample_lengths(example, tokenizer))
                    yield sample_from_example(example, rows[-1])
                except DataError as error:
                    where = f"dataset {example.dataset}, example {example.uid}"
                    raise DataError(where, found=str(error), mend="correct its row and validate it again") from error
                except Exception as error:
                    error.add_note(f"at example {example.uid} of dataset {example.dataset}")
                    raise

        entry = write_shard(folder / SHARD, COLUMNS, samples())
        (folder / lengths.FILE).write_bytes(encode_table(build_table(rows, [len(rows)])))
        return {"entry": entry}

    return storage.commit_folder(uri, fill)


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
