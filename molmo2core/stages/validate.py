"""Step 1: delivered manifests and media -> validated manifests, quarantine with reasons, Data Docs."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from molmo2core import storage
from molmo2core.errors import DataError, exit_with_message
from molmo2core.manifest.rules import Limits
from molmo2core.manifest.validate import (
    DeliveredRow,
    digest_media,
    measure_media,
    media_of,
    read_delivered,
    refuse_if_unusable,
    validate_rows,
    write_validation,
)
from molmo2core.recipe.load import from_json
from molmo2core.recipe.sections import ValidateSection
from molmo2core.references import ManifestsRef, write_reference
from molmo2core.sources.shapes import make_corpus
from molmo2core.stages.report import StageReport

FORMAT = 3
"""Version of what this stage writes and of its rules: part of the key."""


def run(section: ValidateSection, *, output: Path) -> StageReport:
    """Validate all datasets together, or find them validated, and write their ManifestsRef to `output`.

    With `section.data.shapes` the synthetic corpus is rendered into `<workspace>/corpus` first.  When the delivery is
    refused, quarantine and Data Docs stay in `<workspace>/manifests/<key>.failed`, which no later stage reads.

    Raises:
        DataError: a manifest is missing or empty, too many rows are refused, or a required split has no good row.
        PlatformError: the disk is full or the object store failed.
    """
    started = time.monotonic()
    workspace = section.workspace if storage.is_remote(section.workspace) else os.path.abspath(section.workspace)
    if section.data.shapes:
        corpus = storage.join(workspace, "corpus")
        made = make_corpus(corpus, section.data.shapes)
        print(f"validate_data: {'made' if made else 'reused'} {corpus}", flush=True)
    manifests = {name: storage.resolve(workspace, uri) for name, uri in section.data.manifests.items()}
    delivered = read_delivered(manifests)
    media = media_of(delivered)
    digests = digest_media(media)
    relative = _relative_to_folder_in(workspace)
    limits = Limits(
        max_images=section.preprocessing_limits.max_images,
        max_images_held_out=section.evaluation_limits.max_images,
        allowed_licenses=section.data.allowed_licenses,
        forbidden_generators=section.data.forbidden_generators,
    )
    key = _key(section, limits, delivered, {relative(name): digest for name, digest in digests.items()})
    uri = storage.join(workspace, "manifests", key)
    reused = storage.is_committed(uri)

    def fill(folder: Path) -> dict[str, Any]:
        validation = validate_rows(
            delivered,
            facts=measure_media(media),
            digests=digests,
            limits=limits,
            run_name=key,
            docs=folder / "data_docs",
        )
        write_validation(validation, folder, relative)
        failed = f"{uri}.failed"
        try:
            refuse_if_unusable(validation, section.data, storage.join(failed, "quarantine.jsonl"))
        except DataError:
            for name in storage.list_files(str(folder)):
                storage.write_bytes(storage.join(failed, name), (folder / name).read_bytes())
            print(f"validate_data: see {storage.join(failed, 'data_docs/index.html')}", file=sys.stderr, flush=True)
            raise
        return {"datasets": sorted(validation.clean), "summary": validation.summary()}

    folder = storage.commit_folder(uri, fill)
    report = _report(folder, seconds=time.monotonic() - started, reused=reused)
    write_reference(
        ManifestsRef(
            uri=folder.uri,
            digest=folder.digest,
            datasets=tuple(folder.meta["datasets"]),
            facts=folder.meta["summary"],
            report=report.to_json(),
        ),
        output,
    )
    print("\n".join(report.lines))
    print(f"{report.stage}: {'reused' if reused else 'made'} {folder.uri} in {report.seconds:.1f} s", flush=True)
    return report


def _key(section: ValidateSection, limits: Limits, delivered: list[DeliveredRow], digests: dict[str, str]) -> str:
    """Everything that the outcome follows from: rules, limits, every delivered line, every medium's content."""
    return storage.content_key(
        "validate_data",
        FORMAT,
        dataclasses.asdict(limits),
        section.data.max_quarantined_fraction,
        section.data.required_splits,
        [(row.dataset, row.line, row.raw.decode(errors="backslashreplace")) for row in delivered],
        digests,
    )


def _relative_to_folder_in(workspace: str) -> Callable[[str], str]:
    """How a medium's address is written into `<workspace>/manifests/<key>/<dataset>.jsonl`.

    Media inside a local workspace are written relative to the manifest, so that the workspace can be moved; all others
    keep their address.
    """
    inside = storage.join(workspace, "")

    def relative(address: str) -> str:
        if storage.is_remote(workspace) or not address.startswith(inside):
            return address
        return f"../../{address.removeprefix(inside)}"

    return relative


def _report(folder: storage.CommittedFolder, *, seconds: float, reused: bool) -> StageReport:
    summary = folder.meta["summary"]
    rules = ", ".join(f"{rule} ({count})" for rule, count in summary["rules"].items())
    lines = [f"{summary['clean']} of {summary['rows']} rows are good, {summary['quarantined']} quarantined"]
    if rules:
        lines.append(f"broken rules: {rules}; see {storage.join(folder.uri, 'quarantine.jsonl')}")
    lines.append(f"Data Docs: {storage.join(folder.uri, 'data_docs/index.html')}")
    return StageReport(
        stage="validate_data",
        seconds=seconds,
        reused=reused,
        metrics={"rows": float(summary["rows"]), "quarantined": float(summary["quarantined"])},
        lines=tuple(lines),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m molmo2core.stages.validate --section S --output REF`."""
    parser = argparse.ArgumentParser(prog="python -m molmo2core.stages.validate", description=__doc__)
    parser.add_argument("--section", type=Path, required=True, help="JSON file of a ValidateSection")
    parser.add_argument("--output", type=Path, required=True, help="where the ManifestsRef is written")
    options = parser.parse_args(arguments)
    try:
        section = from_json(storage.read_bytes(str(options.section)).decode(), ValidateSection)
        run(section, output=options.output)
    except Exception as error:
        return exit_with_message(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
