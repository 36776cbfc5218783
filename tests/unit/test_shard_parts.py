"""Shards of a dataset written part by part: by any number of processes, after any kill, beside other runs."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import multiprocessing
import os
import resource
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from moto.core import DEFAULT_ACCOUNT_ID
from moto.s3.models import s3_backends

from molmo2core import storage
from molmo2core.annotations import QuestionAnswer
from molmo2core.errors import DataError, PlatformError, RecipeError
from molmo2core.examples import Example
from molmo2core.references import ShardsRef
from molmo2core.shards import parts as parts_module
from molmo2core.shards.config import ShardsConfig
from molmo2core.shards.lengths import read_table
from molmo2core.shards.parts import Part, SizedRow, build_shards, cut_parts
from molmo2core.shards.reader import ExampleReader
from molmo2core.testing.tiny_examples import example_parts, image_examples, text_examples
from molmo2core.testing.tiny_tokenizer import tiny_tokenizer

EXAMPLES = [*image_examples("a", 40), *image_examples("a", 6, split="test"), *text_examples("b", 9)]
SHARD_BYTES = 3_000


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A workspace: a local folder or an `s3://` prefix."""
    return str(tmp_path / "place") if request.param == "local" else f"{request.getfixturevalue('s3_bucket')}/place"


def build(uri: str, parts: Sequence[Part] | None = None, **options: Any) -> storage.CommittedFolder:
    given_parts = list(example_parts(EXAMPLES, SHARD_BYTES)) if parts is None else parts
    return build_shards(uri, given_parts, tokenizer=tiny_tokenizer(), meta={"dataset": "a"}, **options)


