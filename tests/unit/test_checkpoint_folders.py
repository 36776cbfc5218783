"""Checkpoints on a disk and in an object store: which is found, which is passed over, which may go."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from molmo2core import storage
from molmo2core.errors import PlatformError
from molmo2core.stages import train_upload
from molmo2core.stages.train_resume import remove_all_but_lasting, unfinished_trainings
from molmo2core.stages.train_upload import UPLOADS, uploading
from molmo2core.testing.training import training_config
from molmo2core.training.checkpoint_folders import (
    CheckpointPlace,
    checkpoint_name,
    outdated_steps,
    remove_outdated,
    replace_folder,
    saved_steps,
    tidy_up,
    whole_checkpoint,
)

SHARD, METADATA, WHOLE = "shards/__1_0.distcp", "shards/.metadata", "state.pt"
CONFIG = training_config()


def save(folder: Path, step: int, *names: str, content: bytes = b"") -> Path:
    """A committed checkpoint as CheckpointWriter leaves it."""
    part = folder / ".saving"
    for name in names or (WHOLE,):
        path = part / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content or f"{step} {name}".encode() * 1000)
    files = {name: storage.file_facts(part / name) for name in storage.list_files(str(part))}
    storage.seal_folder(part, files, {"step": step, "ranks": 1, "save": uuid.uuid4().hex})
    replace_folder(part, folder / checkpoint_name(step))
    return folder / checkpoint_name(step)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "a flipped bit": (SHARD, flip, "other content than was written"),
    "a truncated shard": (SHARD, lambda path: os.truncate(path, 100), "100 bytes; expected"),
    "a missing shard": (SHARD, Path.unlink, "No such file"),
    "garbage for metadata": (METADATA, lambda path: path.write_bytes(b"?" * path.stat().st_size), "other content"),
    "a flipped bit of one file": (WHOLE, flip, "other content than was written"),
    "garbage for the marker": (storage.MARKER, lambda path: path.write_bytes(b"{"), "a damaged marker"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str) -> None:
    """Names file and reason, takes the one before, and leaves the damaged one: a disk may have failed for a moment.
    Would catch weights with a wrong bit, which torch loads without a word."""
    name, spoil, reason = DAMAGES[damage]
    place = CheckpointPlace(folder=tmp_path)
    save(tmp_path, 3, SHARD, METADATA, WHOLE)
    spoil(save(tmp_path, 6, SHARD, METADATA, WHOLE) / name)
    assert whole_checkpoint(place) == 3
    printed = capsys.readouterr().out
    assert "warning: the checkpoint of step 6 is damaged" in printed and f"ba6/{name}: {reason}" in printed
    assert "going on from step 3 instead" in printed
    assert (tmp_path / "ba6").exists()
    spoil(tmp_path / "ba3" / name)
    assert whole_checkpoint(place) is None
    assert "no checkpoint is whole; training starts at step 0" in capsys.readouterr().out


def test_a_step_that_another_node_has_not_does_not_count(tmp_path: Path) -> None:
    """What nodes agree on is the newest that all have: the limit itself is one of them."""
    place = CheckpointPlace(folder=tmp_path)
    for step in (3, 6, 9):
        save(tmp_path, step)
    assert [whole_checkpoint(place, up_to=limit) for limit in (None, 8, 6, 2)] == [9, 6, 6, None]


def test_a_damaged_copy_is_fetched_again(tmp_path: Path, s3_bucket: str, capsys: pytest.CaptureFixture[str]) -> None:
    """And a damaged one in the store is passed over like one on the disk."""
    place = CheckpointPlace(folder=tmp_path, store=f"{s3_bucket}/k.resume")
    for step in (3, 6):
        storage.upload_committed(save(tmp_path, step), f"{place.store}/ba{step}")
    flip(tmp_path / "ba6" / WHOLE)
    assert whole_checkpoint(place) == 6
    assert storage.damage(tmp_path / "ba6") == ""
    assert "step 6 fetched from s3://" in capsys.readouterr().out
    shutil.rmtree(tmp_path)
    (stored,) = [name for name in storage.list_files(f"{place.store}/ba6") if name.endswith(WHOLE)]
    storage.write_bytes(f"{place.store}/ba6/{stored}", b"garbage")
    assert whole_checkpoint(place) == 3
    printed = capsys.readouterr().out
    assert "step 6 is damaged: s3://" in printed and "going on from step 3 instead" in printed
    assert saved_steps(str(tmp_path)) == [3]
    assert [path.name for path in tmp_path.iterdir()] == ["ba3"]


def test_what_kills_leave_is_removed_and_what_they_took_is_put_back(tmp_path: Path) -> None:
    """Killed in a save, in a removal, and between the two renames that replace a checkpoint."""
    save(tmp_path, 3)
    os.rename(tmp_path / "ba3", tmp_path / ".replaced-ba3")
    for name in (".saving", ".fetched", ".converted", ".attempt-x"):
        (tmp_path / name / "inner").mkdir(parents=True)
    tidy_up(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["ba3"]
    assert whole_checkpoint(CheckpointPlace(folder=tmp_path)) == 3


@given(
    steps=st.sets(st.integers(1, 60)),
    saved=st.integers(1, 60),
    keep=st.integers(1, 5),
    keep_every=st.sampled_from([0, 1, 10, 20]),
)
def test_the_newest_and_the_lasting_stay(steps: set[int], saved: int, keep: int, keep_every: int) -> None:
    """Would catch the removal of the checkpoint just saved, of one that is newer, or of more than the policy says."""
    gone = set(outdated_steps(steps | {saved}, saved=saved, keep=keep, keep_every=keep_every))
    stay = (steps | {saved}) - gone
    older = sorted((step for step in steps if step < saved), reverse=True)
    assert saved in stay and {step for step in steps if step > saved} <= stay
    assert set(older[: keep - 1]) <= stay
    assert {step for step in older if keep_every and step % keep_every == 0} <= stay
    expected = {step for step in older[keep - 1 :] if not (keep_every and step % keep_every == 0)}
    assert gone == expected


def test_the_only_good_checkpoint_is_never_removed(tmp_path: Path) -> None:
    """The one just saved is known to be good; damaged ones before it may count as kept, but never instead of it."""
    for step in (2, 4, 6):
        flip(save(tmp_path, step) / WHOLE)
    save(tmp_path, 5)
    remove_outdated(str(tmp_path), saved=5, keep=1, keep_every=0)
    assert saved_steps(str(tmp_path)) == [6, 5]
    assert whole_checkpoint(CheckpointPlace(folder=tmp_path)) == 5


def wait_for(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def uploads(folder: Path) -> list[tuple[int, bool]]:
    """(step, whether it failed)"""
    path = folder / UPLOADS
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [(line["step"], bool(line["problem"])) for line in lines]


def test_checkpoints_are_copied_while_training_goes_on_and_after_its_end(tmp_path: Path, s3_bucket: str) -> None:
    """By the same policy as on the disk.  Would catch a store that fills up, a last checkpoint that a preempted pod
    takes with it, half-uploaded ones that are never removed, and one that is copied again at each start."""
    place = CheckpointPlace(folder=tmp_path / "cache", store=f"{s3_bucket}/k.resume")
    config = training_config(checkpoints_kept=2, keep_every_steps=4, save_interval_steps=2)
    storage.write_bytes(f"{place.store}/ba1/by-attempt-dead/state.pt", b"half")
    with pytest.raises(PlatformError, match="killed"), uploading(place, config, "sft"):
        for step in (2, 4, 6, 8):
            save(place.folder, step)
            wait_for(lambda step=step: storage.is_committed(f"{place.store}/ba{step}"))
            remove_outdated(str(place.folder), saved=step, keep=2, keep_every=4)
        save(place.folder, 10)
        raise PlatformError("rank 1", found="killed")
    assert saved_steps(place.store) == [10, 8, 4]
    assert sorted(storage.list_folders(place.store)) == ["ba10", "ba4", "ba8"]
    assert uploads(place.folder) == [(step, False) for step in (2, 4, 6, 8, 10)]
    shutil.rmtree(place.folder)
    assert whole_checkpoint(place) == 10  # another machine
    with uploading(place, config, "sft"):
        save(place.folder, 12)
        wait_for(lambda: storage.is_committed(f"{place.store}/ba12"))
    assert uploads(place.folder) == [(12, False)]
    assert unfinished_trainings(s3_bucket) == ["k"]
    for uri in (str(place.folder), place.store):
        remove_all_but_lasting(uri, config.keep_every_steps)
    assert saved_steps(place.store) == [12, 8, 4]
    remove_all_but_lasting(place.store, 0)
    assert storage.list_files(s3_bucket) == []


def test_a_checkpoint_that_is_removed_while_it_is_copied_arrives(
    tmp_path: Path, s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training saves faster than the store takes.  Would catch copies that are given up each time, so that none ever
    arrives."""
    place = CheckpointPlace(folder=tmp_path, store=f"{s3_bucket}/k.resume")
    upload = storage.upload_committed

    def slow(folder: Path, uri: str) -> None:
        shutil.rmtree(tmp_path / "ba2", ignore_errors=True)
        upload(folder, uri)

    monkeypatch.setattr(storage, "upload_committed", slow)
    save(tmp_path, 2)
    with uploading(place, CONFIG, "sft"):
        wait_for(lambda: storage.is_committed(f"{place.store}/ba2"))
    assert uploads(tmp_path) == [(2, False)]


