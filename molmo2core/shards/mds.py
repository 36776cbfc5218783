"""The MDS file format, version 2 (mlflow_gx_mds_s3.md 3.1-3.3).

    u32 number of samples N | u32 x (N + 1) where each sample starts, from the start of the file, and where the last
    one ends | JSON that describes the columns | samples

A sample is the u32 lengths of its columns without a fixed size, then the values of all columns, in order of their
names.  All integers are little-endian.

Files are byte for byte those of streaming's MDSWriter, which is not used to write them: it copies each byte three
times, writes an index after an error too, puts an empty shard before a first sample that is above the limit, and
takes seconds to import in every writer process.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from molmo2core.errors import DataError

Value = str | bytes | tuple[bytes, ...] | int | float | list[Any]
"""Of a column; several `bytes` are one value in pieces, so that media need not be copied."""
HASH = "xxh64"
MAX_FILE_BYTES = 1 << 32
"""Offsets within a shard are 32 bit."""
_FIXED_SIZES = {"int": 8, "float64": 8}
_BLOCK = 1 << 20


def describe_columns(columns: Mapping[str, str]) -> dict[str, Any]:
    """What a shard and its index say of columns, given as name -> encoding."""
    names = sorted(columns)
    return {
        "version": 2,
        "format": "mds",
        "compression": None,
        "hashes": [HASH],
        "size_limit": None,
        "column_names": names,
        "column_encodings": [columns[name] for name in names],
        "column_sizes": [_FIXED_SIZES.get(columns[name]) for name in names],
    }


def write_shard(path: Path, columns: Mapping[str, str], samples: Iterable[Mapping[str, Value]]) -> dict[str, Any]:
    """Write one shard and return its entry in an index.  Holds all samples in memory, once.

    Raises:
        DataError: the samples are too large for one file.
    """
    described = describe_columns(columns)
    pieces = [_encode_sample(columns, sample) for sample in samples]
    head = json.dumps(described, sort_keys=True).encode()
    first = 4 * (len(pieces) + 2) + len(head)
    ends = first + np.cumsum([0, *(sum(map(len, sample)) for sample in pieces)])
    if ends[-1] >= MAX_FILE_BYTES:
        raise DataError(
            str(path),
            found=f"{len(pieces)} samples of {ends[-1]} bytes",
            expected=f"less than {MAX_FILE_BYTES}, 32-bit offsets",
            mend="lower shards.shard_bytes",
        )
    checksum = xxhash.xxh64()
    with path.open("wb") as file:
        for piece in (np.array([len(pieces), *ends], "<u4").tobytes(), head, *(p for sample in pieces for p in sample)):
            file.write(piece)
            checksum.update(piece)
    raw_data = {"basename": path.name, "bytes": int(ends[-1]), "hashes": {HASH: checksum.hexdigest()}}
    return described | {"samples": len(pieces), "raw_data": raw_data, "zip_data": None}


def file_checksum(path: Path) -> str:
    """Hex digest of a shard, as an index records it."""
    checksum = xxhash.xxh64()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            checksum.update(block)
    return checksum.hexdigest()


def _encode_sample(columns: Mapping[str, str], sample: Mapping[str, Value]) -> list[bytes]:
    """The bytes of a sample, in pieces."""
    sizes: list[int] = []
    pieces: list[bytes] = []
    for name in sorted(columns):
        value = _encode(columns[name], sample[name])
        if columns[name] not in _FIXED_SIZES:
            sizes.append(sum(map(len, value)))
        pieces += value
    return [np.array(sizes, "<u4").tobytes(), *pieces]


def _encode(encoding: str, value: Value) -> tuple[bytes, ...]:
    match encoding, value:
        case "bytes", bytes():
            return (value,)
        case "bytes", tuple():
            return value
        case "str", str():
            return (value.encode(),)
        case "json", list():
            return (json.dumps(value).encode(),)
        case "int", int():
            return (np.array(value, "<i8").tobytes(),)
        case "float64", float():
            return (np.array(value, "<f8").tobytes(),)
        case _:
            raise TypeError(f"a {type(value).__name__} in a column of {encoding}")
