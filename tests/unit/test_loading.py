"""From plan to batches: order, resume, refusal, and what happens to media that do not decode."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

from molmo2core.errors import DataError, PlatformError
from molmo2core.examples import PADDING, Batch, Example, TokenizedExample
from molmo2core.loading import dataset as dataset_module
from molmo2core.loading.dataloader import PackLoader, build_dataloader
from molmo2core.loading.fitting import drop_last_branch
from molmo2core.packing.config import PackingConfig
from molmo2core.packing.plan import PackPlan
from molmo2core.packing.plan_files import read_plan, write_plan
from molmo2core.preprocessing.branch_lengths import annotation_tokens_bounds
from molmo2core.preprocessing.config import STYLES, PreprocessingConfig, VisualGeometry
from molmo2core.preprocessing.lengths import root_bound
from molmo2core.preprocessing.preprocessor import Preprocessor
from molmo2core.shards.reader import ExampleReader
from molmo2core.testing.tiny_examples import image_examples, text_examples, write_tiny_shards
from molmo2core.testing.tiny_plan import plan_of_refs
from molmo2core.testing.tiny_tokenizer import tiny_tokenizer

GEOMETRY = VisualGeometry(crop_size=54, patch_size=6, overlap_margins=(1, 1))
LIMITS = PreprocessingConfig(max_crops=2)
PACKING = PackingConfig(sequence_tokens=700, crop_budget=9, window=16)
PREPROCESSOR = Preprocessor(geometry=GEOMETRY, config=LIMITS, tokenizer=tiny_tokenizer(), weighting="described", seed=5)
PACKS, GLOBAL_BATCH = 24, 4


@dataclasses.dataclass(frozen=True)
class Data:
    """A real plan over real shards."""

    plan: PackPlan
    reader: ExampleReader
    examples: list[Example]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    """24 packs of images (trees, some cut) and text, the plan memory-mapped from its folder."""
    folder = tmp_path_factory.mktemp("ws")
    examples = [*image_examples("images", 14), *text_examples("texts", 6)]
    examples[0] = dataclasses.replace(examples[0], annotations=examples[2].annotations * 12)  # more than a sequence
    refs = [write_tiny_shards(examples[:14], str(folder)), write_tiny_shards(examples[14:], str(folder))]
    planned = plan_of_refs(
        refs, {"images": 0.8, "texts": 0.2}, packing=PACKING, num_packs=PACKS, geometry=GEOMETRY, limits=LIMITS
    )
    write_plan(planned, {"images": 0.8, "texts": 0.2}, folder)
    return Data(plan=read_plan(folder), reader=ExampleReader(refs, "train", folder / "cache"), examples=examples)


def loader(data: Data, **changes: Any) -> PackLoader:
    settings = {"fingerprint": "f1", "global_batch_packs": GLOBAL_BATCH, "strict": True} | changes
    return build_dataloader(settings.pop("plan", data.plan), data.reader, PREPROCESSOR, **settings)


def batches(packs: PackLoader, count: int) -> list[Batch]:
    iterator = iter(packs)
    return [next(iterator) for _ in range(count)]


def same(first: Batch, second: Batch) -> bool:
    """Equal to the last byte."""
    if {k: v for k, v in first.items() if k != "packs"} != {k: v for k, v in second.items() if k != "packs"}:
        return False
    return len(first["packs"]) == len(second["packs"]) and all(
        torch.equal(pack[name], other[name])
        for pack, other in zip(first["packs"], second["packs"], strict=True)
        for name in pack
    )


def joined(parts: list[Batch]) -> Batch:
    """What all ranks got for one step, in order of rank."""
    return Batch(
        packs=[pack for part in parts for pack in part["packs"]],
        uids=[uids for part in parts for uids in part["uids"]],
        loss_weight=round(sum(part["loss_weight"] for part in parts), 3),
        num_tokens=sum(part["num_tokens"] for part in parts),
        num_examples=sum(part["num_examples"] for part in parts),
    )


@pytest.fixture(scope="module")
def reference(data: Data) -> list[Batch]:
    """All global batches, one rank, no worker."""
    return [joined([batch]) for batch in batches(loader(data), PACKS // GLOBAL_BATCH)]


def test_batches_follow_the_plan(data: Data, reference: list[Batch]) -> None:
    """Catches shifted slots, wrong dtypes, and budgets that only the plan keeps."""
    uids = [tuple(data.examples[entry["sample"]].uid for entry in data.plan.pack(n)) for n in range(PACKS)]
    assert [pack for batch in reference for pack in batch["uids"]] == uids
    assert len({len(names) for names in uids}) > 1, "packs of several sizes"
    without_media = 0
    for batch in reference:
        for pack in batch["packs"]:
            assert len(pack["input_ids"]) <= PACKING.sequence_tokens
            assert len(pack["crops"]) <= PACKING.crop_budget
            assert {name: tensor.dtype for name, tensor in pack.items()} == {
                "input_ids": torch.int64,
                "target_ids": torch.int64,
                "position_ids": torch.int64,
                "subsegment_ids": torch.int64,
                "pooling": torch.int64,
                "loss_weights": torch.float32,
                "is_visual": torch.bool,
                "crops": torch.uint8,
            }
            assert pack["pooling"].shape[1] == GEOMETRY.max_pool
            patches = len(pack["crops"]) * GEOMETRY.num_patches
            assert ((pack["pooling"] == PADDING) | (pack["pooling"] < patches)).all()
            assert int((pack["input_ids"] == tiny_tokenizer().special.im_patch).sum()) == len(pack["pooling"])
            without_media += len(pack["crops"]) == 0
        assert batch["num_tokens"] == sum(len(pack["input_ids"]) for pack in batch["packs"])
        weight = sum(float(pack["loss_weights"].double().sum()) for pack in batch["packs"])
        assert batch["loss_weight"] == pytest.approx(weight, abs=1e-3)
        assert batch["loss_weight"] > 0


@pytest.mark.parametrize(("ranks", "workers"), [(1, 2), (2, 0), (2, 2), (4, 0), (4, 2), (1, 1)])
def test_order_does_not_depend_on_ranks_and_workers(
    data: Data, reference: list[Batch], ranks: int, workers: int
) -> None:
    """Catches order, augmentation or slots that follow the topology: then a resume on other machines repeats data."""
    parts = [
        batches(loader(data, data_parallel_rank=rank, data_parallel_size=ranks, num_workers=workers), len(reference))
        for rank in range(ranks)
    ]
    for step, expected in enumerate(reference):
        assert same(joined([part[step] for part in parts]), expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_at_every_step_continues_exactly(data: Data, reference: list[Batch], workers: int) -> None:
    """Catches a position that is one batch off, or that workers do not receive."""
    for step in range(len(reference)):
        state = loader(data).dataset.state_dict(step * GLOBAL_BATCH, True)
        packs = loader(data, num_workers=workers)
        packs.dataset.load_state_dict(state)
        rest = [joined([batch]) for batch in batches(packs, len(reference) - step)]
        assert all(same(batch, expected) for batch, expected in zip(rest, reference[step:], strict=True))
        assert packs.dataset.state_dict(GLOBAL_BATCH, False)["packs"] == (step + 1) * GLOBAL_BATCH


def test_state_has_one_schema_and_other_plans_are_refused(data: Data) -> None:
    """Catches keys that sharded checkpoints would drop, and a resume that silently means other data."""
    packs = loader(data).dataset
    fresh, later = packs.state_dict(0, True), packs.state_dict(8, True)
    assert fresh == {"packs": 0, "global_batch_packs": 4, "plan": "f1"}
    assert fresh.keys() == later.keys()
    for changed, words in (
        ({"plan": "f0"}, "plan 'f0'"),
        ({"global_batch_packs": 8}, "global_batch_packs 8"),
    ):
        with pytest.raises(DataError, match=f"position in another plan: {words}; expected plan 'f1', global_batch"):
            packs.load_state_dict(later | changed)
    with pytest.raises(DataError, match="another plan"):
        packs.load_state_dict({})
    with pytest.raises(DataError, match="6 packs; expected a multiple of the global batch of 4"):
        packs.state_dict(6, True)


def test_composer_saves_and_restores_the_position(data: Data) -> None:
    """Catches another calling convention than Composer's own."""
    from composer.core import State, Timestamp
    from composer.devices import DeviceCPU

    def state() -> State:
        return State(
            model=torch.nn.Linear(1, 1),
            rank_zero_seed=0,
            run_name="r",
            device=DeviceCPU(),
            train_dataloader=loader(data),
            dataloader_label="train",
        )

    saved = state()
    saved.timestamp = Timestamp(sample_in_epoch=12, sample=12, batch=3, batch_in_epoch=3)
    dataset_state = saved._dataset_state_dict()
    assert dataset_state["train"] == {"packs": 12, "global_batch_packs": 4, "plan": "f1"}
    resumed = state()
    resumed._load_dataset_state(dataset_state)
    packs = resumed.train_dataloader
    assert isinstance(packs, PackLoader)
    assert resumed.dataset_resumption == {"train": True}
    with pytest.raises(TypeError):
        len(packs)
    assert same(batches(packs, 1)[0], batches(loader(data), 4)[3])


