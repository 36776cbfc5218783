"""Rows of a validated manifest -> parts, whose media are read in the process that writes them."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from molmo2core import storage
from molmo2core.errors import DataError
from molmo2core.examples import Example, ManifestRow
from molmo2core.manifest.schema import example_from_row, read_manifest
from molmo2core.shards.parts import Part, SizedRow, cut_parts

_READERS = 8
_ROWS_AT_ONCE = 1000


@dataclass(frozen=True, kw_only=True)
class ManifestExamples:
    """The examples of some rows; iterating reads their media, several at a time.

    Raises:
        DataError: a medium is gone or has changed since it was validated, named with its row.
    """

    manifest: str
    rows: tuple[ManifestRow, ...]

    def __iter__(self) -> Iterator[Example]:
        """Examples in the order of the rows."""
        with ThreadPoolExecutor(_READERS) as pool:
            yield from pool.map(self._example, self.rows)

    def _example(self, row: ManifestRow) -> Example:
        try:
            example = example_from_row(row, storage.read_bytes)
        except DataError as error:
            raise _of_row(self.manifest, row, error) from error
        recorded = row.content["measured"].get("sha256", [])
        for name, content, expected in zip(_files(row), example.media.files, recorded, strict=False):
            if hashlib.sha256(content).hexdigest() != expected:
                raise DataError(
                    f"{self.manifest}:{row.line}",
                    found=f"{name} has changed since it was validated",
                    expected=f"sha256 {expected}",
                    mend="validate the data again",
                )
        return example


def content_digest(manifest: str, workspace: str) -> str:
    """sha256 over the rows, media named by their checksums where validation recorded them, else by their place
    relative to the workspace: the same content in another workspace has the same digest.

    Raises:
        DataError: the manifest was never validated.
    """
    digest, root = hashlib.sha256(), _root(workspace)
    for row in read_manifest(manifest):
        if missing := {"id", "split", "media", "measured"} - row.content.keys():
            raise DataError(
                f"{manifest}:{row.line}",
                found=f"a row without {', '.join(sorted(missing))}",
                expected="a manifest made by validate_data",
            )
        digest.update(_placeless(row, root))
    return digest.hexdigest()


def measure_rows(manifest: str, progress: Callable[[str], None]) -> Sequence[int]:
    """Bytes of each row with its media.  Opens no file, so that a lost one is found before hours of work.

    Raises:
        DataError: a medium is gone; names the row.
    """
    sizes = array("q")
    rows = read_manifest(manifest)
    while chunk := list(itertools.islice(rows, _ROWS_AT_ONCE)):
        names = [name for row in chunk for name in _files(row)]
        try:
            found = iter(storage.file_sizes(names))
        except DataError as error:
            owner = next((row for row in chunk if error.where in _files(row)), None)
            raise (_of_row(manifest, owner, error) if owner else error) from error
        sizes.extend(len(json.dumps(row.content)) + sum(next(found) for _ in _files(row)) for row in chunk)
        if len(sizes) % (50 * _ROWS_AT_ONCE) == 0:
            progress(f"{len(sizes)} rows measured")
    return sizes


def manifest_parts(manifest: str, workspace: str, sizes: Sequence[int], shard_bytes: int) -> Iterator[Part]:
    """The parts of a manifest's examples.

    Args:
        manifest: address of a validated manifest.
        workspace: see `content_digest`.
        sizes: from `measure_rows`.
        shard_bytes: see ShardsConfig.
    """
    root = _root(workspace)
    sized = (
        SizedRow(uid=row.content["id"], split=row.content["split"], num_bytes=size, row=row)
        for row, size in zip(read_manifest(manifest), sizes, strict=True)
    )
    for split, rows in cut_parts(sized, shard_bytes):
        digest = hashlib.sha256(b"".join(_placeless(row, root) for row in rows)).hexdigest()
        yield Part(
            split=split,
            key=storage.content_key(digest),
            examples=ManifestExamples(manifest=manifest, rows=tuple(rows)),
        )


def _root(workspace: str) -> str:
    return storage.join(workspace if storage.is_remote(workspace) else os.path.abspath(workspace), "")


def _placeless(row: ManifestRow, root: str) -> bytes:
    """The row as one line of JSON without what depends on the workspace's place."""
    content: dict[str, Any] = dict(row.content)
    media = dict(content["media"])
    if content.get("measured", {}).get("sha256"):
        media.pop("files", None)
    else:
        media["files"] = [name.removeprefix(root) for name in media.get("files", [])]
    return json.dumps(content | {"media": media}, sort_keys=True).encode() + b"\n"


def _files(row: ManifestRow) -> list[str]:
    files: list[str] = row.content["media"].get("files", [])
    return files


def _of_row(manifest: str, row: ManifestRow, error: DataError) -> DataError:
    return DataError(f"{manifest}:{row.line}", found=str(error), mend="validate the data again")
