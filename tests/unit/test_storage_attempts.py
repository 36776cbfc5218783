"""What becomes of writers that lost, were killed or only collect what others wrote."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from moto.core import DEFAULT_ACCOUNT_ID
from moto.s3.models import s3_backends

from molmo2core import storage
from molmo2core.errors import DataError


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A place to write to: a local folder or an `s3://` prefix."""
    return str(tmp_path / "place") if request.param == "local" else f"{request.getfixturevalue('s3_bucket')}/place"


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What has not changed for two seconds counts as abandoned."""
    monkeypatch.setattr(storage, "ABANDONED_SECONDS", 2.0)
    storage._remove_abandoned_attempts.cache_clear()
    yield
    storage._remove_abandoned_attempts.cache_clear()


def one_file(folder: Path) -> dict[str, Any]:
    (folder / "own.txt").write_text("own")
    return {"count": 1}


def shards(folder: Path) -> dict[str, Any]:
    (folder / "shard").write_bytes(b"0123456789" * 1000)
    return {}


def test_a_folder_holds_files_of_others(place: str, tmp_path: Path) -> None:
    """Catches collected files that are missing, carry a checksum that nobody computed, or vanish with their origin."""
    part = storage.commit_folder(storage.join(place, "whole.parts", "a"), shards)
    uri = storage.join(place, "whole")
    whole = storage.commit_folder(uri, one_file, {"train/shard.00000": part.stored("shard")})
    assert set(whole.files) == {"own.txt", "train/shard.00000"}
    storage.remove_folder(storage.join(place, "whole.parts"))
    assert storage.list_files(storage.join(place, "whole.parts")) == []
    local = storage.fetch_committed(uri, tmp_path / "cache")  # compares every checksum when it downloads
    assert storage.file_sha256(local / "train" / "shard.00000") == whole.files["train/shard.00000"]["sha256"]

    def plainly(folder: Path) -> dict[str, Any]:
        (folder / "train").mkdir()
        (folder / "train" / "shard.00000").write_bytes(b"0123456789" * 1000)
        return one_file(folder)

    assert storage.commit_folder(storage.join(place, "plain"), plainly).digest == whole.digest


def test_collecting_costs_no_disk_and_works_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a second copy of all shards, and a file system without hard links that stops the stage."""
    part = storage.commit_folder(str(tmp_path / "part"), shards)
    storage.commit_folder(str(tmp_path / "linked"), one_file, {"shard": part.stored("shard")})
    assert (tmp_path / "linked" / "shard").stat().st_ino == (tmp_path / "part" / "shard").stat().st_ino

    def no_links(*_: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    storage.commit_folder(str(tmp_path / "copied"), one_file, {"shard": part.stored("shard")})
    assert (tmp_path / "copied" / "shard").read_bytes() == b"0123456789" * 1000


def test_a_collected_file_that_is_gone_leaves_nothing(place: str) -> None:
    part = storage.commit_folder(storage.join(place, "parts", "a"), shards)
    storage.remove_folder(storage.join(place, "parts"))
    with pytest.raises(DataError, match="no such"):
        storage.commit_folder(storage.join(place, "whole"), one_file, {"shard": part.stored("shard")})
    assert not storage.is_committed(storage.join(place, "whole"))


def test_committed_content_is_read_by_its_checksum(place: str) -> None:
    """Catches an index that was edited after the commit and is believed."""
    folder = storage.commit_folder(storage.join(place, "folder"), one_file)
    assert folder.read("own.txt") == b"own"
    with pytest.raises(DataError, match=r"no file other\.txt"):
        folder.read("other.txt")
    storage.write_bytes(storage.join(folder.uri, "own.txt"), b"0wn")
    with pytest.raises(DataError, match=r"own\.txt: another checksum"):
        folder.read("own.txt")


def test_removing_takes_the_marker_first(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A removal that is killed half way must not leave a committed folder with holes."""
    uri = f"{s3_bucket}/folder"
    storage.commit_folder(uri, shards)
    client, requests = storage._client(), []
    original = client.delete_objects
    monkeypatch.setattr(client, "delete_objects", lambda **given: (requests.append(given), original(**given))[1])
    storage.remove_folder(uri)
    assert storage.list_files(uri) == []
    keys = [item["Key"].rpartition("/")[2] for item in requests[0]["Delete"]["Objects"]]
    assert keys == [storage.MARKER, storage.MARKER, "shard"]
    storage.remove_folder(uri)
    assert len(requests) == 1, "nothing to remove is no request, which S3 would refuse"


def _fill_and_wait(uri: str, started: str) -> None:
    def fill(folder: Path) -> dict[str, Any]:
        shards(folder)
        Path(started).touch()
        time.sleep(600)
        return {}

    storage.commit_folder(uri, fill)


def test_local_attempts_of_killed_writers_go_after_their_age(tmp_path: Path, soon: None) -> None:
    """Catches a disk that fills with shards of killed writers, and the removal of an attempt that is alive."""
    writer = multiprocessing.get_context("spawn").Process(
        target=_fill_and_wait, args=(str(tmp_path / "place" / "killed"), str(tmp_path / "started"))
    )
    writer.start()
    while not (tmp_path / "started").exists():
        assert writer.is_alive()
        time.sleep(0.02)
    writer.kill()
    writer.join()
    (abandoned,) = (tmp_path / "place").glob(".attempt-*")
    time.sleep(2.1)
    alive = tmp_path / "place" / ".attempt-alive"
    (alive / "deep").mkdir(parents=True)
    (alive / "deep" / "file").write_text("old times are kept by copytree")
    os.utime(alive / "deep" / "file", (0, 0))
    os.utime(alive, (0, 0))
    storage.commit_folder(str(tmp_path / "place" / "next"), one_file)
    assert not abandoned.exists()
    assert alive.exists()


def backdate(bucket: str) -> None:
    """As if all that is in a bucket had been written eight days ago."""
    for stored in s3_backends[DEFAULT_ACCOUNT_ID]["aws"].buckets[bucket.removeprefix("s3://")].keys.values():
        stored.last_modified -= timedelta(days=8)


def test_uploads_that_lost_or_were_abandoned_go(s3_bucket: str) -> None:
    """Catches a bucket that keeps every lost upload, and the removal of the upload that the marker points to."""
    uri = f"{s3_bucket}/folder"
    storage.write_bytes(f"{uri}/by-attempt-killed/shard", b"half of it")
    storage.write_bytes(f"{s3_bucket}/folder2/by-attempt-other/shard", b"another folder's")
    backdate(s3_bucket)

    def lose(folder: Path) -> dict[str, Any]:
        storage.commit_folder(uri, shards)  # another writer is faster
        assert not storage.exists(f"{uri}/by-attempt-killed/shard")
        backdate(s3_bucket)  # by an age
        storage.write_bytes(f"{uri}/by-attempt-alive/shard", b"still uploading")
        return one_file(folder)

    standing = storage.commit_folder(uri, lose)
    assert set(standing.files) == {"shard"}
    uploads = {name.partition("/")[0] for name in storage.list_files(uri)}
    assert uploads == {storage.MARKER, "by-attempt-alive", standing.uri.rpartition("/")[2]}
    assert storage.list_files(f"{s3_bucket}/folder2") == ["by-attempt-other/shard"]
    assert json.loads(storage.read_bytes(f"{uri}/{storage.MARKER}"))["at"] == [standing.uri.rpartition("/")[2]]


def test_no_right_to_delete_does_not_undo_a_commit(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches tidying that fails a stage whose output stands."""

    def denied(**_: Any) -> None:
        raise storage._client().exceptions.ClientError({"Error": {"Code": "AccessDenied"}}, "DeleteObjects")

    uri = f"{s3_bucket}/folder"

    def lose(folder: Path) -> dict[str, Any]:
        storage.commit_folder(uri, shards)
        return one_file(folder)

    monkeypatch.setattr(storage._client(), "delete_objects", denied)
    assert set(storage.commit_folder(uri, lose).files) == {"shard"}


def test_sizes_and_missing_files(place: str) -> None:
    """Catches a lost medium that is found only after hours of work."""
    names = [storage.join(place, f"{number}.bin") for number in range(40)]
    for number, name in enumerate(names):
        storage.write_bytes(name, bytes(number))
    assert storage.file_sizes(names) == list(range(40))
    with pytest.raises(DataError, match=r"41\.bin: no such"):
        storage.file_sizes([*names, storage.join(place, "41.bin")])


def test_a_file_is_read_piece_by_piece(place: str) -> None:
    uri = storage.join(place, "lines.jsonl")
    storage.write_bytes(uri, b"one\ntwo\n")
    with storage.opened(uri) as file:
        assert list(file) == [b"one\n", b"two\n"]
    with (
        pytest.raises(DataError, match=r"nothing\.jsonl: no such"),
        storage.opened(storage.join(place, "nothing.jsonl")),
    ):
        pass
