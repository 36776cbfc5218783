"""From plan to batches: order, resume, refusal, and what happens to media that do not decode."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from molmo2core.errors import DataError, Molmo2Error, PlatformError
from molmo2core.examples import PADDING, Batch, Deviation, Example, TokenizedExample
from molmo2core.loading import dataloader as dataloader_module
from molmo2core.loading.collator import join_batches
from molmo2core.loading.dataloader import PackLoader, pack_bytes, prefetch_factor, worker_errors
from molmo2core.loading.deviations import DeviationRecord
from molmo2core.loading.fitting import drop_last_branch
from molmo2core.loading.provenance import Change, summary
from molmo2core.packing.config import PackingConfig
from molmo2core.preprocessing.branch_lengths import annotation_tokens_bounds
from molmo2core.preprocessing.config import STYLES, VisualGeometry
from molmo2core.preprocessing.lengths import root_bound
from molmo2core.preprocessing.preprocessor import Preprocessor
from molmo2core.testing.loading import (
    GEOMETRY,
    GLOBAL_BATCH,
    LIMITS,
    PACKING,
    PACKS,
    PREPROCESSOR,
    LoadingData,
    loading_examples,
    open_loading_data,
    tiny_loader,
    write_loading_data,
)
from molmo2core.testing.loading_ranks import breaking_preprocessor
from molmo2core.testing.tiny_tokenizer import tiny_tokenizer


@dataclasses.dataclass(frozen=True)
class Data(LoadingData):
    """24 packs of images (trees, some cut) and text, the plan memory-mapped from its folder."""

    examples: list[Example]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    folder = tmp_path_factory.mktemp("ws")
    write_loading_data(folder)
    return Data(**vars(open_loading_data(folder)), examples=loading_examples())


def batches(packs: PackLoader, count: int) -> list[Batch]:
    iterator = iter(packs)
    return [next(iterator) for _ in range(count)]


def same(first: Batch, second: Batch) -> bool:
    """Equal to the last byte, but for how long somebody waited."""
    names = first.keys() - {"packs", "data_wait_seconds", "loader_idle_seconds"}
    if first.keys() != second.keys() or any(first[name] != second[name] for name in names):  # type: ignore[literal-required]
        return False
    return len(first["packs"]) == len(second["packs"]) and all(
        torch.equal(pack[name], other[name])
        for pack, other in zip(first["packs"], second["packs"], strict=True)
        for name in pack
    )


def joined(parts: list[Batch]) -> Batch:
    """What all ranks got for one step, in order of rank."""
    batch = join_batches(parts)
    return batch | {"loss_weight": round(batch["loss_weight"], 3)}


@pytest.fixture(scope="module")
def reference(data: Data) -> list[Batch]:
    """All global batches, one rank, no worker."""
    return [joined([batch]) for batch in batches(tiny_loader(data), PACKS // GLOBAL_BATCH)]


def test_batches_follow_the_plan(data: Data, reference: list[Batch]) -> None:
    """Catches shifted slots, wrong dtypes, and budgets that only the plan keeps."""
    uids = [tuple(data.examples[entry["sample"]].uid for entry in data.plan.pack(n)) for n in range(PACKS)]
    assert [pack for batch in reference for pack in batch["uids"]] == uids
    assert [number for batch in reference for number in batch["pack_numbers"]] == list(range(PACKS))
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
    loaders = [
        tiny_loader(data, data_parallel_rank=rank, data_parallel_size=ranks, num_workers=workers)
        for rank in range(ranks)
    ]
    parts = [batches(packs, len(reference)) for packs in loaders]
    for step, expected in enumerate(reference):
        assert same(joined([part[step] for part in parts]), expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_at_every_step_continues_exactly(data: Data, reference: list[Batch], workers: int) -> None:
    """Catches a position that is one batch off, or that workers do not receive."""
    for step in range(len(reference)):
        state = tiny_loader(data).dataset.state_dict(step * GLOBAL_BATCH, True)
        packs = tiny_loader(data, num_workers=workers)
        packs.dataset.load_state_dict(state)
        rest = [joined([batch]) for batch in batches(packs, len(reference) - step)]
        assert all(same(batch, expected) for batch, expected in zip(rest, reference[step:], strict=True))
        assert packs.dataset.state_dict(GLOBAL_BATCH, False)["packs"] == (step + 1) * GLOBAL_BATCH


def test_state_has_one_schema(data: Data) -> None:
    """Catches keys that sharded checkpoints would drop, and positions between two steps."""
    packs = tiny_loader(data).dataset
    fresh, later = packs.state_dict(0, True), packs.state_dict(8, True)
    assert fresh.keys() == later.keys() == {"packs", "made_from"}
    assert (fresh["packs"], later["packs"]) == (0, 8)
    assert len(fresh["made_from"]) < 2000, "a checkpoint holds it on every rank"
    with pytest.raises(DataError, match="no position in a pack plan"):
        packs.load_state_dict({})
    with pytest.raises(DataError, match="6 packs; expected a multiple of the global batch of 4"):
        packs.state_dict(6, True)


OTHER_SHARDS = "0" * 64


def changed(data: Data, what: str) -> PackLoader:
    """A loader of the same plan's packs with one thing changed, as a recipe would change it."""
    reference, parents = data.reference, data.reference.parents
    match what:
        case "plan":
            return tiny_loader(data, reference=dataclasses.replace(reference, digest="f2"))
        case "shards.images":
            # Other pixels or answers of the same lengths give an equal plan.
            images = dataclasses.replace(parents[0], digest=OTHER_SHARDS)
            return tiny_loader(data, reference=dataclasses.replace(reference, parents=(images, *parents[1:])))
        case "mixture.texts":
            facts = json.loads(json.dumps(reference.facts))
            facts["draws"]["texts"]["wanted"] = 0.3
            return tiny_loader(data, reference=dataclasses.replace(reference, facts=facts))
        case "packing.crop_budget":
            packing = dataclasses.replace(PACKING, crop_budget=10)
            return tiny_loader(data, plan=dataclasses.replace(data.plan, packing=packing))
        case "preprocessing.max_frames":
            config = dataclasses.replace(LIMITS, max_frames=9)
            return tiny_loader(data, preprocessor=dataclasses.replace(PREPROCESSOR, config=config))
        case "weighting":
            return tiny_loader(data, preprocessor=dataclasses.replace(PREPROCESSOR, weighting="none"))
        case "seed":
            return tiny_loader(data, preprocessor=dataclasses.replace(PREPROCESSOR, seed=6))
        case "global_batch_packs":
            return tiny_loader(data, global_batch_packs=2)
    raise AssertionError(what)