class Busy(BaseHTTPRequestHandler):
    """Says 503 to everything."""

    def handle_request(self) -> None:
        """One request."""
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response_only(503)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_PUT = do_HEAD = handle_request  # names of http.server


@pytest.fixture
def busy_endpoint() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Busy)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("fault", ["down", "busy", "denied", "no bucket"])
def test_a_store_that_fails_costs_warnings_only(
    tmp_path: Path,
    s3_bucket: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    busy_endpoint: str,
    fault: str,
) -> None:
    """An endpoint that is not there or overloaded (503), no right to write, a bucket that is gone: said, recorded,
    tried again, and once the store works the newest checkpoint is in it.  Would catch a thread that dies of an error
    and copies nothing ever after, and training that ends for it."""
    import boto3

    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(train_upload, "_WAIT_SECONDS", (0.05, 0.1))
    bucket = s3_bucket.removeprefix("s3://")
    place = CheckpointPlace(folder=tmp_path, store=f"{s3_bucket}/k.resume")
    endpoint = os.environ["AWS_ENDPOINT_URL_S3"]
    storage._client.cache_clear()
    if fault == "no bucket":
        boto3.client("s3").delete_bucket(Bucket=bucket)
    elif fault in ("down", "busy"):
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9" if fault == "down" else busy_endpoint)
    else:
        policy = {"Effect": "Deny", "Principal": "*", "Action": "s3:PutObject", "Resource": f"arn:aws:s3:::{bucket}/*"}
        boto3.client("s3").put_bucket_policy(
            Bucket=bucket, Policy=json.dumps({"Version": "2012-10-17", "Statement": [policy]})
        )
    with uploading(place, CONFIG, "sft"):
        save(tmp_path, 2)
        wait_for(lambda: len(uploads(tmp_path)) >= 2)
        assert all(failed for _, failed in uploads(tmp_path))
        save(tmp_path, 4)
        storage._client.cache_clear()
        if fault == "no bucket":
            boto3.client("s3").create_bucket(Bucket=bucket)
        elif fault in ("down", "busy"):
            monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
            storage._client.cache_clear()
        else:
            boto3.client("s3").delete_bucket_policy(Bucket=bucket)
        wait_for(lambda: storage.is_committed(f"{place.store}/ba4"))
    printed = capsys.readouterr().out
    reason = {
        "down": "object store: ",
        "busy": "object store: ",
        "denied": "access denied",
        "no bucket": "no such object or bucket",
    }[fault]
    assert f"sft: WARNING: the checkpoint of step 2 is on this machine only ({place.store}/ba2" in printed
    assert reason in printed
    storage._client.cache_clear()
