"""streaming's faults, each shown on the plain class and then absent with ours."""

from __future__ import annotations

import contextlib
import gc
import json
import multiprocessing
import os
import re
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import boto3
import numpy as np
import pytest
from streaming import Stream, StreamingDataset
from streaming.base.dataset import _ShardState
from streaming.base.shared import memory
from streaming.base.shared.memory import SharedMemory
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from molmo2core import storage
from molmo2core.errors import DataError, PlatformError
from molmo2core.references import ShardsRef
from molmo2core.shards import streaming_guards
from molmo2core.shards.encoding import COLUMNS
from molmo2core.shards.index import parse_index
from molmo2core.shards.mds import file_checksum
from molmo2core.shards.reader import ExampleReader
from molmo2core.shards.streaming_guards import (
    GuardedStream,
    GuardedStreamingDataset,
    _release,
)
from molmo2core.testing.tiny_examples import image_examples, write_tiny_shards


@pytest.fixture
def ref(tmp_path: Path) -> ShardsRef:
    """Several local shards of 30 examples."""
    return write_tiny_shards(image_examples("a", 30), str(tmp_path / "ws"), shard_bytes=6_000)


@pytest.fixture
def s3_ref(s3_bucket: str) -> ShardsRef:
    """The same behind an S3 server."""
    return write_tiny_shards(image_examples("a", 30), f"{s3_bucket}/ws", shard_bytes=6_000)


def guarded(uri: str, cache: str = "") -> GuardedStream:
    """The training split at `uri`, through a cache or in place."""
    listing = storage.read_bytes(storage.join(uri, "train", "index.json"))
    return GuardedStream(local=Path(cache or uri), split="train", listing=listing, source=uri if cache else "")


def damage(uri: str, name: str, content: bytes | None) -> None:
    """Overwrite or delete a stored object."""
    bucket, _, key = storage.join(uri, name).removeprefix("s3://").partition("/")
    client = boto3.client("s3")
    if content is None:
        client.delete_object(Bucket=bucket, Key=key)
    else:
        client.put_object(Bucket=bucket, Key=key, Body=content)


def test_missing_shard_raises_at_once_and_at_every_try(s3_ref: ShardsRef, tmp_path: Path) -> None:
    """The fault: after a failed download the shard stays 'preparing', and the next reader waits for ever."""
    damage(storage.open_committed(s3_ref.uri).uri, "train/shard.00001.mds", None)
    remote = storage.open_committed(s3_ref.uri).uri
    plain = StreamingDataset(
        streams=[Stream(remote=remote, local=str(tmp_path / "plain"), split="train", download_retry=1)], batch_size=1
    )
    last = len(plain) - 1
    missing = int(plain.spanner[next(i for i in range(last) if plain.spanner[i][0] == 1)][0])
    with pytest.raises(Exception, match=r"shard\.00001|NoSuchKey|not found|404"):
        plain.prepare_shard(missing)
    assert plain._shard_states[missing] == _ShardState.PREPARING, "what others wait on"
    waiting = threading.Thread(target=plain.prepare_shard, args=(missing,), daemon=True)
    waiting.start()
    waiting.join(1.0)
    assert waiting.is_alive(), "streaming no longer hangs: the guard can go"
    plain._shard_states[missing] = _ShardState.REMOTE  # let the thread end

    reader = ExampleReader([s3_ref], "train", tmp_path / "cache")
    first = int(reader._samples.samples_per_shard[0])
    for _ in range(2):
        with pytest.raises(DataError, match=r"shard\.00001\.mds: no such object"):
            reader.example(first)
    assert reader.example(0).uid == "a-train-0"


def test_corrupt_download_never_enters_the_cache(s3_ref: ShardsRef, tmp_path: Path) -> None:
    """The fault: a file whose checksum failed stays in the cache, and the retried process reads it."""
    remote = storage.open_committed(s3_ref.uri).uri
    content = bytearray(storage.read_bytes(storage.join(remote, "train/shard.00000.mds")))
    content[-20:] = bytes(20)
    damage(remote, "train/shard.00000.mds", bytes(content))
    plain = StreamingDataset(
        streams=[Stream(remote=remote, local=str(tmp_path / "plain"), split="train", validate_hash="xxh64")],
        batch_size=1,
    )
    with pytest.raises(ValueError, match="Checksum failure"):
        plain[0]
    plain._shard_states[0] = _ShardState.REMOTE  # as in a new process
    assert plain[0]["uid"], "streaming no longer serves it: the guard can go"

    for _ in range(2):  # the second is the retried process
        with pytest.raises(DataError, match=r"shard\.00000\.mds: xxh64 .* damaged"):
            ExampleReader([s3_ref], "train", tmp_path / "cache").example(0)
    assert not list((tmp_path / "cache").rglob("*.mds"))


