"""Readers of several ranks that share a cache."""

from __future__ import annotations

from pathlib import Path

from molmo2core.testing.distributed import run_distributed
from molmo2core.testing.tiny_examples import image_examples, read_uids_on_rank, write_tiny_shards


def test_ranks_read_one_cache_together(s3_bucket: str, tmp_path: Path) -> None:
    """Catches ranks that wait for each other in the constructor, or meet in the cache or in shared memory."""
    examples = image_examples("a", 40)
    refs = [write_tiny_shards(examples, f"{s3_bucket}/ws")]
    uids = [example.uid for example in examples] * 2
    assert run_distributed(read_uids_on_rank, 2, refs, tmp_path / "cache") == [uids, uids]
    assert not list((tmp_path / "cache").rglob(".*mds"))
