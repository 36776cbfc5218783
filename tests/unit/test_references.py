"""references: what travels between steps must come back equal, whole, and of the expected kind."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from molmo2core import references
from molmo2core.errors import DataError
from molmo2core.references import (
    CheckpointRef,
    EvaluationRef,
    ExportRef,
    ManifestsRef,
    ModelVersionRef,
    PackPlanRef,
    Reference,
    ShardsRef,
    read_reference,
    write_reference,
)

MANIFESTS = ManifestsRef(uri="s3://lake/manifests/1", digest="m1", datasets=("captions", "text"), facts={"rows": 7})
SHARDS = [
    ShardsRef(
        uri=f"s3://lake/shards/{name}",
        digest=f"s-{name}",
        dataset=name,
        tokenizer_digest="t",
        num_samples={"train": 5, "test": 2},
        parents=(MANIFESTS,),
    )
    for name in MANIFESTS.datasets
]
PLAN = PackPlanRef(uri="plans/1", digest="p1", stage="pretrain", num_packs=8, parents=tuple(SHARDS))
CHECKPOINT = CheckpointRef(
    uri="checkpoints/1", digest="c1", stage="pretrain", step=4, recipe_fingerprint="f", parents=(PLAN,)
)
EXPORT = ExportRef(uri="exports/1", digest="e1", step=4, parents=(CHECKPOINT,))
EVALUATION = EvaluationRef(
    uri="evaluations/1",
    digest="v1",
    passed=False,
    reasons=("no better than blind",),
    metrics={"qa": 0.5},
    blind_metrics={"qa": 0.5},
    parents=(EXPORT, *SHARDS),
    report={"seconds": 1.5},
)
VERSION = ModelVersionRef(
    uri="models:/m/3", digest="r1", name="m", version="3", aliases=("candidate",), parents=(EVALUATION,)
)


@pytest.mark.parametrize("reference", [MANIFESTS, SHARDS[0], PLAN, CHECKPOINT, EXPORT, EVALUATION, VERSION])
def test_a_reference_comes_back_equal_with_all_its_ancestors(reference: Reference, tmp_path: Path) -> None:
    """Would catch tuples read back as lists, and parents read back as their base class."""
    path = tmp_path / "made" / "by_the_writer.json"
    write_reference(reference, path)
    assert read_reference(path, type(reference)) == reference


def test_every_kind_of_reference_is_tested_above() -> None:
    tested = {type(reference) for reference in (MANIFESTS, SHARDS[0], PLAN, CHECKPOINT, EXPORT, EVALUATION, VERSION)}
    assert tested == set(references._KINDS.values()) == set(Reference.__subclasses__())


def test_ancestors_come_nearest_first_and_once_though_reached_by_two_ways() -> None:
    digests = [reference.digest for reference in VERSION.ancestors()]
    assert digests == ["r1", "v1", "e1", "s-captions", "s-text", "c1", "m1", "p1"]


def test_a_stage_of_zero_steps_hides_no_stage_before_it() -> None:
    """Its weights have the digest of those it started from; both, and what is behind them, are the lineage."""
    first = dataclasses.replace(CHECKPOINT, uri="checkpoints/2", step=0, digest="same", parents=(CHECKPOINT,))
    second = dataclasses.replace(first, uri="checkpoints/3", parents=(first,))
    assert [ref.uri for ref in second.ancestors() if isinstance(ref, CheckpointRef)] == [
        second.uri, first.uri, CHECKPOINT.uri,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ("{", "not a reference"),
        ("[]", "not a reference"),
        ('{"uri": "x"}', "not a reference"),
        ('{"kind": "Nonsense", "parents": []}', "not a reference"),
        ('{"kind": "ExportRef", "parents": [], "uri": "x", "digest": "d", "step": 1, "extra": 2}', "extra"),
        ('{"kind": "ExportRef", "parents": [], "uri": "x", "digest": "d"}', "step"),
    ],
)
def test_what_is_no_reference_is_named_as_such(content: str, found: str, tmp_path: Path) -> None:
    path = tmp_path / "reference.json"
    path.write_text(content)
    with pytest.raises(DataError, match=found) as caught:
        read_reference(path, ExportRef)
    assert str(path) in str(caught.value)


def test_a_missing_file_another_kind_and_another_format_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "reference.json"
    with pytest.raises(DataError, match="no such file; expected a PackPlanRef; to mend it: run the step before"):
        read_reference(path, PackPlanRef)
    write_reference(EXPORT, path)
    with pytest.raises(DataError, match="ExportRef; expected a PackPlanRef"):
        read_reference(path, PackPlanRef)
    write_reference(dataclasses.replace(EXPORT, format_version=99), path)
    with pytest.raises(DataError, match="format version 99"):
        read_reference(path, ExportRef)
    assert json.loads(path.read_text())["format_version"] == 99