def test_cut_cache_file_is_fetched_again(s3_ref: ShardsRef, tmp_path: Path) -> None:
    """The fault: whatever lies in the cache under the right name is believed."""
    reader = ExampleReader([s3_ref], "train", tmp_path / "cache")
    expected = reader.example(0)
    (shard,) = (tmp_path / "cache").rglob("*.mds")
    shard.write_bytes(shard.read_bytes()[:-100])
    assert ExampleReader([s3_ref], "train", tmp_path / "cache").example(0) == expected


def test_downloads_of_killed_processes_go(s3_ref: ShardsRef, tmp_path: Path) -> None:
    """Catches a cache that grows by a shard or two with every kill, and the removal of a download that goes on."""
    reader = ExampleReader([s3_ref], "train", tmp_path / "cache")
    reader.example(0)
    (shard,) = (tmp_path / "cache").rglob("*.mds")
    dead, alive = (shard.with_name(f".{name}.shard.00001.mds") for name in ("dead", "alive"))
    for attempt in (dead, alive):
        attempt.write_bytes(b"half of it")
    long_ago = time.time() - 2 * streaming_guards._DEAD_SECONDS
    for path in (dead, shard):
        os.utime(path, (long_ago, long_ago))
    ExampleReader([s3_ref], "train", tmp_path / "cache")
    assert (dead.exists(), alive.exists(), shard.exists()) == (False, True, True)


