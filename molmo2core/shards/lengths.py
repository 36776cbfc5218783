"""The side table of a split: what a planner must know of every sample, without opening a shard.

Counts here do not depend on a training stage: those of branches are given for every style, and
`preprocessing.lengths.root_bound` turns media facts into bounds on root tokens and crops under a stage's limits.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from molmo2core import storage
from molmo2core.annotations import MediaKind
from molmo2core.errors import DataError
from molmo2core.examples import Split
from molmo2core.preprocessing.config import STYLES

FILE = "lengths.npz"
KINDS: tuple[MediaKind, ...] = ("none", "image", "images", "video")
"""`kind` column of the table: index into this."""


@dataclass(frozen=True, kw_only=True)
class SampleLengths:
    """Facts of one sample."""

    uid: str
    kind: MediaKind
    sizes: tuple[tuple[int, int], ...]
    """Displayed (width, height) of each file."""
    duration_seconds: float
    fps: float = 0.0
    """Of a video, as measured."""
    grid_fps: float = 0.0
    """Of a video with tracks: preprocessing.frame_times.tracking_grid."""
    subtitle_tokens: int
    branch_tokens: tuple[tuple[int, ...], ...]
    """Upper bound of all tokens that each annotation adds, in each of preprocessing.config.STYLES."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LengthsTable:
    """Columns over the N samples of one split, in shard order."""

    kind: npt.NDArray[np.uint8]
    """[N] index into KINDS."""
    sizes: npt.NDArray[np.int32]
    """[F, 2] width and height of all files of all samples."""
    size_offsets: npt.NDArray[np.int64]
    """[N+1] files of sample i: sizes[size_offsets[i]:size_offsets[i + 1]]."""
    duration: npt.NDArray[np.float64]
    """[N] seconds.  Not rounded to float32: a bound on frames must see the very number that the decoder sees."""
    fps: npt.NDArray[np.float64]
    """[N] frames per second."""
    grid_fps: npt.NDArray[np.float64]
    """[N]"""
    subtitle_tokens: npt.NDArray[np.int32]
    """[N]"""
    branch_tokens: npt.NDArray[np.int32]
    """[T, styles] of all branches of all samples."""
    branch_offsets: npt.NDArray[np.int64]
    """[N+1] branches of sample i: branch_tokens[branch_offsets[i]:branch_offsets[i + 1]]."""
    shard_samples: npt.NDArray[np.int64]
    """[shards] samples of each shard; shuffles keep samples of a shard near each other."""
    uids: tuple[str, ...]
    """[N] for messages that name a sample."""

    def __len__(self) -> int:
        return len(self.kind)

    def row(self, index: int) -> SampleLengths:
        """Facts of one sample."""
        files = self.sizes[self.size_offsets[index] : self.size_offsets[index + 1]]
        branches = self.branch_tokens[self.branch_offsets[index] : self.branch_offsets[index + 1]]
        return SampleLengths(
            uid=self.uids[index],
            kind=KINDS[self.kind[index]],
            sizes=tuple((int(width), int(height)) for width, height in files),
            duration_seconds=float(self.duration[index]),
            fps=float(self.fps[index]),
            grid_fps=float(self.grid_fps[index]),
            subtitle_tokens=int(self.subtitle_tokens[index]),
            branch_tokens=tuple(map(tuple, branches.tolist())),
        )


def build_table(rows: Sequence[SampleLengths], shard_samples: Sequence[int]) -> LengthsTable:
    """Columns from rows.

    Raises:
        DataError: the shards do not hold as many samples as there are rows.
    """
    if sum(shard_samples) != len(rows):
        raise DataError(FILE, found=f"{sum(shard_samples)} samples in shards", expected=f"{len(rows)}")
    return LengthsTable(
        kind=np.array([KINDS.index(row.kind) for row in rows], np.uint8),
        sizes=np.array([size for row in rows for size in row.sizes], np.int32).reshape(-1, 2),
        size_offsets=_offsets([len(row.sizes) for row in rows]),
        duration=np.array([row.duration_seconds for row in rows], np.float64),
        fps=np.array([row.fps for row in rows], np.float64),
        grid_fps=np.array([row.grid_fps for row in rows], np.float64),
        subtitle_tokens=np.array([row.subtitle_tokens for row in rows], np.int32),
        branch_tokens=np.array([tokens for row in rows for tokens in row.branch_tokens], np.int32).reshape(
            -1, len(STYLES)
        ),
        branch_offsets=_offsets([len(row.branch_tokens) for row in rows]),
        shard_samples=np.array(shard_samples, np.int64),
        uids=tuple(row.uid for row in rows),
    )


def join_tables(tables: Sequence[LengthsTable]) -> LengthsTable:
    """One table of the samples of all tables, which are at least one, in their order."""

    def join(name: str) -> npt.NDArray[Any]:
        columns = [getattr(table, name) for table in tables]
        if name.endswith("_offsets"):
            return _offsets(np.concatenate([np.diff(column) for column in columns]))
        return np.concatenate(columns)

    uids = tuple(uid for table in tables for uid in table.uids)
    return LengthsTable(**{name: join(name) for name in LengthsTable.__dataclass_fields__ if name != "uids"}, uids=uids)


def encode_table(table: LengthsTable) -> bytes:
    """The table as the content of an .npz file; equal tables give equal bytes."""
    buffer = io.BytesIO()
    columns = {name: getattr(table, name) for name in LengthsTable.__dataclass_fields__ if name != "uids"}
    names = np.frombuffer(json.dumps(table.uids).encode(), np.uint8)
    np.savez_compressed(buffer, **columns, uids=names)
    return buffer.getvalue()


def decode_table(content: bytes, where: str = FILE) -> LengthsTable:
    """Inverse of `encode_table`.

    Raises:
        DataError: the content is no such table.
    """
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as columns:
            values = {name: columns[name] for name in LengthsTable.__dataclass_fields__ if name != "uids"}
            uids = tuple(json.loads(columns["uids"].tobytes()))
    except Exception as error:  # of zip, of deflate, of numpy's headers, of JSON: a dozen types for one fact
        raise DataError(where, found=f"no side table ({error})", mend="build the shards again") from error
    return LengthsTable(**values, uids=uids)


def read_table(shards: storage.CommittedFolder, split: Split) -> LengthsTable:
    """The side table of a split.

    Raises:
        DataError: there is none, or not the one that was committed.
    """
    name = f"{split}/{FILE}"
    return decode_table(shards.read(name), storage.join(shards.uri, name))


def _offsets(counts: npt.ArrayLike) -> npt.NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int64)
