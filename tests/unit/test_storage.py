"""storage: whole or not at all, on a local disk and behind an S3 endpoint alike."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from molmo2core import storage
from molmo2core.errors import DataError, PlatformError


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A place to write to: a local folder or an `s3://` prefix."""
    return str(tmp_path / "place") if request.param == "local" else f"{request.getfixturevalue('s3_bucket')}/place"


def two_files(folder: Path) -> dict[str, Any]:
    (folder / "a.txt").write_text("alpha")
    (folder / "deep").mkdir()
    (folder / "deep" / "b.txt").write_text("beta")
    return {"count": 2}


def leftovers(place: str) -> list[str]:
    """Everything that is there, also what a careless writer left beside the folder."""
    return storage.list_files(place)


# Single files


def test_write_read_exists_list(place: str) -> None:
    uri = storage.join(place, "folder", "file.bin")
    assert not storage.exists(uri)
    assert storage.list_files(place) == []
    storage.write_bytes(uri, b"one")
    storage.write_bytes(uri, b"two")
    assert storage.exists(uri)
    assert storage.read_bytes(uri) == b"two"
    assert storage.list_files(place) == ["folder/file.bin"]
    assert not storage.exists(storage.join(place, "folder")), "a folder is not a file"


def test_a_missing_file_is_a_data_error_that_names_it(place: str) -> None:
    uri = storage.join(place, "nothing.bin")
    with pytest.raises(DataError, match=r"nothing\.bin: no such"):
        storage.read_bytes(uri)


def test_list_files_of_a_folder_does_not_list_a_neighbour_with_the_same_start(place: str) -> None:
    """S3 prefixes match text: `run1` would list `run10` too without the closing slash."""
    storage.write_bytes(storage.join(place, "run1", "a"), b"")
    storage.write_bytes(storage.join(place, "run10", "b"), b"")
    assert storage.list_files(storage.join(place, "run1")) == ["a"]


def test_download_copies_and_leaves_no_part_files(place: str, tmp_path: Path) -> None:
    uri = storage.join(place, "file.bin")
    storage.write_bytes(uri, b"content")
    target = storage.download(uri, tmp_path / "cache" / "copy.bin")
    assert target.read_bytes() == b"content"
    assert os.listdir(tmp_path / "cache") == ["copy.bin"]
    assert target.stat().st_mode & 0o444 == 0o444, "another user's pod must be able to read it"


def test_two_downloads_to_one_destination_do_not_break_each_other(s3_bucket: str, tmp_path: Path) -> None:
    """Ranks of one node fetch the same tokenizer at the same time; a shared temporary name loses one of them."""
    uri = f"{s3_bucket}/file.bin"
    storage.write_bytes(uri, os.urandom(1 << 20))
    errors: list[BaseException] = []

    def fetch() -> None:
        try:
            storage.download(uri, tmp_path / "copy.bin")
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=fetch) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert storage.file_sha256(tmp_path / "copy.bin") == storage.file_sha256(storage.download(uri, tmp_path / "again"))


def test_resolve_and_join() -> None:
    assert storage.resolve("s3://lake/w", "corpus/x") == "s3://lake/w/corpus/x"
    assert storage.resolve("runs", "s3://other/x") == "s3://other/x"
    assert storage.resolve("runs", os.sep + "absolute") == os.sep + "absolute"
    assert storage.join("s3://lake/", "/a/", "b") == "s3://lake/a/b"


def test_content_key_depends_on_content_and_not_on_the_order_of_keys() -> None:
    assert storage.content_key({"a": 1, "b": 2}) == storage.content_key({"b": 2, "a": 1})
    assert storage.content_key({"a": 1}, "x") != storage.content_key({"a": 2}, "x")
    assert len(storage.content_key("x")) == 16


# Committed folders


def test_a_committed_folder_lists_its_files_with_checksums(place: str, tmp_path: Path) -> None:
    uri = storage.join(place, "folder")
    folder = storage.commit_folder(uri, two_files)
    assert folder == storage.open_committed(uri)
    assert {name: facts["bytes"] for name, facts in folder.files.items()} == {"a.txt": 5, "deep/b.txt": 4}
    assert folder.meta == {"count": 2}
    local = storage.fetch_committed(uri, tmp_path / "cache")
    assert (local / "deep" / "b.txt").read_text() == "beta"


def test_the_digest_is_of_the_content_and_not_of_place_or_meta(tmp_path: Path, s3_bucket: str) -> None:
    here = storage.commit_folder(str(tmp_path / "one"), two_files)
    there = storage.commit_folder(f"{s3_bucket}/two", lambda folder: two_files(folder) | {"count": 3})
    assert here.digest == there.digest

    def other(folder: Path) -> dict[str, Any]:
        two_files(folder)
        (folder / "a.txt").write_text("alphA")
        return {}

    assert storage.commit_folder(str(tmp_path / "three"), other).digest != here.digest