@pytest.mark.parametrize(
    ("what", "then", "now"),
    [
        ("plan", '"f1"', '"f2"'),
        ("shards.images", '"', f'"{OTHER_SHARDS[:16]}"'),
        ("mixture.texts", "0.2", "0.3"),
        ("packing.crop_budget", "9", "10"),
        ("preprocessing.max_frames", "128", "9"),
        ("weighting", '"described"', '"none"'),
        ("seed", "5", "6"),
        ("global_batch_packs", "4", "2"),
    ],
)
def test_other_data_are_refused_with_what_changed(data: Data, what: str, then: str, now: str) -> None:
    """Catches a resume that silently means other data, also when the plan stays the same, and a refusal that leaves
    its reader to find out why; forced, the position is the same and the changes are told."""
    state = tiny_loader(data).dataset.state_dict(8, True)
    packs = changed(data, what).dataset
    with pytest.raises(DataError) as error:
        packs.load_state_dict(state)
    (change,) = re.findall(r"\(then -> now\): (.*); expected the same", str(error.value))
    assert re.fullmatch(rf"{re.escape(what)} {re.escape(then)}.* -> {re.escape(now)}", change), change
    packs._accept_changed_data = True
    packs.load_state_dict(state)
    assert [str(change) for change in packs.changes] == [change]
    assert packs.state_dict(0, False)["packs"] == 8
    packs.load_state_dict(packs.state_dict(8, True))
    assert packs.changes == ()


def test_many_changes_are_summed_up(data: Data) -> None:
    """Catches a message of pages when every share of a large mixture moves; what people changed comes first."""
    changes = [Change(name=f"mixture.{n}", before=0.1, now=0.2) for n in range(40)]
    text = summary([Change(name="plan", before="a", now="b"), *changes])
    assert text.startswith("mixture.0 0.1 -> 0.2, mixture.1 ")
    assert text.endswith(" and 29 more")


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
            train_dataloader=tiny_loader(data),
            dataloader_label="train",
        )

    saved = state()
    saved.timestamp = Timestamp(sample_in_epoch=12, sample=12, batch=3, batch_in_epoch=3)
    dataset_state = saved._dataset_state_dict()
    assert dataset_state["train"]["packs"] == 12
    resumed = state()
    resumed._load_dataset_state(dataset_state)
    packs = resumed.train_dataloader
    assert isinstance(packs, PackLoader)
    assert resumed.dataset_resumption == {"train": True}
    with pytest.raises(TypeError):
        len(packs)
    assert same(batches(packs, 1)[0], batches(tiny_loader(data), 4)[3])