def backdate(uri: str) -> None:
    """As if an object had been written eight days ago."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    stored = s3_backends[DEFAULT_ACCOUNT_ID]["aws"].buckets[bucket].keys[key]
    stored.last_modified -= timedelta(days=8)


def parts_left(uri: str) -> list[str]:
    return storage.list_files(f"{uri}.parts")


# Cutting


@given(
    st.lists(st.tuples(st.sampled_from(["train", "validation", "test"]), st.integers(0, 50)), max_size=60),
    st.integers(1, 100),
)
def test_cut_keeps_every_row_in_order_and_within_the_limit(rows: list[tuple[Any, int]], shard_bytes: int) -> None:
    """Catches a lost or doubled row at a cut, order across splits, and a limit that one large row pulls others over."""
    sized = [SizedRow(uid=str(n), split=split, num_bytes=size, row=n) for n, (split, size) in enumerate(rows)]
    cut = list(cut_parts(sized, shard_bytes))
    for split in ("train", "validation", "test"):
        held = [part for name, part in cut if name == split]
        assert list(itertools.chain(*held)) == [row.row for row in sized if row.split == split]
        sizes = [[rows[number][1] for number in part] for part in held]
        assert all(sum(part) <= shard_bytes or len(part) == 1 for part in sizes)
        assert all(sum(part) + after[0] > shard_bytes for part, after in itertools.pairwise(sizes)), "as full as can be"


def test_doubled_uid_is_refused(place: str) -> None:
    """Catches two examples that would share their randomness and evaluation rows."""
    with pytest.raises(DataError, match="example a-train-0: its uid twice"):
        build(f"{place}/x", list(example_parts([*EXAMPLES, EXAMPLES[0]], SHARD_BYTES)))


def test_a_sample_larger_than_a_shard_stands_alone(tmp_path: Path) -> None:
    """MDSWriter writes an empty shard before such a sample when it comes first."""
    large = replace(EXAMPLES[0], uid="large", media=replace(EXAMPLES[0].media, files=(bytes(5 * SHARD_BYTES),)))
    examples = [large, *EXAMPLES[:20]]
    folder = build(str(tmp_path / "x"), list(example_parts(examples, SHARD_BYTES)))
    table = read_table(folder, "train")
    assert table.shard_samples[0] == 1
    assert table.uids[0] == "large"
    shards = [facts["bytes"] for name, facts in sorted(folder.files.items()) if name.endswith(".mds")]
    assert shards[0] > 5 * SHARD_BYTES
    assert max(shards[1:]) < 1.6 * SHARD_BYTES, "a limit of media and text: each sample adds some hundred bytes"
    reader = ExampleReader([reference(folder)], "train", tmp_path / "cache")
    assert [reader.example(number) for number in range(21)] == examples


def test_settings_are_checked() -> None:
    """Catches a limit that 32-bit offsets cannot hold, and no writer at all."""
    for wrong in ({"shard_bytes": 0}, {"shard_bytes": 1 << 32}, {"writers": 0}):
        with pytest.raises(RecipeError, match=r"shards\."):
            ShardsConfig(**wrong)


# Any number of writers


def reference(folder: storage.CommittedFolder) -> ShardsRef:
    counts = folder.meta["num_samples"]
    return ShardsRef(uri=folder.uri, digest=folder.digest, dataset="a", tokenizer_digest="tiny", num_samples=counts)


def test_shards_are_the_same_for_any_number_of_writers(tmp_path: Path, s3_bucket: str) -> None:
    """Catches cuts, order or bytes that follow which process was faster, and places that leak into the content."""
    folders = [build(str(tmp_path / f"by-{writers}"), writers=writers) for writers in (1, 2, 3)]
    folders.append(build(f"{s3_bucket}/ws/x", writers=2))
    assert len({folder.digest for folder in folders}) == 1
    assert folders[0].meta == {"dataset": "a", "num_samples": {"train": 49, "test": 6}} == folders[3].meta
    names = [name for name in folders[0].files if name.startswith("train/shard.")]
    assert len(names) > 10
    for name in folders[0].files:
        contents = {Path(folder.uri, name).read_bytes() for folder in folders[:3]}
        assert len(contents) == 1
    for folder, number in zip((folders[1], folders[3]), itertools.count()):
        reader = ExampleReader([reference(folder)], "train", tmp_path / f"cache{number}")
        train = [example for example in EXAMPLES if example.split == "train"]
        assert [reader.example(index) for index in range(len(reader))] == train
    assert all(parts_left(folder.uri.partition("/by-attempt")[0]) == [] for folder in folders)


# Errors


@dataclass(frozen=True)
class Trouble:
    """Examples of a part in whose middle something happens."""

    held: tuple[Example, ...]
    what: Callable[[], None]

    def __iter__(self) -> Iterator[Example]:
        yield self.held[0]
        self.what()
        yield from self.held[1:]


def lost_medium() -> None:
    raise DataError("a.jsonl:7", found="s3://media/7.jpg: no such object")


def later_lost_medium() -> None:
    raise DataError("a.jsonl:70", found="s3://media/70.jpg: no such object")


def bug() -> None:
    raise RuntimeError("a bug")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def with_trouble(*troubles: tuple[int, Callable[[], None]]) -> list[Part]:
    parts = list(example_parts(EXAMPLES, SHARD_BYTES))
    for number, what in troubles:
        held = parts[number].examples
        assert isinstance(held, tuple)
        parts[number] = replace(parts[number], examples=Trouble(held, what))
    return parts


@pytest.mark.parametrize("writers", [1, 2])
def test_an_error_names_its_row_and_keeps_what_was_finished(tmp_path: Path, writers: int) -> None:
    """Catches an error that loses its type or row in a writer process, the later of two, and a second start at zero."""
    uri = str(tmp_path / "x")
    with pytest.raises(DataError, match=r"^a\.jsonl:7: s3://media/7\.jpg: no such object"):
        build(uri, with_trouble((3, lost_medium), (4, later_lost_medium)), writers=writers)
    assert not Path(uri).exists(), "nothing that a later stage could see"
    finished = {name.partition("/")[0] for name in parts_left(uri) if name.endswith(storage.MARKER)}
    assert len(finished) >= 3
    assert not list(tmp_path.rglob(".attempt-*")), "the unfinished part is gone"
    said: list[str] = []
    # media of finished parts are not read again: their trouble would show
    again = [(number, lost_medium) for number in range(3)]
    folder = build(uri, with_trouble(*again), writers=writers, progress=said.append)
    assert said[-1] == f"{len(finished)} shards were finished by a run before"
    assert folder.digest == build(str(tmp_path / "undisturbed")).digest
    assert parts_left(uri) == []


def test_a_bug_names_the_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches 'list index out of range' over a million examples."""
    monkeypatch.setattr("molmo2core.shards.writer.sample_lengths", lambda example, tokenizer: bug())
    with pytest.raises(RuntimeError, match="a bug") as error:
        build(str(tmp_path / "x"))
    assert error.value.__notes__ == ["at example a-train-0 of dataset a"]


