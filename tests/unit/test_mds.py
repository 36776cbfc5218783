"""Our MDS files beside those of streaming's own writer."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from streaming import MDSWriter, StreamingDataset

from molmo2core import storage
from molmo2core.errors import DataError
from molmo2core.examples import Example
from molmo2core.shards import mds
from molmo2core.shards.encoding import COLUMNS, lengths_from_sample, sample_from_example
from molmo2core.shards.index import FILE, encode_index, parse_index, shard_name
from molmo2core.shards.lengths import read_table
from molmo2core.shards.mds import file_checksum, write_shard
from molmo2core.shards.writer import sample_lengths
from molmo2core.testing.tiny_examples import image_examples, text_examples, write_tiny_shards
from molmo2core.testing.tiny_tokenizer import tiny_tokenizer


def samples_of(examples: Sequence[Example]) -> list[dict[str, Any]]:
    return [sample_from_example(example, sample_lengths(example, tiny_tokenizer())) for example in examples]


def write_theirs(folder: Path, columns: dict[str, str], samples: Sequence[dict[str, Any]]) -> None:
    writer = MDSWriter(out=str(folder), columns=columns, hashes=[mds.HASH], size_limit=None)
    for sample in samples:
        writer.write(sample)
    writer.finish()


def test_shard_and_index_are_those_of_streamings_writer(tmp_path: Path) -> None:
    """Catches an offset, column order, header or checksum that streaming's readers would take for something else."""
    samples = samples_of([*image_examples("a", 7), *text_examples("a", 5)])
    write_theirs(tmp_path / "theirs", COLUMNS, [sample | {"media": b"".join(sample["media"])} for sample in samples])
    entry = write_shard(tmp_path / "shard.mds", COLUMNS, samples)
    assert (tmp_path / "shard.mds").read_bytes() == (tmp_path / "theirs" / shard_name(0)).read_bytes()
    theirs = (tmp_path / "theirs" / FILE).read_bytes()
    assert encode_index([entry]) == theirs
    (parsed,) = parse_index(theirs, "theirs")
    assert (parsed.num_samples, parsed.checksum) == (12, file_checksum(tmp_path / "shard.mds"))


VALUES = {
    "b": st.binary(max_size=40),
    "s": st.text(st.characters(codec="utf-8"), max_size=20),
    "i": st.integers(-(2**63), 2**63 - 1),
    "f": st.floats(),
    "j": st.lists(st.lists(st.integers()), max_size=3),
}
ENCODINGS = {"b": "bytes", "s": "str", "i": "int", "f": "float64", "j": "json"}


@settings(max_examples=40, deadline=None)
@given(st.lists(st.fixed_dictionaries(VALUES), min_size=1, max_size=5))
def test_any_values_are_encoded_as_streaming_does(
    tmp_path_factory: pytest.TempPathFactory, samples: list[dict[str, Any]]
) -> None:
    """Catches empty values, extreme numbers and texts that are longer in bytes than in characters."""
    folder = tmp_path_factory.mktemp("mds")
    write_theirs(folder / "theirs", ENCODINGS, samples)
    write_shard(folder / "shard.mds", ENCODINGS, samples)
    assert (folder / "shard.mds").read_bytes() == (folder / "theirs" / shard_name(0)).read_bytes()


def test_no_other_encoding_and_no_wrong_type_is_written(tmp_path: Path) -> None:
    """Catches pickles, and a value that MDSWriter would let through because bytes bypass its encoders."""
    for columns, value in (
        ({"x": "pkl"}, {"a": 1}),
        ({"x": "pkl"}, b"a"),
        ({"x": "json"}, b"{"),
        ({"x": "str"}, b"a"),
        ({"x": "int"}, 1.5),
    ):
        with pytest.raises(TypeError):
            write_shard(tmp_path / "shard.mds", columns, [{"x": value}])  # type: ignore[dict-item]


def test_too_much_for_one_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches 32-bit offsets that wrap round."""
    monkeypatch.setattr(mds, "MAX_FILE_BYTES", 1000)
    with pytest.raises(DataError, match=r"3 samples of \d+ bytes; expected less than 1000"):
        write_shard(tmp_path / "shard.mds", {"x": "bytes"}, [{"x": bytes(300)}] * 3)
    assert not (tmp_path / "shard.mds").exists()


def test_streaming_itself_reads_columns_equal_to_the_side_table(tmp_path: Path) -> None:
    """Catches bounds that stand in the table alone, or differ between table and columns."""
    examples = [*image_examples("a", 25), *text_examples("b", 3)]
    ref = write_tiny_shards(examples, str(tmp_path))
    plain = StreamingDataset(local=ref.uri, split="train", batch_size=1, validate_hash=mds.HASH)
    table = read_table(storage.open_committed(ref.uri), "train")
    assert len(plain) == len(table) == 28
    assert len(plain.shards) > 1
    for number, example in enumerate(examples):
        sample = plain[number]
        assert set(sample) == set(COLUMNS)
        assert lengths_from_sample(sample) == table.row(number) == sample_lengths(example, tiny_tokenizer())
        assert sample["branch_tokens"] == [list(tokens) for tokens in table.row(number).branch_tokens]
    assert json.loads(Path(ref.uri, "train", FILE).read_text())["shards"][0]["column_encodings"].count("pkl") == 0


def test_an_index_of_another_layout_is_refused(tmp_path: Path) -> None:
    """Catches columns of the right names whose fixed sizes or order differ: each value would be read askew."""
    entry = write_shard(tmp_path / "shard.mds", COLUMNS, samples_of(text_examples("a", 2)))
    assert len(parse_index(encode_index([entry]), "x")) == 1
    swapped = [*reversed(entry["column_names"])]
    for change, words in (
        ({"column_sizes": [None] * len(COLUMNS)}, "column_sizes"),
        ({"column_names": swapped}, "column_names"),
        ({"version": 3}, "version 3; expected version 2"),
        ({"zip_data": {"basename": "../x", "bytes": 1, "hashes": {}}}, "zip_data"),
        ({"samples": 0}, "0 samples"),
        ({"samples": "2"}, "2 samples"),
        ({"further": 1}, "further 1; expected further None"),
    ):
        with pytest.raises(DataError, match=words):
            parse_index(encode_index([entry | change]), "x")
    for name in ("", ".", "..", FILE, "a/b", "../a", "/a", "a\\b", "a\0b", 7, None):
        damaged = entry | {"raw_data": entry["raw_data"] | {"basename": name}}
        content = json.dumps({"version": 2, "shards": [damaged]}).encode()
        with pytest.raises(DataError, match=r"file name|no index of MDS shards"):
            parse_index(content, "x")
    for content in (b"", b"[]", b'{"shards": 1}', b'{"shards": [1]}', b"\xff", b'{"version": 2}'):
        with pytest.raises(DataError, match="no index of MDS shards"):
            parse_index(content, "x")


def test_fields_of_lengths_are_all_stored() -> None:
    """Catches a new field of the side table that the columns do not carry."""
    (example,) = image_examples("a", 1)
    (sample,) = samples_of([example])
    row = sample_lengths(example, tiny_tokenizer())
    sample |= {"media": b"".join(sample["media"])}
    assert dataclasses.asdict(lengths_from_sample(sample)) == dataclasses.asdict(row)
