"""How MDS shards are cut."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ShardsConfig:
    """Settings of streaming's MDSWriter."""

    shard_bytes: int = 67_108_864
    """Size limit of one shard, before compression; sample offsets are 32 bit, so keep it below 256 MB."""
    hash: str = "xxh64"
    """Checksum recorded per shard and verified at download."""