def test_an_object_store_that_restarts_is_waited_for(
    s3_ref: ShardsRef, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nobody listens for a while, then the server again.  boto3 alone gives up after 0.2 s, and days of training with
    it; one that never comes back is an error of the platform."""
    monkeypatch.setattr(streaming_guards, "PAUSES_SECONDS", (0.1,) * 4)
    reader = ExampleReader([s3_ref], "train", tmp_path / "cache")
    endpoint = os.environ["AWS_ENDPOINT_URL_S3"]

    def lead_to(address: str) -> None:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", address)
        storage._client.cache_clear()

    lead_to("http://127.0.0.1:9")
    with pytest.raises(PlatformError, match="Could not connect"):
        reader.example(0)
    assert len(re.findall(r"Could not connect .* next try in 0\.1 s", capsys.readouterr().err)) == 4
    back = threading.Timer(0.3, lead_to, [endpoint])
    back.start()
    assert reader.example(0).uid == "a-train-0"
    back.join()
    assert "next try" in capsys.readouterr().err


def flip_a_bit(shard: Path) -> None:
    """Of the last medium: the length stays."""
    content = bytearray(shard.read_bytes())
    content[-20] ^= 1
    shard.write_bytes(content)


def test_corrupt_local_shard_raises_at_its_first_use_and_at_every_try(ref: ShardsRef, tmp_path: Path) -> None:
    """The fault: checksums are compared after a download only; a bit that turned on disk is trained on."""
    flip_a_bit(Path(ref.uri, "train", "shard.00001.mds"))
    plain = StreamingDataset(local=ref.uri, split="train", batch_size=1, validate_hash="xxh64")
    bad = plain.samples_per_shard[0]
    assert plain[int(bad)]["uid"], "streaming no longer serves it: the guard can go"
    for _ in range(2):
        reader = ExampleReader([ref], "train", tmp_path)
        reader.prefetch([0, int(bad)])
        assert reader.example(0).uid == "a-train-0"
        for _ in range(2):
            with pytest.raises(DataError, match=r"shard\.00001\.mds: xxh64 \w+, \d+ bytes; expected \w+, .* damaged"):
                reader.example(int(bad))


def test_corrupt_cache_file_is_fetched_again(s3_ref: ShardsRef, tmp_path: Path) -> None:
    """The fault: a file of the right length in the cache is believed, whatever it holds."""
    reader = ExampleReader([s3_ref], "train", tmp_path / "cache")
    expected = [reader.example(number) for number in range(30)]
    for shard in (tmp_path / "cache").rglob("*.mds"):
        flip_a_bit(shard)
    index = next((tmp_path / "cache").rglob("index.json"))
    index.write_bytes(index.read_bytes()[:100])
    again = ExampleReader([s3_ref], "train", tmp_path / "cache")
    assert [again.example(number) for number in range(30)] == expected
    shard = next((tmp_path / "cache").rglob("shard.00000.mds"))
    flip_a_bit(shard)
    damage(storage.open_committed(s3_ref.uri).uri, "train/shard.00000.mds", None)
    with pytest.raises(DataError, match=r"shard\.00000\.mds: no such object"):
        ExampleReader([s3_ref], "train", tmp_path / "cache").example(0)
    assert not shard.exists(), "a bad file does not stay, even if there is no better one"


def test_index_that_is_not_the_committed_one_is_refused(ref: ShardsRef, s3_ref: ShardsRef, tmp_path: Path) -> None:
    """Catches an index that leads to other shards, with checksums of its own that fit."""
    for where in (ref, s3_ref):
        uri = storage.join(storage.open_committed(where.uri).uri, "train", "index.json")
        index = json.loads(storage.read_bytes(uri))
        index["shards"].reverse()
        storage.write_bytes(uri, json.dumps(index).encode())
        with pytest.raises(DataError, match=r"index\.json: another checksum"):
            ExampleReader([where], "train", tmp_path / "cache")


class Readings(IterableDataset[tuple[int, str]]):
    """Each worker reads one sample of each shard, and tells its number and what happened."""

    def __init__(self, reader: ExampleReader, first_samples: list[int]) -> None:
        self.reader, self.first_samples = reader, first_samples

    def __iter__(self) -> Iterator[tuple[int, str]]:
        """Errors as text."""
        worker = get_worker_info()
        assert worker is not None
        for sample in self.first_samples:
            try:
                yield worker.id, self.reader.example(sample).uid
            except DataError as error:
                yield worker.id, str(error)


@pytest.mark.parametrize("place", ["local", "s3"])
@pytest.mark.parametrize("fault", ["missing", "corrupt"])
def test_every_worker_raises_at_once(
    request: pytest.FixtureRequest, tmp_path: Path, place: str, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a worker that waits for ever for the shard that another has failed to get, or ends early without it;
    and a shard that each worker checks again.
    """
    ref: ShardsRef = request.getfixturevalue("ref" if place == "local" else "s3_ref")
    reader = ExampleReader([ref], "train", tmp_path / "cache")
    sizes = reader._samples.samples_per_shard
    firsts = [int(sum(sizes[:number])) for number in range(len(sizes))]
    assert len(sizes) > 2
    shard = storage.join(storage.open_committed(ref.uri).uri, "train/shard.00001.mds")
    if fault == "corrupt":
        content = storage.read_bytes(shard)
        storage.write_bytes(shard, content[:-20] + bytes(20))
    elif place == "local":
        Path(shard).unlink()
    else:
        damage(shard.rpartition("/train/")[0], "train/shard.00001.mds", None)
    checked = tmp_path / "checked"

    def counted(path: Path) -> str:
        with checked.open("a") as file:
            file.write(path.name[-15:] + "\n")
        return file_checksum(path)

    monkeypatch.setattr(streaming_guards, "file_checksum", counted)
    loader = DataLoader(Readings(reader, firsts), batch_size=None, num_workers=2, timeout=20)
    started = time.monotonic()
    told = list(loader)
    assert time.monotonic() - started < 15
    for worker in (0, 1):
        mine = [text for number, text in told if number == worker]
        assert len(mine) == len(firsts), "no shorter epoch"
        assert re.search(r"shard\.00001\.mds: (no such|xxh64)", mine[1])
        assert [text for text in mine if "shard" not in text] == [f"a-train-{n}" for n in firsts if n != firsts[1]]
    good = [name for name in checked.read_text().split() if name != "shard.00001.mds"]
    assert len(good) == len(firsts) - 1, "once on this node"


def test_file_that_changes_while_it_is_read_is_an_error(ref: ShardsRef, tmp_path: Path) -> None:
    """Catches 'not enough values to unpack' as the whole explanation."""
    reader = ExampleReader([ref], "train", tmp_path)
    shard = Path(ref.uri, "train", "shard.00000.mds")
    assert reader.example(0).uid == "a-train-0"
    for length in (100, 7, 0):
        shard.write_bytes(shard.read_bytes()[:length])
        with pytest.raises(DataError, match=r"shard\.00000\.mds: sample 1 cannot be read|shard sample .*damaged"):
            reader.example(1)


@pytest.mark.parametrize("mend", ["delete", "cut"])
def test_damaged_local_shard_is_an_error_when_opened(ref: ShardsRef, tmp_path: Path, mend: str) -> None:
    """The fault: a shorter shard gives samples that end early, without an error, until training meets them."""
    shard = Path(ref.uri, "train", "shard.00001.mds")
    if mend == "delete":
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"shard\.00001\.mds: (no such file|\d+ bytes); expected \d+ bytes"):
        ExampleReader([ref], "train", tmp_path)