def test_nothing_is_visible_while_a_folder_is_filled(place: str) -> None:
    uri = storage.join(place, "folder")
    seen: list[bool] = []

    def fill(folder: Path) -> dict[str, Any]:
        (folder / "a.txt").write_text("alpha")
        seen.append(storage.is_committed(uri) or storage.exists(storage.join(uri, "a.txt")))
        return {}

    storage.commit_folder(uri, fill)
    assert seen == [False]


def test_an_error_while_filling_leaves_nothing(place: str) -> None:
    def fill(folder: Path) -> dict[str, Any]:
        (folder / "a.txt").write_text("alpha")
        raise ValueError("half way")

    with pytest.raises(ValueError, match="half way"):
        storage.commit_folder(storage.join(place, "folder"), fill)
    assert leftovers(place) == []


def test_an_uncommitted_folder_is_refused_by_readers(place: str, tmp_path: Path) -> None:
    storage.write_bytes(storage.join(place, "folder", "a.txt"), b"alpha")
    for read in (storage.open_committed, lambda uri: storage.fetch_committed(uri, tmp_path / "cache")):
        with pytest.raises(DataError, match="no committed folder"):
            read(storage.join(place, "folder"))


def test_a_damaged_marker_is_a_data_error(place: str) -> None:
    storage.write_bytes(storage.join(place, "folder", storage.MARKER), b'{"files": {')
    with pytest.raises(DataError, match="damaged marker"):
        storage.open_committed(storage.join(place, "folder"))


def test_the_second_commit_reuses_the_first_and_does_not_fill(place: str) -> None:
    uri = storage.join(place, "folder")
    first = storage.commit_folder(uri, two_files)

    def never(folder: Path) -> dict[str, Any]:
        raise AssertionError("filled again")

    assert storage.commit_folder(uri, never) == first


def test_an_uncommitted_local_folder_in_the_way_is_kept_and_named(tmp_path: Path) -> None:
    """Somebody's files must not be deleted because a stage wants their name."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.txt").write_text("years of work")
    with pytest.raises(DataError, match="uncommitted folder in the way"):
        storage.commit_folder(str(tmp_path / "folder"), two_files)
    assert leftovers(str(tmp_path)) == ["folder/thesis.txt"]


def _commit_slowly(uri: str, started: str, seconds: float) -> None:
    def fill(folder: Path) -> dict[str, Any]:
        two_files(folder)
        Path(started).touch()
        time.sleep(seconds)
        return {}

    storage.commit_folder(uri, fill)


def test_a_killed_writer_leaves_nothing_visible_and_the_next_one_succeeds(place: str, tmp_path: Path) -> None:
    uri, started = storage.join(place, "folder"), tmp_path / "started"
    writer = multiprocessing.get_context("spawn").Process(target=_commit_slowly, args=(uri, str(started), 600.0))
    writer.start()
    while not started.exists():
        assert writer.is_alive()
        time.sleep(0.02)
    assert writer.pid is not None
    os.kill(writer.pid, signal.SIGKILL)
    writer.join()
    assert not storage.is_committed(uri)
    assert storage.list_files(uri) == []
    storage.commit_folder(uri, two_files)
    assert storage.fetch_committed(uri, tmp_path / "cache").joinpath("a.txt").read_text() == "alpha"


def test_a_writer_killed_between_the_uploads_leaves_no_committed_folder(
    s3_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On S3 files appear one by one; only the marker, last, makes them a folder."""
    uri = f"{s3_bucket}/folder"
    client = storage._client()
    upload, uploaded = client.upload_file, []

    def upload_one_then_die(*args: Any) -> None:
        if uploaded:
            raise KeyboardInterrupt
        uploaded.append(args)
        upload(*args)

    with monkeypatch.context() as patch:
        patch.setattr(client, "upload_file", upload_one_then_die)
        with pytest.raises(KeyboardInterrupt):
            storage.commit_folder(uri, two_files)
    assert len(storage.list_files(uri)) == 1, "the interesting case: something is there"
    assert not storage.is_committed(uri)
    storage.commit_folder(uri, two_files)
    assert (storage.fetch_committed(uri, tmp_path / "cache") / "deep" / "b.txt").read_text() == "beta"