def test_an_annotation_without_bound_names_the_example(tmp_path: Path) -> None:
    """Catches a message that names a text of the annotation but not where it stands."""
    wrong = QuestionAnswer(task="image_qa", question="which?", answer="c", options=("a", "b"))
    examples = [EXAMPLES[0], replace(EXAMPLES[1], annotations=(wrong,))]
    with pytest.raises(DataError, match="dataset a, example a-train-1: "):
        build(str(tmp_path / "x"), list(example_parts(examples, SHARD_BYTES)), writers=2)


def test_a_writer_that_dies_is_worth_another_try(tmp_path: Path) -> None:
    """Catches a hang, or a trace of the process pool, when the kernel kills a writer for its memory."""
    uri = str(tmp_path / "x")
    with pytest.raises(PlatformError, match=r"a writer of shards: died.*shards\.writers"):
        build(uri, with_trouble((5, die)), writers=2)
    assert build(uri, writers=2).digest == build(str(tmp_path / "undisturbed")).digest


@pytest.mark.parametrize("writers", [1, 2])
def test_a_full_disk_is_named_and_the_next_run_goes_on(tmp_path: Path, writers: int) -> None:
    """The kernel's limit on the size of a file stops a shard in the middle, as a full disk would."""
    uri = str(tmp_path / "x")
    parts = list(example_parts(EXAMPLES, 4 * SHARD_BYTES))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 * SHARD_BYTES, hard))  # writers inherit it
    try:
        with pytest.raises(PlatformError, match=r"cannot write: File too large; to mend it: free space"):
            build(uri, parts, writers=writers)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not Path(uri).exists()
    assert list(tmp_path.rglob(".attempt-*")) == []
    build(uri, parts, writers=writers)


def test_no_examples_at_all_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no examples"):
        build(str(tmp_path / "x"), [])


# Kills and other runs


@dataclass(frozen=True)
class Slow:
    """Examples that take their time, and tell that they were begun."""

    held: tuple[Example, ...]
    begun: str

    def __iter__(self) -> Iterator[Example]:
        with Path(self.begun).open("a") as file:
            file.write(f"{self.held[0].uid}\n")
        time.sleep(0.05)
        yield from self.held


def slow_parts(begun: Path) -> list[Part]:
    parts = example_parts(EXAMPLES, SHARD_BYTES)
    return [replace(part, examples=Slow(tuple(part.examples), str(begun))) for part in parts]


def _build_slowly(uri: str, begun: str, writers: int) -> None:
    build(uri, slow_parts(Path(begun)), writers=writers)


def alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    return False


@pytest.mark.parametrize("writers", [1, 2])
def test_a_run_after_kill_9_goes_on(tmp_path: Path, writers: int) -> None:
    """Catches hours of work that begin anew, and writers that go on, orphaned, beside those of the next run."""
    uri, begun = str(tmp_path / "x"), tmp_path / "begun"
    run = multiprocessing.get_context("spawn").Process(target=_build_slowly, args=(uri, str(begun), writers))
    run.start()
    while sum(name.endswith(storage.MARKER) for name in parts_left(uri)) < 4:
        assert run.is_alive()
        time.sleep(0.01)
    children = [int(pid) for pid in Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()]
    run.kill()
    run.join()
    assert len(children) >= writers - 1
    deadline = time.monotonic() + 120
    while any(map(alive, children)):
        assert time.monotonic() < deadline, "the writers outlive their parent"
        time.sleep(0.05)
    assert not Path(uri).exists(), "the interesting case: it was not done"
    finished = sum(name.endswith(storage.MARKER) for name in parts_left(uri))
    before = len(begun.read_text().splitlines())
    folder = build(uri, slow_parts(begun))
    total = len(list(example_parts(EXAMPLES, SHARD_BYTES)))
    assert len(begun.read_text().splitlines()) - before == total - finished
    assert folder.digest == build(str(tmp_path / "undisturbed")).digest