def test_local_shard_that_vanishes_later_is_an_error(ref: ShardsRef, tmp_path: Path) -> None:
    """The fault: eight silent tries, then a message that speaks of thrashing or of a remote."""
    reader = ExampleReader([ref], "train", tmp_path)
    Path(ref.uri, "train", "shard.00000.mds").unlink()
    with pytest.raises(DataError, match=r"shard\.00000\.mds: no such file"):
        reader.example(0)


def test_index_cannot_lead_out_of_the_cache(ref: ShardsRef, tmp_path: Path) -> None:
    """The fault: `../x` as a file name makes streaming write beside its cache folder."""
    source, cache = tmp_path / "source", tmp_path / "plain"
    shutil.copytree(Path(ref.uri), source)
    index_file = source / "train" / "index.json"
    index = json.loads(index_file.read_text())
    index["shards"][0]["raw_data"]["basename"] = "../../escaped.mds"
    index_file.write_text(json.dumps(index))
    shutil.move(source / "train" / "shard.00000.mds", source.parent / "escaped.mds")
    plain = StreamingDataset(streams=[Stream(remote=str(source), local=str(cache / "x"), split="train")], batch_size=1)
    assert plain[0]["uid"]
    assert (cache / "escaped.mds").is_file(), "streaming no longer escapes: the guard can go"
    with pytest.raises(DataError, match=r"file name '\.\./\.\./escaped\.mds'"):
        GuardedStream(local=source, split="train", listing=index_file.read_bytes())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hashes": {}}, "no xxh64 checksum of shard.00000.mds"),
        ({"basename": "a\\b"}, "file name"),
        ({"basename": "/etc/passwd"}, "file name"),
        ({"basename": "shard.00001.mds"}, "listed twice"),
    ],
)
def test_index_is_checked(ref: ShardsRef, change: dict[str, object], words: str) -> None:
    """Catches an index that is believed because it parses."""
    index = json.loads(Path(ref.uri, "train", "index.json").read_text())
    assert len(index["shards"]) > 1
    index["shards"][0]["raw_data"] |= change
    with pytest.raises(DataError, match=words):
        parse_index(json.dumps(index).encode(), "x")
    for content in (b"", b"null", b'{"shards": [1]}', b"[" * 100_000):
        with pytest.raises(DataError, match="no index of MDS shards"):
            parse_index(content, "x")


@pytest.mark.parametrize(
    "change", [{"column_encodings": ["pkl"] * len(COLUMNS)}, {"compression": "zstd"}, {"format": "json"}]
)
def test_foreign_shards_are_refused(ref: ShardsRef, change: dict[str, object]) -> None:
    """Catches shards with pickles (which run code when read), or of another writer."""
    index = json.loads(Path(ref.uri, "train", "index.json").read_text())
    index["shards"][0] |= change
    with pytest.raises(DataError):
        parse_index(json.dumps(index).encode(), "x")


def _hold(uri: str, local: str, plain: bool, ready: multiprocessing.connection.Connection) -> None:
    if plain:
        kept: object = StreamingDataset(streams=[Stream(remote=uri, local=local, split="train")], batch_size=1)
    else:
        kept = GuardedStreamingDataset([guarded(uri, local)])
    ready.send(True)
    signal.pause()
    del kept


@pytest.mark.parametrize("plain", [True, False])
def test_cache_can_be_used_again_after_kill_9(s3_ref: ShardsRef, tmp_path: Path, plain: bool) -> None:
    """The fault: shared memory of a killed process makes streaming refuse its cache folder."""
    remote, local = storage.open_committed(s3_ref.uri).uri, str(tmp_path / "cache")
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    process = context.Process(target=_hold, args=(remote, local, plain, there))
    process.start()
    assert here.recv()
    assert process.pid
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    if plain:
        with pytest.raises(ValueError, match="Reused local directory"):
            StreamingDataset(streams=[Stream(remote=remote, local=local, split="train")], batch_size=1)
    else:
        again = GuardedStreamingDataset([guarded(remote, local)])
        assert again[0]["uid"] == "a-train-0"


def _build_many(
    uri: str, plain: bool, start: multiprocessing.synchronize.Barrier, results: multiprocessing.connection.Connection
) -> None:
    failures = 0
    for _ in range(15):
        start.wait(30)
        try:
            if plain:
                StreamingDataset(local=uri, split="train", batch_size=1)
            else:
                GuardedStreamingDataset([guarded(uri)])
        except OSError:
            failures += 1
    results.send(failures)


