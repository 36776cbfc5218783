"""How MDS shards are cut and written."""

from __future__ import annotations

from dataclasses import dataclass

from molmo2core.errors import RecipeError

MAX_SHARD_BYTES = 1 << 31


@dataclass(frozen=True, kw_only=True)
class ShardsConfig:
    """Settings of stages.shard."""

    shard_bytes: int = 67_108_864
    """A shard holds consecutive examples up to this many bytes of media and manifest rows, or a single larger one."""
    writers: int = 4
    """Processes that write shards side by side, each holding one shard in memory.  Shards do not depend on it."""

    def __post_init__(self) -> None:
        if not 1 <= self.shard_bytes <= MAX_SHARD_BYTES:
            raise RecipeError("shards.shard_bytes", found=str(self.shard_bytes), expected=f"1 to {MAX_SHARD_BYTES}")
        if self.writers < 1:
            raise RecipeError("shards.writers", found=str(self.writers), expected="1 or more")