def test_of_concurrent_writers_one_stands_whole_and_all_return_it(place: str, tmp_path: Path) -> None:
    """Each writer's files differ, so a mixture of two would show as a wrong checksum."""
    uri, barrier = storage.join(place, "folder"), threading.Barrier(4)

    def write(name: str) -> Callable[[Path], dict[str, Any]]:
        def fill(folder: Path) -> dict[str, Any]:
            for number in range(5):
                (folder / f"{number}.txt").write_text(name)
            barrier.wait()
            return {"writer": name}

        return fill

    results: list[storage.CommittedFolder] = []
    threads = [
        threading.Thread(target=lambda n=name: results.append(storage.commit_folder(uri, write(n)))) for name in "abcd"
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert len({json.dumps(folder.meta) for folder in results}) == 1
    local = storage.fetch_committed(results[0].uri, tmp_path / "cache")
    assert {(local / f"{number}.txt").read_text() for number in range(5)} == {results[0].meta["writer"]}
    if not storage.is_remote(place):
        assert os.listdir(place) == ["folder"], "the losers cleaned up"


# Damage, full disks, unreachable stores


def test_a_changed_object_is_found_by_its_checksum_and_not_cached(s3_bucket: str, tmp_path: Path) -> None:
    uri = f"{s3_bucket}/folder"
    folder = storage.commit_folder(uri, two_files)
    storage.write_bytes(storage.join(folder.uri, "a.txt"), b"alphA")
    with pytest.raises(DataError, match=r"a\.txt: another checksum"):
        storage.fetch_committed(uri, tmp_path / "cache")
    assert leftovers(str(tmp_path / "cache")) == []
    storage.write_bytes(storage.join(folder.uri, "a.txt"), b"alpha")
    assert (storage.fetch_committed(uri, tmp_path / "cache") / "a.txt").read_text() == "alpha"


def test_a_full_disk_while_filling_is_a_platform_error_and_leaves_nothing(place: str) -> None:
    """ENOSPC from the kernel itself, by way of the device that is always full."""

    def fill(folder: Path) -> dict[str, Any]:
        (folder / "a.txt").write_text("alpha")
        with Path(os.devnull).with_name("full").open("wb", buffering=0) as device:
            device.write(b"x")
        return {}

    with pytest.raises(PlatformError, match="No space left on device; to mend it: free space"):
        storage.commit_folder(storage.join(place, "folder"), fill)
    assert leftovers(place) == []


def test_a_file_that_cannot_be_written_whole_leaves_the_old_one(tmp_path: Path) -> None:
    """The kernel's file size limit stops the write in the middle, as a full disk would."""
    target = tmp_path / "file.bin"
    target.write_bytes(b"old")
    program = (
        "import sys\n"
        "from molmo2core import errors, storage\n"
        "try:\n"
        "    storage.write_bytes(sys.argv[1], bytes(1 << 20))\n"
        "except errors.Molmo2Error as error:\n"
        "    sys.exit(errors.exit_with_message(error))\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", program, str(target)],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)),
    )
    assert run.returncode == PlatformError.exit_code, run.stderr
    assert run.stderr.startswith("PlatformError: ")
    assert "File too large" in run.stderr
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file.bin"]


def test_a_bucket_that_is_not_there_is_named_not_traced(s3_endpoint: str, tmp_path: Path) -> None:
    """upload_file wraps errors in a class of boto3's own, which is neither ClientError nor BotoCoreError."""
    for attempt in (
        lambda: storage.commit_folder("s3://no-such-bucket/folder", two_files),
        lambda: storage.write_bytes("s3://no-such-bucket/file", b""),
        lambda: storage.list_files("s3://no-such-bucket/folder"),
    ):
        with pytest.raises(DataError, match="NoSuchBucket"):
            attempt()


def test_an_unreachable_store_is_worth_retrying(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    storage._client.cache_clear()
    try:
        with pytest.raises(PlatformError, match="AWS_ENDPOINT_URL_S3"):
            storage.exists("s3://lake/file")
    finally:
        storage._client.cache_clear()


def test_no_access_is_not_taken_for_no_file(s3_bucket: str) -> None:
    """`exists` that answers False on 403 would make every stage run again, or write over what it may not see."""
    from botocore.stub import Stubber

    with Stubber(storage._client()) as stub:
        stub.add_client_error("head_object", "403", http_status_code=403)
        with pytest.raises(DataError, match="access denied"):
            storage.is_committed(f"{s3_bucket}/folder")


def test_a_forked_worker_makes_its_own_client(s3_bucket: str) -> None:
    """Loader workers fork; two processes on one connection would read each other's answers."""
    storage.write_bytes(f"{s3_bucket}/file", b"content")
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, str(storage._client.cache_info().currsize).encode())
        os._exit(0)
    os.waitpid(child, 0)
    assert storage._client.cache_info().currsize == 1
    assert os.read(reader, 10) == b"0"
    os.close(reader)
    os.close(writer)
