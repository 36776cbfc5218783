"""Examples in, shards and side table, the same examples out."""

from __future__ import annotations

import dataclasses
import json
import pickle
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from molmo2core import storage
from molmo2core.annotations import (
    Caption,
    Point,
    Pointing,
    Track,
    Tracking,
    TrackPosition,
)
from molmo2core.errors import DataError
from molmo2core.examples import Example, Media, Subtitle
from molmo2core.preprocessing.branch_lengths import annotation_tokens_bounds
from molmo2core.preprocessing.lengths import subtitle_tokens
from molmo2core.preprocessing.seen_tracks import possibly_seen
from molmo2core.shards import encoding
from molmo2core.shards.encoding import (
    example_from_sample,
    frame_files,
    lengths_from_sample,
    sample_from_example,
    unframe_files,
)
from molmo2core.shards.lengths import FILE, decode_table, encode_table, read_table
from molmo2core.shards.reader import ExampleReader
from molmo2core.shards.writer import sample_lengths
from molmo2core.testing.tiny_examples import image_examples, text_examples, write_tiny_shards
from molmo2core.testing.tiny_tokenizer import tiny_tokenizer

VIDEO = Example(
    uid="v1",
    dataset="videos",
    split="train",
    media=Media(
        kind="video",
        files=(b"\x00\x01mp4\xff" * 50,),
        sizes=((320, 240),),
        duration_seconds=10.1 / 3,
        subtitles=(Subtitle(start=0.5, end=1.25, text='a "quoted" <line>\n'), Subtitle(start=2, end=3, text="ü")),
    ),
    annotations=(
        Caption(task="video_caption", text="a red circle"),
        Pointing(task="video_pointing", label="circle", points=(Point(x=0.1, y=1 / 3, time=0.5),)),
        Tracking(
            task="tracking",
            label="it",
            sampling_fps=2.0,
            tracks=(Track(object_id=3, positions=(TrackPosition(time=0.0, x=0.0, y=1.0, visible=False),)),),
        ),
    ),
)
IMAGES = Example(
    uid="set",
    dataset="videos",
    split="validation",
    media=Media(kind="images", files=(b"", b"jpeg", b"\xff" * 7), sizes=((1, 2), (3, 4), (5, 6))),
    annotations=(Pointing(task="multi_image_pointing", label="x", points=(Point(x=0, y=0, image=3),)),),
)


def sample_of(example: Example) -> dict[str, Any]:
    """As it is read again."""
    sample = sample_from_example(example, sample_lengths(example, tiny_tokenizer()))
    assert isinstance(sample["media"], tuple)
    return sample | {"media": b"".join(sample["media"])}


@pytest.mark.parametrize("example", [VIDEO, IMAGES, text_examples("t", 1)[0]])
def test_sample_keeps_every_byte_and_field(example: Example) -> None:
    """Catches re-encoding, lost subtitles, rounded times and lost files of a set."""
    sample = sample_of(example)
    assert example_from_sample(sample) == example
    assert lengths_from_sample(sample) == sample_lengths(example, tiny_tokenizer())


def test_damaged_sample_is_an_error_that_names_it() -> None:
    """Catches a media column that was cut short and is read as a shorter file."""
    sample = sample_of(VIDEO)
    deep = b"[" * 100_000
    for damaged in (
        {"media": sample["media"][:-1]},
        {"media": b"\x01"},
        {"meta": b"{"},
        {"meta": deep},
        {"annotations": b"[{}]"},
        {"annotations": deep},
    ):
        with pytest.raises(DataError, match=r"videos/v1|annotations"):
            example_from_sample(sample | damaged)
    for tokens in (None, [1], [["a"]]):
        with pytest.raises(DataError, match="videos/v1"):
            lengths_from_sample(sample | {"branch_tokens": tokens})


def test_frame_of_files_round_trips() -> None:
    """Catches offsets that ignore empty files or the header."""
    for files in ((), (b"",), (b"a", b"", b"bcd")):
        assert unframe_files(b"".join(frame_files(files))) == files


