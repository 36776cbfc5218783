"""Strict parsing of manifest rows: what is refused, with which words, and what survives unchanged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from molmo2core.annotations import MEDIA_OF_TASK
from molmo2core.errors import DataError
from molmo2core.examples import ManifestRow
from molmo2core.manifest.rules import RULES
from molmo2core.manifest.schema import (
    ParsedRow,
    example_from_row,
    inspect_row,
    media_address,
    parse_row,
    read_manifest,
    row_from_line,
    row_to_json,
)

TEXT = {"task": "text", "turns": [{"role": "user", "text": "Hi"}, {"role": "assistant", "text": "Hello"}]}
ROW: dict[str, Any] = {
    "id": "a",
    "split": "train",
    "media": {"kind": "none", "files": []},
    "annotations": [TEXT],
    "license": "CC0-1.0",
    "source": "test",
}


def row(**changes: Any) -> ManifestRow:
    return ManifestRow(dataset="d", line=7, content=ROW | changes)


@pytest.mark.parametrize(
    ("changes", "rule", "words"),
    [
        ({"splt": "train"}, "unknown_key", ("splt", "did you mean 'split'?")),
        ({"media": {"kind": "none", "fils": []}}, "unknown_key", ("media.fils", "'files'")),
        ({"annotations": [TEXT | {"turn": []}]}, "unknown_key", ("annotations[0].turn", "'turns'")),
        (
            {"annotations": [{"task": "image_pointing", "label": "x", "points": [{"x": 0.1, "y": 0.1, "tim": 1}]}]},
            "unknown_key",
            ("annotations[0].points[0].tim", "'time'"),
        ),
        ({"annotations": [{"task": "image_qq"}]}, "unknown_task", ("annotations[0].task", "image_qq", "'image_qa'")),
        ({"annotations": [{"turns": []}]}, "missing_key", ("annotations[0].task",)),
        ({"annotations": [{"task": "image_qa", "question": "?"}]}, "missing_key", ("annotations[0].answer",)),
        ({"annotations": [{"task": "image_qa", "question": "?", "answer": 3}]}, "wrong_value", ("answer", "3")),
        ({"annotations": [{"task": "text", "turns": [{"role": "tool", "text": "x"}]}]}, "wrong_value", ("role",)),
        ({"split": "dev"}, "wrong_value", ("split", "dev", "train")),
        ({"media": {"kind": "audio"}}, "wrong_value", ("media.kind", "audio")),
        ({"media": {"kind": "image", "files": "x.jpg"}}, "wrong_value", ("media.files", "x.jpg")),
        ({"id": 5}, "wrong_value", ("id", "5")),
        ({"annotations": {}}, "wrong_value", ("annotations",)),
    ],
)
def test_structure_is_refused_with_field_found_and_expected(
    changes: dict[str, Any], rule: str, words: tuple[str, ...]
) -> None:
    """Silent conversion (\"5\" for 5) or a dropped unknown key would train on something else than was delivered."""
    problems = inspect_row(row(**changes))
    assert not isinstance(problems, ParsedRow)
    texts = [str(problem) for problem in problems if problem.rule == rule]
    assert any(all(word in text for word in words) for text in texts), list(map(str, problems))
    assert all(problem.rule in RULES for problem in problems)
    with pytest.raises(DataError, match="d:7"):
        parse_row(row(**changes))


@pytest.mark.parametrize(
    "line",
    [b"{", b"[1]", b"3", b'{"id": NaN}', b'{"id": "\xff"}', b"[" * 100_000, b'{"a": 1} {"b": 2}'],
    ids=["cut", "list", "number", "NaN", "not UTF-8", "too deep", "two objects"],
)
def test_lines_that_are_no_json_object(line: bytes, tmp_path: Path) -> None:
    found = row_from_line("m.jsonl", 1, line)
    assert not isinstance(found, ManifestRow) and found.rule == "json"
    (tmp_path / "m.jsonl").write_bytes(b'{"fine": 1}\n' + line + b"\n")
    with pytest.raises(DataError, match=r"m\.jsonl:2"):
        list(read_manifest(str(tmp_path / "m.jsonl")))


def test_blank_lines_and_byte_order_mark_are_no_rows(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(ROW).encode() + b"\r\n\n  \n")
    (only,) = read_manifest(str(tmp_path / "m.jsonl"))
    assert (only.dataset, only.line) == ("m", 1)


def test_numbers_written_without_a_point_become_floats() -> None:
    points = [{"x": 0, "y": 1, "time": 2}]
    parsed = parse_row(row(annotations=[{"task": "video_pointing", "label": "x", "points": points}]))
    (point,) = parsed.annotations[0].points  # type: ignore[union-attr]
    assert (point.x, point.y, point.time) == (0.0, 1.0, 2.0) and isinstance(point.x, float)


@pytest.mark.parametrize(
    ("manifest", "name", "address"),
    [
        ("/a/manifests/x.jsonl", "../media/1.jpg", "/a/media/1.jpg"),
        ("s3://bucket/ws/manifests/x.jsonl", "../media/1.jpg", "s3://bucket/ws/media/1.jpg"),
        ("/a/x.jsonl", "/b/1.jpg", "/b/1.jpg"),
        ("/a/x.jsonl", "s3://b/1.jpg", "s3://b/1.jpg"),
        ("rel/x.jsonl", "1.jpg", "rel/1.jpg"),
    ],
)
def test_media_addresses(manifest: str, name: str, address: str) -> None:
    assert media_address(manifest, name) == address


def test_example_needs_a_validated_row() -> None:
    with pytest.raises(DataError, match="validate_data"):
        example_from_row(row(), lambda _: b"")
    media = {"kind": "image", "files": ["/m/1.jpg"]}
    caption = {"task": "image_caption", "text": "A circle."}
    measured = {"sizes": [[4, 3]], "sha256": ["0"]}
    example = example_from_row(row(media=media, annotations=[caption], measured=measured), lambda name: name.encode())
    assert example.media.files == (b"/m/1.jpg",) and example.media.sizes == ((4, 3),)
    assert (example.uid, example.dataset, example.split) == ("a", "d", "train")


def test_parsed_row_survives_writing() -> None:
    parsed = parse_row(row())
    assert parse_row(ManifestRow(dataset="d", line=7, content=json.loads(row_to_json(parsed)))) == parsed


def manifest_page() -> str:
    return (Path(__file__).parents[2] / "docs" / "manifest.md").read_text()


def examples_on_page() -> list[dict[str, Any]]:
    blocks = manifest_page().split("```json\n")[1:]
    return [json.loads(block.split("```")[0]) for block in blocks]


def test_documentation_shows_a_valid_row_for_every_task() -> None:
    """The page that users copy from must not drift from the parser."""
    rows = [inspect_row(ManifestRow(dataset="docs", line=n, content=c)) for n, c in enumerate(examples_on_page())]
    assert all(isinstance(parsed, ParsedRow) for parsed in rows), [r for r in rows if not isinstance(r, ParsedRow)]
    tasks = {annotation.task for parsed in rows if isinstance(parsed, ParsedRow) for annotation in parsed.annotations}
    assert tasks == set(MEDIA_OF_TASK)


def test_documentation_lists_every_rule() -> None:
    page = manifest_page()
    missing = [rule for rule, says in RULES.items() if f"| `{rule}` | {says} |" not in page]
    assert not missing, missing
