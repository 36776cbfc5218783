"""Step 2: the validated manifest of one dataset -> MDS shards with a side table of lengths."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from molmo2core import storage
from molmo2core.checkpoints.fetch import TOKENIZER_FILES, fetched_folder
from molmo2core.errors import DataError, exit_with_message
from molmo2core.examples import Example, ManifestRow
from molmo2core.manifest.schema import example_from_row, read_manifest
from molmo2core.recipe.load import from_json
from molmo2core.recipe.sections import ShardSection
from molmo2core.references import ManifestsRef, ShardsRef, read_reference, write_reference
from molmo2core.shards.writer import write_shards
from molmo2core.special_tokens import load_tokenizer, tokenizer_digest
from molmo2core.stages.report import StageReport

FORMAT = 3
"""Version of what this stage writes: part of the key."""


def run(section: ShardSection, *, manifests: Path, dataset: str, output: Path) -> StageReport:
    """Build the shards of `dataset`, or find them built, and write their ShardsRef to `output`.

    Raises:
        DataError: the dataset is not in the manifests or has no rows, a medium or the tokenizer is missing.
        PlatformError: the disk is full or the object store failed; nothing is visible then.
    """
    started = time.monotonic()
    parent = read_reference(manifests, ManifestsRef)
    if dataset not in parent.datasets:
        raise DataError(str(manifests), found=f"no dataset {dataset}", expected=f"one of {', '.join(parent.datasets)}")
    manifest = storage.join(storage.open_committed(parent.uri).uri, f"{dataset}.jsonl")
    with fetched_folder(section.tokenizer, section.workspace, TOKENIZER_FILES) as fetched:
        digest, tokenizer = tokenizer_digest(fetched), load_tokenizer(fetched)
    key = storage.content_key(
        "build_shards",
        FORMAT,
        _content_digest(manifest, section.workspace),
        dataclasses.asdict(section.shards),
        digest,
    )
    uri = storage.join(section.workspace, "shards", dataset, key)
    reused = storage.is_committed(uri)

    def fill(folder: Path) -> dict[str, Any]:
        counts = write_shards(_examples(manifest), folder, config=section.shards, tokenizer=tokenizer)
        if not counts:
            raise DataError(manifest, found="no rows", expected="at least one", mend="see the quarantine")
        return {"dataset": dataset, "tokenizer_digest": digest, "num_samples": counts}

    folder = storage.commit_folder(uri, fill)
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


def _examples(manifest: str) -> Iterator[Example]:
    for row in read_manifest(manifest):
        try:
            example = example_from_row(row, storage.read_bytes)
        except DataError as error:
            raise DataError(f"{manifest}:{row.line}", found=str(error), mend="validate the data again") from error
        recorded = row.content["measured"].get("sha256", [])
        for name, content, expected in zip(
            row.content["media"].get("files", []), example.media.files, recorded, strict=False
        ):
            if hashlib.sha256(content).hexdigest() != expected:
                raise DataError(
                    f"{manifest}:{row.line}",
                    found=f"{name} has changed since it was validated",
                    expected=f"sha256 {expected}",
                    mend="validate the data again",
                )
        yield example


def _content_digest(manifest: str, workspace: str) -> str:
    """sha256 over the rows, media named by their checksums where validation recorded them, else by their place
    relative to the workspace: the same content in another workspace has the same digest.
    """
    digest = hashlib.sha256()
    root = workspace if storage.is_remote(workspace) else os.path.abspath(workspace)
    for row in read_manifest(manifest):
        digest.update(json.dumps(_placeless(row, storage.join(root, "")), sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def _placeless(row: ManifestRow, root: str) -> dict[str, Any]:
    content = dict(row.content)
    media = dict(content["media"])
    if content.get("measured", {}).get("sha256"):
        media.pop("files", None)
    else:
        media["files"] = [name.removeprefix(root) for name in media.get("files", [])]
    return content | {"media": media}


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