def test_oversized_example_is_refused_before_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches 32-bit offsets that wrap round silently."""
    monkeypatch.setattr(encoding, "MAX_SAMPLE_BYTES", 100)
    with pytest.raises(DataError, match="videos, example v1: 300 bytes of media; expected at most 100"):
        sample_of(VIDEO)


def test_written_splits_are_read_back_in_order(tmp_path: Path) -> None:
    """Catches order, split and boundary faults over several shards and datasets."""
    tests = image_examples("images", 5, split="test")
    images = image_examples("images", 40)
    texts = text_examples("texts", 9)
    refs = [write_tiny_shards([*images, *tests], str(tmp_path)), write_tiny_shards(texts, str(tmp_path))]
    assert refs[0].num_samples == {"train": 40, "test": 5}
    assert len(list(Path(refs[0].uri, "train").glob("*.mds"))) > 1
    reader = ExampleReader(refs, "train", tmp_path / "cache")
    assert [reader.example(index) for index in range(len(reader))] == [*images, *texts]
    assert reader.ranges == {"images": range(40), "texts": range(40, 49)}
    held_out = ExampleReader(refs, "test", tmp_path / "cache")  # texts have none: skipped, no error
    assert [held_out.example(index) for index in range(len(held_out))] == tests
    with pytest.raises(IndexError):
        reader.example(49)
    with pytest.raises(DataError, match="split validation: no samples"):
        ExampleReader(refs, "validation", tmp_path / "cache")


def test_side_table_tells_what_the_preprocessor_would(tmp_path: Path) -> None:
    """Catches columns out of step with the shards, and a duration rounded to float32 (other frames than planned)."""
    examples = [*image_examples("videos", 12), VIDEO]
    ref = write_tiny_shards(examples, str(tmp_path))
    table = read_table(storage.open_committed(ref.uri), "train")
    assert len(table) == 13
    index = json.loads(Path(ref.uri, "train", "index.json").read_text())
    assert table.shard_samples.tolist() == [shard["samples"] for shard in index["shards"]]
    for number, example in enumerate(examples):
        row = table.row(number)
        assert (row.uid, row.kind, row.sizes) == (example.uid, example.media.kind, example.media.sizes)
        assert row.duration_seconds == example.media.duration_seconds
        assert row.subtitle_tokens == subtitle_tokens(example.media, tiny_tokenizer())
        bounds = [
            [annotation_tokens_bounds(s, tiny_tokenizer()) for s in possibly_seen(a)] for a in example.annotations
        ]
        assert row.branch_tokens == tuple(tuple(map(max, zip(*seen, strict=True))) for seen in bounds)
    assert table.row(12).subtitle_tokens > 0
    assert np.all(np.diff(table.branch_offsets) > 0)


def test_same_examples_give_the_same_bytes(tmp_path: Path) -> None:
    """Catches timestamps in the side table: the digest must depend on content alone."""
    first, second = (write_tiny_shards(image_examples("a", 8), str(tmp_path / name)) for name in ("x", "y"))
    assert first.digest == second.digest


def test_shards_that_were_replaced_are_refused(tmp_path: Path) -> None:
    """Catches sample ids that silently mean other examples."""
    ref = write_tiny_shards(image_examples("a", 4), str(tmp_path))
    with pytest.raises(DataError, match="expected 0000"):
        ExampleReader([dataclasses.replace(ref, digest="0000")], "train", tmp_path)
    with pytest.raises(DataError, match="4 samples; expected 5"):
        ExampleReader([dataclasses.replace(ref, num_samples={"train": 5})], "train", tmp_path)


def _read_in_child(pickled: bytes) -> list[str]:
    reader = pickle.loads(pickled)
    return [reader.example(index).uid for index in range(len(reader))]


def test_reader_travels_to_worker_processes(tmp_path: Path) -> None:
    """Catches locks, threads or file handles inside the reader that do not survive a fork or pickling."""
    examples = image_examples("a", 10)
    reader = ExampleReader([write_tiny_shards(examples, str(tmp_path))], "train", tmp_path)
    reader.prefetch([0])
    with ProcessPoolExecutor(1, mp_context=get_context("fork")) as pool:
        assert pool.submit(_read_in_child, pickle.dumps(reader)).result(60) == [e.uid for e in examples]
    assert reader.example(3) == examples[3], "the child's end does not take the parent's shared memory along"


def test_s3_shards_are_cached_and_shared_by_readers(s3_bucket: str, tmp_path: Path) -> None:
    """Catches 'Reused local directory' for a second live reader of one cache, and downloads of the whole split."""
    images, texts = image_examples("images", 40), text_examples("texts", 5)
    refs = [write_tiny_shards(images, f"{s3_bucket}/ws"), write_tiny_shards(texts, f"{s3_bucket}/ws")]
    first = ExampleReader(refs, "train", tmp_path / "cache")
    assert first.example(0) == images[0]
    assert len(list((tmp_path / "cache" / refs[0].digest / "train").glob("*.mds"))) == 1, "only the shard in need"
    second = ExampleReader(refs, "train", tmp_path / "cache")
    second.prefetch(range(45))
    assert [second.example(index) for index in range(45)] == [*images, *texts]
    assert [first.example(index) for index in range(45)] == [*images, *texts]
    assert not list((tmp_path / "cache").rglob(".*mds")), "no attempt is left behind"


def test_a_damaged_side_table_is_refused(tmp_path: Path) -> None:
    """Whatever was done to the file.  Catches bounds that are believed without the checksum that was committed, and the
    dozen errors of zip, deflate and numpy that damage comes out as."""
    ref = write_tiny_shards(image_examples("a", 8), str(tmp_path))
    content = Path(ref.uri, "train", FILE).read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(300):
        start, stop = sorted(rng.integers(0, len(content), 2).tolist())
        damaged = content[:start] + rng.bytes(int(rng.integers(0, 40))) + content[stop:]
        with suppress(DataError):  # what it may also be is a table: in zip, some bytes mean nothing
            decode_table(damaged)
    with pytest.raises(DataError, match="no side table"):
        decode_table(content[: len(content) // 2])
    Path(ref.uri, "train", FILE).write_bytes(encode_table(read_table(storage.open_committed(ref.uri), "train")) + b"\0")
    with pytest.raises(DataError, match=r"lengths\.npz: another checksum"):
        read_table(storage.open_committed(ref.uri), "train")