def test_of_two_runs_at_once_one_becomes_visible(place: str, tmp_path: Path) -> None:
    """Catches a run that fails, or mixes its files with the other's, because both write or remove the same parts."""
    uri = storage.join(place, "x")
    context = multiprocessing.get_context("spawn")
    runs = [context.Process(target=_build_slowly, args=(uri, str(tmp_path / f"{n}"), n)) for n in (1, 2)]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert [run.exitcode for run in runs] == [0, 0]
    assert (tmp_path / "1").exists(), "both have worked"
    assert (tmp_path / "2").exists()
    folder = storage.open_committed(uri)
    assert folder.digest == build(str(tmp_path / "undisturbed")).digest
    storage.fetch_committed(uri, tmp_path / "cache")  # compares checksums
    assert parts_left(uri) == []
    if storage.is_remote(place):
        uploads = {name.partition("/")[0] for name in storage.list_files(uri)}
        assert len(uploads) == 2, "the marker and the upload that stands"
    else:
        assert os.listdir(place) == ["x"]


def test_parts_that_another_run_removes_meanwhile(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The faster run commits and tidies while the slower one is about to collect its parts."""
    uri = storage.join(place, "x")
    commit = storage.commit_folder

    def late(folder: str, *arguments: Any) -> storage.CommittedFolder:
        if folder == uri:
            monkeypatch.setattr(storage, "commit_folder", commit)
            build(uri)
            assert parts_left(uri) == []
            storage.remove_folder(uri)
            try:  # to collect what is gone, as if the faster run had committed just after this one has looked
                return commit(folder, *arguments)
            finally:
                failed.append(True)
                build(uri)
        return commit(folder, *arguments)

    failed: list[bool] = []
    monkeypatch.setattr(storage, "commit_folder", late)
    assert build(uri) == storage.open_committed(uri)
    assert failed == [True]


def test_parts_of_runs_that_never_came_back_go(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a store that keeps the shards of every abandoned recipe, and the removal of a live run's parts."""
    age = 2.0
    monkeypatch.setattr(storage, "ABANDONED_SECONDS", age)
    storage.write_bytes(storage.join(place, "old.parts", "train-k", "shard.mds"), b"x")
    if storage.is_remote(place):
        monkeypatch.setattr(storage, "ABANDONED_SECONDS", 3600.0)
        backdate(storage.join(place, "old.parts", "train-k", "shard.mds"))
    else:
        time.sleep(age + 0.1)
    storage.write_bytes(storage.join(place, "new.parts", "train-k", "shard.mds"), b"x")
    build(storage.join(place, "x"), list(example_parts(EXAMPLES[:1], SHARD_BYTES)))
    assert storage.list_files(storage.join(place, "old.parts")) == []
    assert storage.list_files(storage.join(place, "new.parts")) == ["train-k/shard.mds"]


# Long work


def test_progress_says_how_long_it_will_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches hours without a line."""
    monkeypatch.setattr(parts_module, "PROGRESS_SECONDS", 0.0)
    said: list[str] = []
    build(str(tmp_path / "x"), total=len(EXAMPLES), progress=said.append)
    assert len(said) > 10
    assert all(" of 55 examples, " in line and " MB/s, about " in line for line in said)
    assert said[-1].startswith("55 of 55 ")


@dataclass(frozen=True)
class Made:
    """Examples of random bytes that are made when they are read."""

    numbers: range
    size: int

    def __iter__(self) -> Iterator[Example]:
        for number in self.numbers:
            content = hashlib.shake_128(str(number).encode()).digest(self.size)
            yield replace(EXAMPLES[0], uid=str(number), media=replace(EXAMPLES[0].media, files=(content,)))


def _peak_while_building(uri: str, num_parts: int, results: Any) -> None:
    build(f"{uri}-first", [Part(split="train", key="0", examples=Made(range(2), 1 << 20))])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    parts = (Part(split="train", key=str(n), examples=Made(range(2 * n, 2 * n + 2), 1 << 20)) for n in range(num_parts))
    build_shards(uri, parts, tokenizer=tiny_tokenizer(), meta={})
    results.send((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)


def test_memory_is_bounded_by_a_shard(tmp_path: Path) -> None:
    """Catches a dataset that is gathered in memory: 80 MB of shards of 2 MB must pass in less than three shards."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    run = context.Process(target=_peak_while_building, args=(str(tmp_path / "x"), 40, there))
    run.start()
    grown = here.recv()
    run.join()
    assert sum(facts["bytes"] for facts in storage.open_committed(str(tmp_path / "x")).files.values()) > 80 << 20
    assert grown < 6 << 20
