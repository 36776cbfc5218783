"""A split's `index.json`: made from the entries of its shards, and believed only after it was checked.

streaming trusts it: `../x` as a file name makes its reader write outside its cache folder, and a shard that is
shorter than recorded gives samples that end early without an error.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from molmo2core.errors import DataError
from molmo2core.shards.encoding import COLUMNS
from molmo2core.shards.mds import HASH, describe_columns

FILE = "index.json"
_DESCRIBED = describe_columns(COLUMNS) | {"zip_data": None}
"""What every entry says beside its file's facts."""


@dataclass(frozen=True, kw_only=True)
class ShardFile:
    """One shard as its index describes it."""

    name: str
    num_samples: int
    num_bytes: int
    checksum: str
    """mds.file_checksum"""


def shard_name(number: int) -> str:
    """File name of a split's shard."""
    return f"shard.{number:05}.mds"


def encode_index(entries: Iterable[Mapping[str, Any]]) -> bytes:
    """The index of a split from the entries that mds.write_shard gave, in order; shards are named by their number."""
    named = [
        {**entry, "raw_data": {**entry["raw_data"], "basename": shard_name(number)}}
        for number, entry in enumerate(entries)
    ]
    return json.dumps({"version": 2, "shards": named}, sort_keys=True).encode()


def parse_index(content: bytes, where: str) -> tuple[ShardFile, ...]:
    """The shards that an index lists.

    Raises:
        DataError: not an index of uncompressed MDS shards with our columns (so none that runs code when read), a
            file name that is more than a name, or a shard without checksum.
    """
    try:
        index = json.loads(content)
        shards = tuple(
            ShardFile(
                name=shard["raw_data"]["basename"],
                num_samples=shard["samples"],
                num_bytes=shard["raw_data"]["bytes"],
                checksum=shard["raw_data"]["hashes"].get(HASH, ""),
            )
            for shard in index["shards"]
        )
        described = [
            {name: value for name, value in shard.items() if name not in ("samples", "raw_data")}
            for shard in index["shards"]
        ]
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise DataError(where, found=f"no index of MDS shards ({error})", mend="build the shards again") from error
    for found in described:
        if found != _DESCRIBED:
            names = [name for name in {**found, **_DESCRIBED} if found.get(name) != _DESCRIBED.get(name)]
            raise DataError(
                where,
                found=", ".join(f"{name} {found.get(name)}" for name in names),
                expected=", ".join(f"{name} {_DESCRIBED.get(name)}" for name in names),
                mend="build the shards again",
            )
    for shard in shards:
        if not isinstance(shard.name, str) or not _is_plain(shard.name):
            raise DataError(where, found=f"file name {shard.name!r}", expected="a plain name inside the folder")
        if not shard.checksum:
            raise DataError(where, found=f"no {HASH} checksum of {shard.name}", mend="build the shards again")
        if not (isinstance(shard.num_samples, int) and isinstance(shard.num_bytes, int) and shard.num_samples > 0):
            raise DataError(where, found=f"{shard.num_samples} samples in {shard.num_bytes} bytes of {shard.name}")
    if len({shard.name for shard in shards}) != len(shards):
        raise DataError(where, found="a shard listed twice")
    return shards


def _is_plain(name: str) -> bool:
    return PurePosixPath(name).name == name and name not in ("", ".", "..", FILE) and not set(name) & {"\\", "\0"}