def failures_at_once(uri: str, *, plain: int) -> tuple[int, int]:
    """How often the first `plain` of four processes that build a dataset at the same time fail, in 15 rounds; and how
    often the others, which are guarded, do.
    """
    context = multiprocessing.get_context("fork")
    start = context.Barrier(4)
    pipes = [context.Pipe() for _ in range(4)]
    processes = [
        context.Process(target=_build_many, args=(uri, number < plain, start, there))
        for number, (_, there) in enumerate(pipes)
    ]
    for process in processes:
        process.start()
    failures = [here.recv() if here.poll(60) else 1000 for here, _ in pipes]
    for process in processes:
        process.join()
    return sum(failures[:plain]), sum(failures[plain:])


def test_processes_that_start_at_once_do_not_meet(ref: ShardsRef) -> None:
    """The fault: two processes choose one name for their shared memory; one dies with FileExistsError."""
    assert failures_at_once(ref.uri, plain=0) == (0, 0)
    of_plain, of_guarded = failures_at_once(ref.uri, plain=3)
    assert of_guarded == 0, "nor do they meet those of another program"
    if not of_plain:
        pytest.skip("the plain class happened not to collide this time; the guarded one was checked")


def test_no_process_group_is_started_behind_the_callers_back(
    ref: ShardsRef, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fault: with WORLD_SIZE set, the constructor starts (and ends) a process group of its own, or hangs."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(PlatformError, match="WORLD_SIZE is 2, but there is no process group"):
        ExampleReader([ref], "train", tmp_path)


def open_shared_memory() -> list[str]:
    """Names of shared memory, one for each handle; sockets of the S3 server come and go meanwhile."""
    gc.collect()
    links = []
    for path in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            links.append(os.readlink(path))
    return [link for link in links if link.startswith("/dev/shm/")]


def num_open_files() -> int:
    return len(open_shared_memory())


def test_readers_give_their_shared_memory_back(ref: ShardsRef, tmp_path: Path) -> None:
    """The fault: every dataset, and every look at another one's shared memory, costs file handles for ever."""
    before = num_open_files()
    opened: list[SharedMemory] = []
    open_files = [0]
    with pytest.MonkeyPatch.context() as patch:  # only so that this process gets rid of it afterwards
        patch.setattr(memory, "atexit", SimpleNamespace(register=lambda cleanup: opened.append(cleanup.__self__)))
        for _ in range(4):
            StreamingDataset(local=ref.uri, split="train", batch_size=1)
            mine = {f"/dev/shm/{made.name}" for memory in opened for made in memory.created_shms}
            open_files.append(sum(name in mine for name in open_shared_memory()))  # not those of other processes
    first, *_, last = np.diff(open_files).tolist()
    assert last > first > 0, "streaming no longer leaks: the guard can go"
    _release(opened, os.getpid())
    assert num_open_files() == before

    readers = [ExampleReader([ref], "train", tmp_path) for _ in range(8)]
    assert num_open_files() - before <= 8 * 12, "two for each of its own six, and none of the others'"
    names = [f"{reader._samples._shm_prefix_int:06}_*" for reader in readers]
    assert [len(list(Path("/dev/shm").glob(name))) for name in names] == [6] * 8
    del readers
    assert num_open_files() == before
    assert [len(list(Path("/dev/shm").glob(name))) for name in names] == [0] * 8


def lock_files() -> int:
    return len(list(Path(tempfile.gettempdir()).glob("*_filelock")))


def test_readers_leave_no_lock_files(ref: ShardsRef, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fault: two files in the temporary folder per dataset, for ever; streaming passes over their numbers."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    plain = StreamingDataset(local=ref.uri, split="train", batch_size=1)
    plain.prepare_shard(0)
    before = lock_files()
    del plain
    gc.collect()
    assert lock_files() == before > 0, "streaming no longer leaves them: the guard can go"
    reader = ExampleReader([ref], "train", tmp_path)
    assert reader.example(0).uid == "a-train-0"
    assert lock_files() > before
    del reader
    gc.collect()
    assert lock_files() == before


def test_many_readers_in_one_process(ref: ShardsRef, tmp_path: Path) -> None:
    """Catches stale shared memory between readers that live one after the other and side by side."""
    readers = [ExampleReader([ref], "train", tmp_path) for _ in range(10)]
    for reader in readers:
        assert reader.example(29).uid == "a-train-29"
    del readers, reader
    assert ExampleReader([ref], "train", tmp_path).example(0).uid == "a-train-0"