@pytest.mark.parametrize("workers", [0, 2])
def test_training_past_the_plan_is_an_error(data: Data, workers: int) -> None:
    """Catches a plan that starts again silently, and an error whose type is lost on its way from a worker."""
    iterator = iter(tiny_loader(data, num_workers=workers))
    for _ in range(PACKS // GLOBAL_BATCH):
        next(iterator)
    with pytest.raises(DataError, match="all 6 global batches are used") as error:
        next(iterator)
    assert error.value.mend


def test_impossible_topology_and_foreign_plan_are_refused(data: Data) -> None:
    """Catches ranks that would share or skip packs, and ids beyond the shards."""
    with pytest.raises(DataError, match="4; expected a multiple of 3"):
        tiny_loader(data, data_parallel_size=3)
    entries = data.plan.entries.copy()
    entries["sample"][0] = 20
    with pytest.raises(DataError, match="sample 20; expected samples below 20"):
        tiny_loader(data, plan=dataclasses.replace(data.plan, entries=entries))


BROKEN = frozenset({"images-train-3", "images-train-8"})


def test_broken_media_are_replaced_in_their_pack(
    data: Data, reference: list[Batch], capfd: pytest.CaptureFixture[str]
) -> None:
    """Catches a broken file that stops training, changes other packs, depends on the number of workers, or is not
    told with reason and substitute."""
    preprocessor = breaking_preprocessor(BROKEN)
    made = [
        [
            joined([batch])
            for batch in batches(tiny_loader(data, preprocessor=preprocessor, num_workers=workers), len(reference))
        ]
        for workers in (0, 2)
    ]
    assert all(same(first, second) for first, second in zip(*made, strict=True))
    planned = [names for batch in reference for names in batch["uids"]]
    packs = [(names, pack) for batch in made[0] for names, pack in zip(batch["uids"], batch["packs"], strict=True)]
    expected = []
    for index, (names, (uids, pack)) in enumerate(zip(planned, packs, strict=True)):
        good = tuple(name for name in names if name not in BROKEN)
        stand_ins = [f"{uid.partition('-')[0]}/{uid}" for uid in uids[len(good) :]]
        broken = [name for name in names if name in BROKEN]
        expected += [
            Deviation(kind="replaced", pack=index, dataset="images", uid=uid, why=f"{uid}: truncated JPEG", by=by)
            for uid, by in itertools.zip_longest(broken, stand_ins, fillvalue="")
        ]
        assert uids[: len(good)] == good
        assert len(uids) <= len(names)
        assert not BROKEN & set(uids)
        assert len(pack["input_ids"]) <= PACKING.sequence_tokens
        assert len(pack["crops"]) <= PACKING.crop_budget
    assert len(expected) >= 2
    assert any(deviation.by for deviation in expected)
    assert [deviation for batch in made[0] for deviation in batch["deviations"]] == expected
    drawn = sum(len(names) for batch in made[0] for names in batch["datasets"])
    assert drawn == sum(len(uids) for uids, _ in packs)
    printed = capfd.readouterr().err
    assert "replaced: images/images-train-3: images-train-3: truncated JPEG; " in printed
    assert "stands in" in printed


@pytest.mark.parametrize("workers", [0, 1])
def test_a_pack_without_any_medium_is_an_error(data: Data, workers: int) -> None:
    """Catches an endless search, or an empty pack, when nothing decodes."""
    packs = tiny_loader(
        data, preprocessor=breaking_preprocessor({example.uid for example in data.examples}), num_workers=workers
    )
    with pytest.raises(DataError, match="pack 0: every medium is broken, and no substitute fits"):
        batches(packs, 1)


@pytest.mark.parametrize(
    ("media", "each", "drawn", "raises"),
    [(10, 50, 600, False), (11, 1, 1200, False), (11, 1, 1000, True), (11, 100, 99_999, True)],
)
def test_too_many_broken_media_are_an_error(media: int, each: int, drawn: int, raises: bool) -> None:
    """Up to 10 different media are always borne, more only up to one example in a hundred.  Catches a limit on how
    often the same medium comes round again, and one that a long run cannot reach any more."""
    record = DeviationRecord()
    broken = [
        Deviation(kind="replaced", pack=n, dataset="images", uid=str(n % media), why="") for n in range(media * each)
    ]
    record.add([*broken, dataclasses.replace(broken[0], kind="shortened", uid="long")], drawn)
    if not raises:
        record.check("step 1")
        return
    with pytest.raises(DataError, match=rf"{media * each} of {drawn} examples .* {media} media do not decode"):
        record.check("step 1")


def test_pack_larger_than_planned_is_an_error_or_cut(data: Data, capfd: pytest.CaptureFixture[str]) -> None:
    """Catches a planner's wrong bound that becomes an out-of-memory or a silently cut sequence."""
    tight = dataclasses.replace(PACKING, sequence_tokens=330)
    plan = dataclasses.replace(data.plan, packing=tight)
    with pytest.raises(DataError, match=r"pack \d+ .*expected at most 330 and 9"):
        batches(tiny_loader(data, plan=plan), PACKS // GLOBAL_BATCH)
    first, second = (batches(tiny_loader(data, plan=plan, strict=False), PACKS // GLOBAL_BATCH) for _ in range(2))
    assert all(same(batch, other) for batch, other in zip(first, second, strict=True))
    assert max(len(pack["input_ids"]) for batch in first for pack in batch["packs"]) <= 330
    assert "left out branch" in capfd.readouterr().err
    told = [deviation for batch in first for deviation in batch["deviations"]]
    assert {deviation.kind for deviation in told} == {"shortened"}
    assert all(re.search(r"at most 330 and 9: left out (branch \d+|all of it)$", d.why) for d in told)


def test_dropped_branch_leaves_root_and_other_branches(data: Data) -> None:
    """Catches a cut that takes root tokens, or leaves a part of the branch."""
    example = next(example for example in data.examples if len(example.annotations) > 2)
    whole = PREPROCESSOR.tokenize(example, epoch=0)
    number, cut, what = drop_last_branch([whole], too_many_crops=False)
    assert cut is not None
    last = len(whole.tasks) - 1
    assert (number, what) == (0, f"branch {last}")
    keep = whole.subsegment_ids != last
    assert 0 < keep.sum() < len(keep)
    for name in ("input_ids", "target_ids", "position_ids", "subsegment_ids", "loss_weights", "is_visual"):
        assert np.array_equal(getattr(cut, name), getattr(whole, name)[keep])
    assert cut.tasks == whole.tasks[:-1]
    assert drop_last_branch([whole, cut], too_many_crops=True) == (1, None, "all of it")


def test_workers_outlive_sigterm_and_their_death_is_a_platform_error(data: Data) -> None:
    """Catches a launcher's SIGTERM that kills the workers before rank 0 has saved, and a death that is a DataError."""
    packs = tiny_loader(data, num_workers=1)
    iterator = iter(packs)
    next(iterator)
    (child,) = torch.multiprocessing.active_children()
    assert child.pid
    os.kill(child.pid, signal.SIGTERM)
    next(iterator)
    assert child.is_alive()
    os.kill(child.pid, signal.SIGKILL)
    with pytest.raises(PlatformError, match=r"data loader: .*; expected living workers"):
        for _ in range(PACKS):
            next(iterator)


EXIT_WITH_LIVE_WORKERS = """
from torch.utils.data import IterableDataset
from molmo2core.loading.collator import collate_packs
from molmo2core.loading.dataloader import PackLoader

class Endless(IterableDataset):
    packs_per_rank = loaded_per_batch = 1
    def __iter__(self):
        while True:
            yield collate_packs([])

class Looped:
    pass

kept = Looped()
kept.batches = iter(PackLoader(Endless(), num_workers=2))
kept.itself = kept
print(next(kept.batches))
raise SystemExit(3)
"""


def test_process_with_live_workers_can_exit() -> None:
    """Catches workers that ignore SIGTERM and so hold a failed training process for ever when it exits."""
    run = subprocess.run([sys.executable, "-c", EXIT_WITH_LIVE_WORKERS], timeout=60, capture_output=True, check=False)
    assert run.returncode == 3, run.stderr.decode()


HUNG_WORKER = """
import time
from torch.utils.data import IterableDataset
from molmo2core.errors import PlatformError
from molmo2core.loading.collator import collate_packs
from molmo2core.loading.dataloader import PackLoader

class Hung(IterableDataset):
    packs_per_rank = loaded_per_batch = 1
    def __iter__(self):
        yield collate_packs([])
        time.sleep(3600)

batches = iter(PackLoader(Hung(), num_workers=1, timeout_seconds=2))
next(batches)
try:
    next(batches)
except PlatformError as error:
    print(error)
    raise SystemExit(error.exit_code)
"""


def test_a_hung_worker_is_a_platform_error_and_does_not_outlive_it() -> None:
    """Catches a decoder that stands still and training with it, and a process that cannot end because of it."""
    run = subprocess.run([sys.executable, "-c", HUNG_WORKER], timeout=60, capture_output=True, check=False)
    assert run.returncode == 75, run.stderr.decode()
    assert b"data loader: DataLoader timed out after 2 seconds" in run.stdout


def test_a_worker_that_dies_during_a_step_is_a_platform_error(data: Data) -> None:
    """torch raises where the main thread happens to be.  Catches an internal error out of the optimizer."""
    packs = tiny_loader(data, num_workers=1)
    iterator = iter(packs)
    next(iterator)
    (child,) = torch.multiprocessing.active_children()
    with pytest.raises(PlatformError, match=r"DataLoader worker .* is killed by signal: Killed"), worker_errors():
        child.kill()
        time.sleep(30)


@pytest.mark.parametrize(("workers", "packs", "ahead"), [(1, 1, 2), (2, 4, 6), (6, 16, 24), (4, 1, 8)])
def test_workers_hold_a_batch_and_little_more(workers: int, packs: int, ahead: int) -> None:
    """Catches memory that grows with workers times the batch, and workers that cannot prepare the next step."""
    assert workers * prefetch_factor(packs, workers) == ahead >= packs + workers


def test_a_pack_takes_no_more_bytes_than_stated(data: Data, reference: list[Batch]) -> None:
    """The bound on which memory is planned, against real packs; and the numbers that the module states."""
    sizes = [sum(tensor.nbytes for tensor in pack.values()) for batch in reference for pack in batch["packs"]]
    bound = pack_bytes(PACKING, GEOMETRY)
    assert bound / 2 < max(sizes) <= bound
    stated = [
        pack_bytes(PackingConfig(sequence_tokens=tokens, crop_budget=crops), VisualGeometry()) / 1e6
        for tokens, crops in ((16_384, 128), (36_864, 384))
    ]
    assert dataloader_module.__doc__ is not None
    assert all(f"{megabytes:.1f} MB" in dataloader_module.__doc__ for megabytes in stated), stated


def test_too_little_shared_memory_is_an_error_before_training(data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a container with its usual 64 MB: the worker that fills them dies by SIGBUS, hours later or at once."""
    usage = type(shutil.disk_usage("."))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1_000_000, 0, 1_000_000))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    tiny_loader(data, num_workers=0)
    with pytest.raises(PlatformError, match=r"/dev/shm: 1 MB; expected \d+ MB: 8 ranks with 6 packs ahead"):
        tiny_loader(data, num_workers=2)


def test_batches_tell_what_was_drawn(reference: list[Batch]) -> None:
    """Catches counts of another pack than the tensors'."""
    for batch in reference:
        names = [tuple(uid.partition("-")[0] for uid in uids) for uids in batch["uids"]]
        assert batch["datasets"] == names
        assert batch["num_examples"] == sum(map(len, names))
        assert batch["num_crops"] == sum(len(pack["crops"]) for pack in batch["packs"])


class Slow(Preprocessor):
    """Takes a tenth of a second and more for an example."""

    def tokenize(self, example: Example, *, epoch: int, branches: tuple[int, int] | None = None) -> TokenizedExample:
        time.sleep(0.1)
        return super().tokenize(example, epoch=epoch, branches=branches)


def test_batches_tell_who_waited(data: Data) -> None:
    """Catches waits that are always zero, or that stand in another batch."""
    slow = Slow(**{field.name: getattr(PREPROCESSOR, field.name) for field in dataclasses.fields(PREPROCESSOR)})
    batch = next(iter(tiny_loader(data, preprocessor=slow)))
    assert batch["data_wait_seconds"] >= 0.1 * batch["num_examples"]
    first, second = two_packs(tiny_loader(data))
    assert first["loader_idle_seconds"] == 0.0
    assert second["loader_idle_seconds"] >= 0.2


def test_idle_seconds_of_ranks_that_take_turns_are_their_mean(data: Data) -> None:
    """Catches a wait of four ranks' workers, whose packs all make up one batch, that is four times as long."""

    class FourTakeTurns:
        rank, size = 1, 4

        def __call__(self, found: Batch | Molmo2Error | None, source: int) -> Batch | Molmo2Error:
            raise NotImplementedError

    _, second = two_packs(tiny_loader(data, sharing=FourTakeTurns()))
    assert 0.05 <= second["loader_idle_seconds"] < 0.2


def two_packs(loader: PackLoader) -> tuple[Batch, Batch]:
    """Two that a worker would make one after the other, of which the second is fetched 0.2 s late."""
    made = iter(loader.dataset)
    first = next(made)
    time.sleep(0.2)
    second = next(made)
    assert not isinstance(first, Molmo2Error) and not isinstance(second, Molmo2Error)
    return first, second


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