@pytest.mark.parametrize("workers", [0, 2])
def test_training_past_the_plan_is_an_error(data: Data, workers: int) -> None:
    """Catches a plan that starts again silently, and an error whose type is lost on its way from a worker."""
    iterator = iter(loader(data, num_workers=workers))
    for _ in range(PACKS // GLOBAL_BATCH):
        next(iterator)
    with pytest.raises(DataError, match="all 6 global batches are used") as error:
        next(iterator)
    assert error.value.mend


def test_impossible_topology_and_foreign_plan_are_refused(data: Data) -> None:
    """Catches ranks that would share or skip packs, and ids beyond the shards."""
    with pytest.raises(DataError, match="4; expected a multiple of 3"):
        loader(data, data_parallel_size=3)
    entries = data.plan.entries.copy()
    entries["sample"][0] = 20
    with pytest.raises(DataError, match="sample 20; expected samples below 20"):
        loader(data, plan=dataclasses.replace(data.plan, entries=entries))


class Breaking(Preprocessor):
    """Some media do not decode."""

    broken = frozenset({"images-train-3", "images-train-8"})

    def tokenize(self, example: Example, *, epoch: int, branches: tuple[int, int] | None = None) -> TokenizedExample:
        """As the parent, for whole media."""
        if example.uid in self.broken:
            raise DataError(example.uid, found="truncated JPEG")
        return super().tokenize(example, epoch=epoch, branches=branches)


def breaking(broken: set[str]) -> Preprocessor:
    kind = type("Breaking", (Breaking,), {"broken": frozenset(broken)})
    fields = {field.name: getattr(PREPROCESSOR, field.name) for field in dataclasses.fields(PREPROCESSOR)}
    made: Preprocessor = kind(**fields)
    return made


def test_broken_media_are_replaced_in_their_pack(
    data: Data, reference: list[Batch], capfd: pytest.CaptureFixture[str]
) -> None:
    """Catches a broken file that stops training, changes other packs, or depends on the number of workers."""
    made = [
        [
            joined([batch])
            for batch in batches(
                build_dataloader(
                    data.plan,
                    data.reader,
                    breaking({"images-train-3", "images-train-8"}),
                    fingerprint="f1",
                    global_batch_packs=GLOBAL_BATCH,
                    num_workers=workers,
                    strict=True,
                ),
                len(reference),
            )
        ]
        for workers in (0, 2)
    ]
    assert all(same(first, second) for first, second in zip(*made, strict=True))
    planned = [names for batch in reference for names in batch["uids"]]
    packs = [(names, pack) for batch in made[0] for names, pack in zip(batch["uids"], batch["packs"], strict=True)]
    touched = 0
    for names, (uids, pack) in zip(planned, packs, strict=True):
        good = tuple(name for name in names if name not in Breaking.broken)
        touched += good != names
        assert uids[: len(good)] == good
        assert len(uids) <= len(names)
        assert not Breaking.broken & set(uids)
        assert len(pack["input_ids"]) <= PACKING.sequence_tokens
        assert len(pack["crops"]) <= PACKING.crop_budget
    assert touched >= 2
    printed = capfd.readouterr().err
    assert "broken: images/images-train-3: images-train-3: truncated JPEG" in printed
    assert "stands in" in printed


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_broken_media_end_training(data: Data, monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    """Catches a training that goes on without its data."""
    monkeypatch.setattr(dataset_module, "MIN_BROKEN", 3)
    packs = build_dataloader(
        data.plan,
        data.reader,
        breaking({example.uid for example in data.examples[:14]}),
        fingerprint="f1",
        global_batch_packs=GLOBAL_BATCH,
        num_workers=workers,
    )
    with pytest.raises(DataError, match=r"4 media cannot be decoded, of [0-9]+ reads"):
        batches(packs, PACKS // GLOBAL_BATCH)


def test_pack_larger_than_planned_is_an_error_or_cut(data: Data, capfd: pytest.CaptureFixture[str]) -> None:
    """Catches a planner's wrong bound that becomes an out-of-memory or a silently cut sequence."""
    tight = dataclasses.replace(PACKING, sequence_tokens=330)
    plan = dataclasses.replace(data.plan, packing=tight)
    with pytest.raises(DataError, match=r"pack \d+ .*expected at most 330 and 9"):
        batches(loader(data, plan=plan), PACKS // GLOBAL_BATCH)
    first, second = (batches(loader(data, plan=plan, strict=False), PACKS // GLOBAL_BATCH) for _ in range(2))
    assert all(same(batch, other) for batch, other in zip(first, second, strict=True))
    assert max(len(pack["input_ids"]) for batch in first for pack in batch["packs"]) <= 330
    assert "left out branch" in capfd.readouterr().err


def test_dropped_branch_leaves_root_and_other_branches(data: Data) -> None:
    """Catches a cut that takes root tokens, or leaves a part of the branch."""
    example = next(example for example in data.examples if len(example.annotations) > 2)
    whole = PREPROCESSOR.tokenize(example, epoch=0)
    (cut,), what = drop_last_branch([whole], too_many_crops=False)
    last = len(whole.tasks) - 1
    assert what == f"branch {last} of {example.uid}"
    keep = whole.subsegment_ids != last
    assert 0 < keep.sum() < len(keep)
    for name in ("input_ids", "target_ids", "position_ids", "subsegment_ids", "loss_weights", "is_visual"):
        assert np.array_equal(getattr(cut, name), getattr(whole, name)[keep])
    assert cut.tasks == whole.tasks[:-1]
    kept, what = drop_last_branch([whole, cut], too_many_crops=True)
    assert kept == [whole]
    assert what == f"all of {example.uid}"


def test_workers_outlive_sigterm_and_their_death_is_a_platform_error(data: Data) -> None:
    """Catches a launcher's SIGTERM that kills the workers before rank 0 has saved, and a death that is a DataError."""
    packs = loader(data, num_workers=1)
    iterator = iter(packs)
    next(iterator)
    (child,) = torch.multiprocessing.active_children()
    assert child.pid
    os.kill(child.pid, signal.SIGTERM)
    next(iterator)
    assert child.is_alive()
    os.kill(child.pid, signal.SIGKILL)
    with pytest.raises(PlatformError, match="DataLoader worker"):
        for _ in range(PACKS):
            next(iterator)


EXIT_WITH_LIVE_WORKERS = """
from torch.utils.data import IterableDataset
from molmo2core.errors import DataError
from molmo2core.loading.dataloader import PackLoader, _start_worker

class Endless(IterableDataset):
    def __iter__(self):
        while True:
            yield 1

class Looped:
    pass

kept = Looped()
kept.batches = iter(PackLoader(Endless(), num_workers=2, worker_init_fn=_start_worker))
kept.itself = kept
print(next(kept.batches))
raise SystemExit(3)
"""


def test_process_with_live_workers_can_exit() -> None:
    """Catches workers that ignore SIGTERM and so hold a failed training process for ever when it exits."""
    run = subprocess.run([sys.executable, "-c", EXIT_WITH_LIVE_WORKERS], timeout=60, capture_output=True, check=False)
    assert run.returncode == 3, run.stderr.decode()


def test_bounds_hold_for_every_epoch(data: Data) -> None:
    """Catches a bound that some phrasing exceeds."""
    column = STYLES.index(LIMITS.style)
    for example in data.examples:
        media = example.media
        tokens, crops = root_bound(media.kind, media.sizes, media.duration_seconds, 0, GEOMETRY, LIMITS)
        tokens += sum(annotation_tokens_bounds(item, tiny_tokenizer())[column] for item in example.annotations)
        for epoch in range(5):
            made = PREPROCESSOR.tokenize(example, epoch=epoch)
            assert len(made.input_ids) <= tokens
            assert len(made.crops) <= crops


def test_plan_is_what_the_planner_makes_of_the_shards(data: Data) -> None:
    """Keeps the fixture honest: trees were cut, packs hold several examples, both datasets occur."""
    entries = data.plan.entries
    branches = np.array([len(example.annotations) for example in data.examples])[entries["sample"]]
    assert (entries["stop_branch"] - entries["first_branch"] < branches).any()
    assert len(entries) > PACKS
    assert (entries["sample"] < 14).any()
    assert (entries["sample"] >= 14).any()
