"""Small JSON files that name big things: what travels between pipeline steps instead of shards and checkpoints.

A reference names a *committed* folder (storage.py) by address and content digest, and carries its parents, so that
the whole lineage of a model can be read from its last reference even when steps were served from a cache.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from molmo2core import storage
from molmo2core.errors import DataError

FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Base: address, content digest and parents of one committed folder."""

    uri: str
    digest: str
    """sha256 over the folder's file list (storage.CommittedFolder.digest)."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Numbers worth showing, for people and lineage; no program logic depends on them."""
    report: dict[str, Any] = field(default_factory=dict)
    """The StageReport of the run that made or reused it."""
    parents: tuple[Reference, ...] = ()
    format_version: int = FORMAT_VERSION

    def ancestors(self) -> Iterator[Reference]:
        """This reference and everything it was made from, nearest first, without repeats.

        Two places with the same content are two.
        """
        seen: set[tuple[str, str]] = set()
        queue: list[Reference] = [self]
        while queue:
            reference = queue.pop(0)
            if (reference.uri, reference.digest) in seen:
                continue
            seen.add((reference.uri, reference.digest))
            yield reference
            queue.extend(reference.parents)


@dataclass(frozen=True, kw_only=True)
class ManifestsRef(Reference):
    """Validated manifests (one per dataset), quarantine and Data Docs.

    Folder: `<dataset>.jsonl`, `quarantine.jsonl`, `data_docs/index.html`, `summary.json`.
    """

    datasets: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class ShardsRef(Reference):
    """MDS shards of one dataset.

    Folder: `<split>/index.json` and shards, `<split>/lengths.npz` (side table), for each split that has samples.
    """

    dataset: str
    tokenizer_digest: str
    num_samples: dict[str, int]
    """Samples by split."""


@dataclass(frozen=True, kw_only=True)
class PackPlanRef(Reference):
    """A pack plan of one training stage; parents are the ShardsRefs that its sample ids index, in order."""

    stage: str
    num_packs: int


@dataclass(frozen=True, kw_only=True)
class CheckpointRef(Reference):
    """Weights at the end of a training stage.  Folder: `model.safetensors`, `model_config.json`.

    Parents: the plan and, after the first stage, the checkpoint that training started from.
    """

    stage: str
    step: int
    recipe_fingerprint: str


@dataclass(frozen=True, kw_only=True)
class ExportRef(Reference):
    """A Hugging Face folder in the released Molmo2 format; parent: the CheckpointRef."""

    step: int


@dataclass(frozen=True, kw_only=True)
class EvaluationRef(Reference):
    """Predictions, `report.json`, `report.html`; parents: the ExportRef and the ShardsRefs evaluated on."""

    passed: bool
    reasons: tuple[str, ...]
    """Why the gate refused, in plain words; empty when it passed."""
    metrics: dict[str, float]
    blind_metrics: dict[str, float]
    """The same metrics of the same model with its images blanked."""


@dataclass(frozen=True, kw_only=True)
class ModelVersionRef(Reference):
    """A registered model version; parent: the EvaluationRef."""

    name: str
    version: str
    aliases: tuple[str, ...]


_KINDS: dict[str, type[Reference]] = {
    kind.__name__: kind
    for kind in (ManifestsRef, ShardsRef, PackPlanRef, CheckpointRef, ExportRef, EvaluationRef, ModelVersionRef)
}
AnyReference = TypeVar("AnyReference", bound=Reference)


def write_reference(reference: Reference, path: Path) -> None:
    """Write `reference` as JSON to `path` (a KFP artifact's path), whole, creating its folder.

    Raises:
        PlatformError: the disk is full.
    """
    storage.write_bytes(str(path), (json.dumps(_to_json(reference), indent=1, sort_keys=True) + "\n").encode())


def read_reference(path: Path, kind: type[AnyReference]) -> AnyReference:
    """Read the reference at `path`.

    Raises:
        DataError: the file is missing, is no reference, is of another kind or of another format version.
    """
    if not path.is_file():
        raise DataError(str(path), found="no such file", expected=f"a {kind.__name__}", mend="run the step before")
    try:
        reference = _from_json(json.loads(path.read_text()))
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(str(path), found=f"not a reference ({error})", expected=f"a {kind.__name__}") from error
    if not isinstance(reference, kind):
        raise DataError(str(path), found=type(reference).__name__, expected=f"a {kind.__name__}")
    if reference.format_version != FORMAT_VERSION:
        raise DataError(
            str(path),
            found=f"format version {reference.format_version}",
            expected=str(FORMAT_VERSION),
            mend="run the step that made it again",
        )
    return reference


def _to_json(reference: Reference) -> dict[str, Any]:
    values = {f.name: getattr(reference, f.name) for f in dataclasses.fields(reference)}
    values["parents"] = [_to_json(parent) for parent in reference.parents]
    return {"kind": type(reference).__name__} | values


def _from_json(values: dict[str, Any]) -> Reference:
    kind = _KINDS[values.pop("kind")]
    values["parents"] = tuple(_from_json(parent) for parent in values["parents"])
    listed = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    return kind(**values | listed)
