"""A split's `index.json`, believed only after it was checked.

streaming trusts it: `../x` as a file name makes its reader write outside its cache folder, and a shard that is
shorter than recorded gives samples that end early without an error.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

from molmo2core.errors import DataError
from molmo2core.shards.encoding import COLUMNS

FILE = "index.json"


@dataclass(frozen=True, kw_only=True)
class ShardFile:
    """One shard as its index describes it."""

    name: str
    num_samples: int
    num_bytes: int
    hashes: Mapping[str, str]
    """Algorithm -> hex digest."""


def parse_index(content: bytes, where: str) -> tuple[ShardFile, ...]:
    """The shards that an index lists.

    Raises:
        DataError: not an index of uncompressed MDS shards with our columns, a file name that is more than a name,
            or a shard without checksum.
    """
    try:
        index = json.loads(content)
        shards = tuple(
            ShardFile(
                name=shard["raw_data"]["basename"],
                num_samples=shard["samples"],
                num_bytes=shard["raw_data"]["bytes"],
                hashes=shard["raw_data"]["hashes"],
            )
            for shard in index["shards"]
        )
        formats = {(index["version"], shard["format"], shard["compression"]) for shard in index["shards"]}
        columns = [dict(zip(s["column_names"], s["column_encodings"], strict=True)) for s in index["shards"]]
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(where, found=f"no index of MDS shards ({error})", mend="build the shards again") from error
    if formats != {(2, "mds", None)}:
        raise DataError(where, found=f"format {sorted(map(str, formats))}", expected="uncompressed MDS, version 2")
    if any(found != COLUMNS for found in columns):
        raise DataError(where, found=f"columns {columns[0]}", expected=str(COLUMNS), mend="build the shards again")
    names = [shard.name for shard in shards]
    for shard in shards:
        if PurePosixPath(shard.name).name != shard.name or shard.name in ("..", ".", FILE) or "\\" in shard.name:
            raise DataError(where, found=f"file name {shard.name!r}", expected="a plain name inside the folder")
        if not shard.hashes:
            raise DataError(where, found=f"no checksum of {shard.name}", mend="build the shards again")
    if len(set(names)) != len(names):
        raise DataError(where, found="a shard listed twice")
    return shards
