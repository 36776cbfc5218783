"""Step 2: the validated manifest of one dataset -> MDS shards with a side table of lengths."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from molmo2core import storage
from molmo2core.checkpoints.fetch import TOKENIZER_FILES, fetched_folder
from molmo2core.errors import DataError, exit_with_message
from molmo2core.recipe.load import from_json
from molmo2core.recipe.sections import ShardSection
from molmo2core.references import ManifestsRef, ShardsRef, read_reference, write_reference
from molmo2core.shards.manifest_parts import content_digest, manifest_parts, measure_rows
from molmo2core.shards.parts import build_shards
from molmo2core.special_tokens import TextTokenizer, load_tokenizer, tokenizer_digest
from molmo2core.stages.report import StageReport

FORMAT = 5
"""Version of what this stage writes: part of the key."""


def run(section: ShardSection, *, manifests: Path, dataset: str, output: Path) -> StageReport:
    """Build the shards of `dataset`, or find them built, and write their ShardsRef to `output`.

    Shards that a killed run has finished are kept and found by the next one.

    Raises:
        DataError: the dataset is not in the manifests or has no rows, a medium or the tokenizer is missing.
        PlatformError: the disk is full, the object store failed or a writer died; no later stage sees anything then.
    """
    started = time.monotonic()
    parent = read_reference(manifests, ManifestsRef)
    if dataset not in parent.datasets:
        raise DataError(str(manifests), found=f"no dataset {dataset}", expected=f"one of {', '.join(parent.datasets)}")
    manifest = storage.join(storage.open_committed(parent.uri).uri, f"{dataset}.jsonl")
    with fetched_folder(section.tokenizer, section.workspace, TOKENIZER_FILES) as fetched:
        digest, tokenizer = tokenizer_digest(fetched), load_tokenizer(fetched)
    content = content_digest(manifest, section.workspace)
    key = storage.content_key("build_shards", FORMAT, content, section.shards.shard_bytes, digest)
    uri = storage.join(section.workspace, "shards", dataset, key)
    reused = storage.is_committed(uri)
    folder = storage.open_committed(uri) if reused else _build(uri, section, manifest, dataset, tokenizer, digest)
    counts: dict[str, int] = folder.meta["num_samples"]
    num_bytes = sum(facts["bytes"] for facts in folder.files.values())
    seconds = time.monotonic() - started
    report = StageReport(
        stage=f"build_shards.{dataset}",
        seconds=seconds,
        reused=reused,
        metrics={"bytes": float(num_bytes)} | {f"samples_{split}": float(count) for split, count in counts.items()},
        lines=(f"{dataset}: {', '.join(f'{n} {split}' for split, n in counts.items())}, {num_bytes / 1e6:.1f} MB",),
    )
    write_reference(
        ShardsRef(
            uri=folder.uri,
            digest=folder.digest,
            dataset=dataset,
            tokenizer_digest=digest,
            num_samples=counts,
            facts={"bytes": num_bytes},
            report=report.to_json(),
            parents=(parent,),
        ),
        output,
    )
    print(f"{report.stage}: {'reused' if reused else 'made'} {folder.uri} in {seconds:.1f} s", flush=True)
    return report


def _build(
    uri: str, section: ShardSection, manifest: str, dataset: str, tokenizer: TextTokenizer, digest: str
) -> storage.CommittedFolder:
    def say(line: str) -> None:
        print(f"  {dataset}: {line}", flush=True)

    sizes = measure_rows(manifest, say)
    if not sizes:
        raise DataError(manifest, found="no rows", expected="at least one", mend="see the quarantine")
    shard_bytes = section.shards.shard_bytes
    return build_shards(
        uri,
        manifest_parts(manifest, section.workspace, sizes, shard_bytes),
        tokenizer=tokenizer,
        meta={"dataset": dataset, "tokenizer": section.tokenizer, "tokenizer_digest": digest},
        writers=min(section.shards.writers, 1 + sum(sizes) // shard_bytes),
        total=len(sizes),
        progress=say,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m molmo2core.stages.shard --section S --manifests REF --dataset NAME --output REF`."""
    parser = argparse.ArgumentParser(prog="python -m molmo2core.stages.shard", description=__doc__)
    parser.add_argument("--section", type=Path, required=True, help="JSON file of a ShardSection")
    parser.add_argument("--manifests", type=Path, required=True, help="JSON file of a ManifestsRef")
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--output", type=Path, required=True, help="where the ShardsRef is written")
    options = parser.parse_args(arguments)
    try:
        section = from_json(storage.read_bytes(str(options.section)).decode(), ShardSection)
        run(section, manifests=options.manifests, dataset=options.dataset, output=options.output)
    except Exception as error:
        return exit_with_message(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
