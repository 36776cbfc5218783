"""Packs of held-out examples: which, how they are cut, what is left out, and whose share they are."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from molmo2core.examples import DOCUMENT, PADDING
from molmo2core.loading.held_out import HeldOutBatches, HeldOutPacks
from molmo2core.packing.config import PackingConfig
from molmo2core.references import ShardsRef
from molmo2core.shards.reader import ExampleReader
from molmo2core.testing.loading import PREPROCESSOR
from molmo2core.testing.tiny_examples import image_examples, text_examples, write_tiny_shards

PACKING = PackingConfig(sequence_tokens=120, crop_budget=5)
BROKEN, LONG, HUGE = "images-validation-3", "images-validation-1", "images-validation-2"


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[ShardsRef]:
    """Images: one with more questions than a sequence holds, one with a question that fits in none, one broken."""
    folder = str(tmp_path_factory.mktemp("shards"))
    images = image_examples("images", 8, split="validation")
    by_uid = {example.uid: example for example in images}
    question = by_uid[LONG].annotations[0]
    by_uid[LONG] = replace(by_uid[LONG], annotations=(question,) * 20)
    long_question = replace(question, question="a red circle " * 60)
    by_uid[HUGE] = replace(by_uid[HUGE], annotations=(question, long_question))
    by_uid[BROKEN] = replace(by_uid[BROKEN], media=replace(by_uid[BROKEN].media, files=(b"no picture",)))
    texts = text_examples("texts", 5, split="validation") + text_examples("texts", 3)
    return [write_tiny_shards(list(by_uid.values()), folder), write_tiny_shards(texts, folder)]


def packs_of(shards: list[ShardsRef], cache: Path, **changes: Any) -> HeldOutPacks:
    settings: dict[str, Any] = {"preprocessor": PREPROCESSOR, "packing": PACKING, "examples_per_dataset": 6} | changes
    return HeldOutPacks(ExampleReader(shards, "validation", cache), shards, "validation", **settings)


def test_every_branch_that_fits_is_in_one_pack(
    shards: list[ShardsRef], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Would catch a tree that is cut and loses branches, a pack over a budget, a branch that is dropped in silence, and
    a broken medium that ends training."""
    packs = packs_of(shards, tmp_path)
    branches: Counter[str] = Counter()
    uids: set[str] = set()
    for index in range(len(packs)):
        batch = packs.batch(index)
        assert batch["num_tokens"] <= PACKING.sequence_tokens and batch["num_crops"] <= PACKING.crop_budget
        for uid, dataset, tasks in zip(batch["uids"][0], batch["datasets"][0], batch["tasks"][0], strict=True):
            branches[uid] += len(tasks)
            assert uid.startswith(dataset)
            uids.add(uid)
    uids -= {""}  # of a pack whose only medium is broken
    assert branches[LONG] == 20 and branches[HUGE] == 1
    assert uids == {f"{name}-validation-{n}" for name in ("images", "texts") for n in range(6)} - {
        BROKEN,
        "texts-validation-5",
    }
    assert packs.left_out == (f"images/{HUGE}",)
    assert packs.num_examples == 6 + 5
    for index in range(len(packs)):
        packs.batch(index)
    assert capsys.readouterr().err.count(BROKEN) == 1


def test_packs_are_always_the_same(shards: list[ShardsRef], tmp_path: Path) -> None:
    """Bytes and order, in every process and each time: a loss could not be compared with the last one otherwise."""
    packs, again = packs_of(shards, tmp_path / "a"), packs_of(shards, tmp_path / "b")
    for index in range(len(packs)):
        batches = [packs.batch(index), packs.batch(index), again.batch(index)]
        assert all(batch["uids"] == batches[0]["uids"] for batch in batches)
        for name, tensor in batches[0]["packs"][0].items():
            assert all(torch.equal(batch["packs"][0][name], tensor) for batch in batches), name


@pytest.mark.parametrize(("groups", "size"), [(1, 1), (1, 3), (2, 1), (3, 2), (16, 4)])
def test_groups_share_packs_and_have_equally_many_batches(
    shards: list[ShardsRef], tmp_path: Path, groups: int, size: int
) -> None:
    """Would catch a pack that two groups count or none, and a group with a pass fewer, which others wait for."""
    packs = packs_of(shards, tmp_path)
    seen: Counter[int] = Counter()
    lengths = set()
    for group in range(groups):
        batches = list(HeldOutBatches(packs, group=group, groups=groups, size=size))
        lengths.add(len(batches))
        assert len(batches) == len(HeldOutBatches(packs, group=group, groups=groups, size=size))
        for batch in batches:
            assert 1 <= len(batch["packs"]) <= size
            seen.update(number for number in batch["pack_numbers"] if number < len(packs))
    assert len(lengths) == 1
    assert seen == Counter(range(len(packs)))
    assert len(packs) % (3 * 2) != 0  # so that groups with nothing left occurred


def test_a_pack_without_targets_is_a_document(shards: list[ShardsRef], tmp_path: Path) -> None:
    """What a group without packs computes must go through the model as others' do: a token, of no task."""
    packs = packs_of(shards, tmp_path)
    batch = packs.batch(len(packs))
    pack = batch["packs"][0]
    assert pack["input_ids"].shape == (1,) and float(pack["loss_weights"].sum()) == 0
    assert PADDING < int(pack["subsegment_ids"][0]) < DOCUMENT
    assert pack["crops"].shape[1:] == packs.batch(0)["packs"][0]["crops"].shape[1:]
    assert pack["pooling"].shape[1:] == packs.batch(0)["packs"][0]["pooling"].shape[1:]
