"""Whole deliveries: every kind of bad input is quarantined with its reason, or stops the run with a clear message."""

from __future__ import annotations

import io
import json
import logging
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from molmo2core import storage
from molmo2core.errors import DataError
from molmo2core.examples import Example, ManifestRow
from molmo2core.manifest.config import DataConfig
from molmo2core.manifest.expectations import INDEX, QUANTITIES, run_suite
from molmo2core.manifest.measure import FileFacts, measure_file
from molmo2core.manifest.rules import RULES, CheckedRow, find_problems
from molmo2core.manifest.schema import example_from_row, parse_row, read_manifest
from molmo2core.preprocessing.config import PreprocessingConfig
from molmo2core.recipe.load import to_json
from molmo2core.recipe.sections import ValidateSection
from molmo2core.references import ManifestsRef, read_reference
from molmo2core.sources.config import ShapesConfig
from molmo2core.sources.shapes import DATASETS
from molmo2core.stages import resolve, validate
from molmo2core.testing.tiny_corpus import tiny_corpus

Row = dict[str, Any]
TURNS = [{"role": "user", "text": "x"}, {"role": "assistant", "text": "x"}]
SMALL = ShapesConfig(images=15, image_sets=4, videos=12, texts=5)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("validate") / "corpus"
    tiny_corpus(folder)
    return folder


def section(workspace: Path | str, **data: Any) -> ValidateSection:
    config = DataConfig(**({"manifests": {}} | data))
    training, evaluation = PreprocessingConfig(), PreprocessingConfig(max_images=7)
    return ValidateSection(
        workspace=str(workspace), data=config, preprocessing_limits=training, evaluation_limits=evaluation
    )


def shapes_section(workspace: Path | str, **data: Any) -> ValidateSection:
    manifests = {name: f"corpus/manifests/{name}.jsonl" for name in DATASETS}
    return section(workspace, manifests=manifests, shapes=SMALL, **data)


def rows_of(corpus: Path, dataset: str) -> list[Row]:
    return [dict(row.content) for row in read_manifest(str(corpus / "manifests" / f"{dataset}.jsonl"))]


def write_manifest(path: Path, rows: list[Row | bytes]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\n".join(row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows) + b"\n")
    return str(path)


def quarantine_in(folder: str) -> list[Row]:
    return [json.loads(line) for line in storage.read_bytes(f"{folder}/quarantine.jsonl").splitlines()]


@pytest.mark.parametrize(("split", "fits"), [("train", 5), ("validation", 20), ("test", 20)])
def test_held_out_sets_may_be_as_large_as_evaluation_takes(corpus: Path, split: str, fits: int) -> None:
    """Five images in training, twenty at evaluation: neither may be measured by the other's limit."""
    row = next(row for row in rows_of(corpus, "image_pointing") if row["media"]["kind"] == "images")
    facts, found = FileFacts(size=(9, 9)), {}
    for count in (fits, fits + 1):
        media = row["media"] | {"files": row["media"]["files"][:1] * count}
        parsed = parse_row(ManifestRow(dataset="d", line=1, content=row | {"split": split, "media": media}))
        problems = find_problems(CheckedRow(row=parsed, files=(facts,) * count))
        found[count] = [problem for problem in problems if problem.rule == "too_many_images"]
    assert not found[fits] and len(found[fits + 1]) == 1


# --- one bad row for every rule -------------------------------------------------------------------------------------


def bad_rows(corpus: Path, folder: Path) -> dict[str, tuple[str, Row | bytes, str]]:
    """id -> (rule that it breaks, the row, words of the reason)."""
    image, video, images, talk = (
        next(row for row in rows_of(corpus, dataset) if row["media"]["kind"] == kind)
        for dataset, kind in (
            ("image_pointing", "image"),
            ("video_pointing", "video"),
            ("image_pointing", "images"),
            ("text", "none"),
        )
    )
    jpeg = Path(image["media"]["files"][0]).read_bytes()
    mp4 = Path(video["media"]["files"][0]).read_bytes()
    bomb = io.BytesIO()
    Image.new("1", (10_000, 8_999)).save(bomb, "PNG")
    contents = {
        "cut.jpg": jpeg[:-40],
        "cut.mp4": mp4[:-40],
        "zero.jpg": b"",
        "zero.mp4": b"",
        "bomb.png": bomb.getvalue(),
    }
    contents |= {"page.jpg": b"<html>404 not found</html>", "still.mp4": jpeg}
    folder.mkdir()
    for name, content in contents.items():
        (folder / name).write_bytes(content)

    def file(row: Row, name: str) -> Row:
        return row | {"media": row["media"] | {"files": [str(folder / name)]}}

    def point(row: Row, **values: Any) -> Row:
        fine = {"x": 0.5, "y": 0.5} | ({"time": 0.5} if row is video else {})
        label = {"task": row["annotations"][0]["task"], "label": "circle", "points": [fine | values]}
        return row | {"annotations": [label]}

    def tracks(*tracks: list[float], fps: float = 2.0, ids: tuple[int, ...] = (1, 2), form: str = "track") -> Row:
        listed = [
            {"object_id": number, "positions": [{"time": t, "x": 0.5, "y": 0.5} for t in times]}
            for number, times in zip(ids, tracks, strict=False)
        ]
        tracking = {"task": "tracking", "label": "x", "sampling_fps": fps, "tracks": listed, "form": form}
        return video | {"annotations": [tracking]}

    def clipped(row: Row, start: float, end: float) -> Row:
        return row | {"media": row["media"] | {"clip": {"start": start, "end": end}}}

    def captioned(**values: Any) -> Row:
        return video | {"annotations": [{"task": "video_caption", "text": "A circle."} | values]}

    def counted(row: Row = image, task: str = "image_counting", **values: Any) -> Row:
        return row | {"annotations": [{"task": task, "label": "circle", "points": [{"x": 0.5, "y": 0.5}]} | values]}

    def asked(**values: Any) -> Row:
        return image | {"annotations": [{"task": "image_qa", "question": "Which?", "answer": "red"} | values]}

    def said(*roles: str) -> Row:
        return talk | {"annotations": [{"task": "text", "turns": [{"role": role, "text": "x"} for role in roles]}]}

    caption = {"task": "image_caption", "text": "A circle."}
    subtitle = {"start": 1.0, "end": 0.5, "text": "x"}
    long_set, longer_set = (images["media"] | {"files": image["media"]["files"] * count} for count in (6, 8))
    cases: dict[str, tuple[str, Row | bytes, str]] = {
        "not json": ("json", b'{"id": "not json", ', "not JSON"),
        "unknown key": ("unknown_key", image | {"splitt": "train"}, "did you mean 'split'?"),
        "missing key": ("missing_key", {k: v for k, v in image.items() if k != "license"}, "license: missing"),
        "wrong value": ("wrong_value", image | {"split": "dev"}, '"dev"'),
        "unknown task": ("unknown_task", image | {"annotations": [{"task": "image_point"}]}, "'image_pointing'"),
        "nothing": ("no_annotations", image | {"annotations": []}, "at least one"),
        "wrong medium": ("task_of_medium", video | {"annotations": [caption]}, "'image_caption' on media"),
        "two files": ("number_of_files", image | {"media": long_set | {"kind": "image"}}, "6 files"),
        "too many": ("too_many_images", images | {"split": "train", "media": long_set}, "at most 5"),
        "too many to test": ("too_many_images", images | {"split": "test", "media": longer_set}, "at most 7"),
        "gone": ("missing_file", file(image, "gone.jpg"), "gone.jpg: no such file"),
        "zero-byte image": ("empty_file", file(image, "zero.jpg"), "no bytes"),
        "zero-byte video": ("empty_file", file(video, "zero.mp4"), "no bytes"),
        "truncated jpeg": ("broken_file", file(image, "cut.jpg"), "truncated"),
        "truncated mp4": ("broken_file", file(video, "cut.mp4"), "truncated"),
        "web page": ("broken_file", file(image, "page.jpg"), "a web page"),
        "still": ("broken_file", file(video, "still.mp4"), "still picture"),
        "bomb": ("oversized_file", file(image, "bomb.png"), "10000 x 8999"),
        "blank": ("empty_text", asked(question="  "), "annotations[0].question"),
        "control token": ("special_token", asked(question="a<|im_end|>b"), "<|im_end|>"),
        "no such option": ("options", asked(options=["blue", "green"]), '"red"'),
        "same options": ("options", asked(options=["red", "red"]), "different options"),
        "shouted style": ("style", asked(style="Chart QA"), '"Chart QA"'),
        "part of an image": ("caption_part", image | {"annotations": [caption | {"start": 1.0}]}, "video_caption"),
        "motion of an image": ("caption_part", image | {"annotations": [caption | {"kind": "motion"}]}, "'motion'"),
        "ends before it starts": ("caption_part", captioned(start=1.0, end=0.5), "start < end"),
        "ends without a start": ("caption_part", captioned(end=0.5), "start < end"),
        "part with a kind": ("caption_part", captioned(start=0.5, kind="motion"), "long or transcript"),
        "words of an instant": ("caption_part", captioned(start=0.5, kind="transcript"), "end of the words"),
        "no object": ("caption_part", captioned(kind="object"), "a label with kind object"),
        "label of nothing": ("caption_part", captioned(label="dog"), "a label with kind object"),
        "count of pointing": ("count", counted(task="image_pointing", count_form="count"), "a task of counting"),
        "count with points": ("count", counted(count=1), "or count_form 'count'"),
        "another count": ("count", counted(count_form="count", count=3), "1, the number of points"),
        "less than none": ("count", counted(count_form="count", count=-1, points=[]), "0 or more"),
        "assistant first": ("turn_order", said("assistant", "user"), "user, assistant"),
        "user last": ("turn_order", said("user", "assistant", "user"), "user, assistant"),
        "two lines of system": (
            "turn_order",
            talk | {"annotations": [{"task": "text", "turns": [{"role": "system", "text": "a\nb"}, *TURNS]}]},
            "one line",
        ),
        "system alone": ("turn_order", said("system"), "user, assistant"),
        "pixels": ("point_outside", point(image, x=640.0, y=0.5), "looks like pixels"),
        "percent": ("point_outside", point(image, x=64.0), "divide by 100"),
        "left of the image": ("point_outside", point(image, x=-0.2), "(-0.2, 0.5)"),
        "no radius": ("radius", point(image, radius=0.0), "radius"),
        "image 9": ("image_number", point(images, image=9), "image: 9"),
        "time on an image": ("point_time", point(image, time=1.0), "on an image"),
        "no time": ("point_time", point(video, time=None), "time: missing"),
        "too late": ("time_outside", point(video, time=99.0), "99 s; expected 0 to"),
        "caption too late": ("time_outside", captioned(start=0.5, end=99.0), "annotations[0].end: 99 s"),
        "too early": ("time_outside", point(video, time=-0.5), "-0.5 s"),
        "clip of an image": ("clip", clipped(image, 0.0, 1.0), "a clip of media of kind 'image'"),
        "clip backwards": ("clip", clipped(video, 1.0, 1.0), "0 <= start < end"),
        "clip before the start": ("clip", clipped(video, -0.5, 1.0), "start -0.5, end 1"),
        "clip beyond the end": ("clip", clipped(video, 0.5, 99.0), "the length of the video"),
        "time beyond the clip": ("time_outside", clipped(point(video, time=0.8), 0.5, 1.0), "0 to 0.5 s"),
        "back in time": ("track_order", tracks([1.0, 0.5]), "[1.0, 0.5]"),
        "twice at once": ("track_order", tracks([0.5, 0.5]), "[0.5, 0.5]"),
        "same object": ("object_ids", tracks([0.5], [1.0], ids=(3, 3)), "object_id 3 2 times"),
        "no rate": ("sampling_fps", tracks([0.5], fps=0.0), "above 0"),
        "between the samples": ("sampling_grid", tracks([0.25, 0.75]), "1 / 2 s"),
        "two single points": ("single_point", tracks([0.5], [1.0], form="single_point"), "2 tracks"),
        "subtitle": ("subtitles", video | {"media": video["media"] | {"subtitles": [subtitle]}}, "start < end"),
        "no subtitles": (
            "subtitles",
            video | {"annotations": [{"task": "subtitle_qa", "question": "Who?", "answer": "Ada"}]},
            "at least one line",
        ),
        "licence": ("license", image | {"license": "all rights reserved"}, "all rights reserved"),
        "distilled": ("generator", image | {"generator": "GPT-4o"}, "'gpt'"),
    }
    return {
        name: (rule, row if isinstance(row, bytes) else row | {"id": name}, words)
        for name, (rule, row, words) in cases.items()
    } | {
        "twice": ("duplicate_id", image | {"id": "fine"}, "also in line 1"),
        "leak": ("split_leak", image | {"id": "leak"}, "which is in split test"),
    }  # fmt: skip


@pytest.fixture(scope="module")
def validated(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, tuple[str, Any, str]]]:
    """A delivery of one good row and one bad row for each rule, validated once."""
    folder = tmp_path_factory.mktemp("bad")
    bad = bad_rows(corpus, folder / "media")
    fine = next(row for row in rows_of(corpus, "image_qa") if row["media"]["kind"] == "image") | {"id": "fine"}
    leaked = bad["leak"][1]
    assert isinstance(leaked, dict)
    media = folder / "copy-of-the-leaked-medium.jpg"
    media.write_bytes(Path(leaked["media"]["files"][0]).read_bytes())
    held_out = leaked | {"id": "held out", "split": "test", "media": {"kind": "image", "files": [str(media)]}}
    manifests = {
        "bad": write_manifest(folder / "bad.jsonl", [fine, *(row for _, row, _ in bad.values())]),
        "held": write_manifest(folder / "held.jsonl", [held_out, fine | {"id": "other"}]),
    }
    config = section(
        folder / "ws",
        manifests=manifests,
        max_quarantined_fraction=1.0,
        allowed_licenses=("CC0-1.0",),
    )
    validate.run(config, output=folder / "ref.json")
    return read_reference(folder / "ref.json", ManifestsRef).uri, bad


def test_every_bad_row_is_quarantined_for_its_own_reason_and_no_other(
    validated: tuple[str, dict[str, tuple[str, Any, str]]],
) -> None:
    """One row per rule; a rule that also fires elsewhere, or a reason that names nothing, fails here."""
    uri, bad = validated
    found = {row["line"]: row for row in quarantine_in(uri)}
    wrong = []
    for line, (name, (rule, delivered, words)) in enumerate(bad.items(), 2):
        row = found.pop(line, None)
        reasons = " | ".join(row["reasons"]) if row else ""
        if row is None or row["rules"] != [rule] or words not in reasons:
            wrong.append((name, rule, row and row["rules"], reasons))
        elif not isinstance(delivered, bytes):
            assert row["content"]["annotations"] == delivered["annotations"]  # as delivered, nothing lost
    assert not wrong, wrong
    assert not found, found


def test_there_is_a_bad_row_for_every_rule(validated: tuple[str, dict[str, tuple[str, Any, str]]]) -> None:
    assert {rule for rule, _, _ in validated[1].values()} == set(RULES)


def test_delivered_rows_are_clean_or_quarantined(validated: tuple[str, dict[str, tuple[str, Any, str]]]) -> None:
    uri, bad = validated
    summary = json.loads(storage.read_bytes(f"{uri}/summary.json"))
    clean = [row.content["id"] for name in ("bad", "held") for row in read_manifest(f"{uri}/{name}.jsonl")]
    assert clean == ["fine", "held out", "other"]  # keep-first, and the held-out side of a leak stays
    assert summary["rows"] == len(bad) + 3 == summary["clean"] + summary["quarantined"]
    assert summary["quarantined"] == len(bad) == sum(1 for _ in quarantine_in(uri))


def test_data_docs_open_without_a_network(validated: tuple[str, dict[str, tuple[str, Any, str]]]) -> None:
    docs = Path(validated[0]) / "data_docs"
    pages = {page: page.read_text() for page in docs.rglob("*.html")}
    assert len(pages) >= 3
    for page, text in pages.items():
        assert not re.search(r"https?://|<script|<img", text), page
        for target in re.findall(r'href="([^"#]+)"', text):
            assert (page.parent / target).is_file(), (page, target)
    front = pages[docs / "index.html"]
    assert "point_outside" in front and "looks like pixels" in front
    results = next(text for page, text in pages.items() if "validations" in str(page))
    assert "✖" in results and "✔" in results


# --- the stage ------------------------------------------------------------------------------------------------------


def test_shapes_corpus_is_rendered_validated_and_reused(tmp_path: Path) -> None:
    config = shapes_section(tmp_path / "ws")
    first = validate.run(config, output=tmp_path / "ref.json")
    reference = read_reference(tmp_path / "ref.json", ManifestsRef)
    assert not first.reused and first.metrics["quarantined"] == 0
    assert set(reference.datasets) == set(DATASETS)
    assert reference.facts["datasets"]["image_qa"]["train"] > 0
    assert any("data_docs/index.html" in line for line in first.lines)
    assert Path(reference.uri, "data_docs/index.html").is_file()

    examples = [
        example_from_row(row, storage.read_bytes)
        for name in reference.datasets
        for row in read_manifest(f"{reference.uri}/{name}.jsonl")
    ]
    assert len(examples) == first.metrics["rows"]
    assert_measured_as_displayed(examples)

    again = validate.run(config, output=tmp_path / "again.json")
    assert again.reused
    assert read_reference(tmp_path / "again.json", ManifestsRef).digest == reference.digest

    (tmp_path / "ws").rename(tmp_path / "moved")  # a workspace can be moved: same key, media still found
    moved = validate.run(shapes_section(tmp_path / "moved"), output=tmp_path / "moved.json")
    assert moved.reused
    for row in read_manifest(f"{read_reference(tmp_path / 'moved.json', ManifestsRef).uri}/tracking.jsonl"):
        assert example_from_row(row, storage.read_bytes).media.files


def assert_measured_as_displayed(examples: list[Example]) -> None:
    """Sizes after EXIF and video rotation: the turned video of the corpus is wider or higher than it is stored."""
    turned = next(example for example in examples if example.uid == "video_pointing-000000")
    import av

    with av.open(io.BytesIO(turned.media.files[0])) as container:
        stream = container.streams.video[0]
        frame = next(container.decode(stream))
        assert frame.rotation in (90, -90)
        assert turned.media.sizes == ((stream.height, stream.width),)
    assert all(len(example.media.sizes) == len(example.media.files) for example in examples)
    assert all((example.media.duration_seconds > 0) == (example.media.kind == "video") for example in examples)


def test_key_follows_media_content_and_rules_of_the_recipe(corpus: Path, tmp_path: Path) -> None:
    """A medium replaced under the same name, or another limit, must not be answered with the old outcome."""
    rows = [row for row in rows_of(corpus, "image_qa") if row["media"]["kind"] == "image"][:3]
    for number, row in enumerate(rows):
        copy = tmp_path / f"{number}.jpg"
        copy.write_bytes(Path(row["media"]["files"][0]).read_bytes())
        row["media"] = {"kind": "image", "files": [copy.name]}
        row["split"] = "train"
    manifests = {"d": write_manifest(tmp_path / "d.jsonl", rows)}
    config = section(tmp_path / "ws", manifests=manifests, required_splits=("train",))
    keys = []
    for change in range(3):
        if change == 1:
            Image.new("RGB", (64, 64), "red").save(tmp_path / "0.jpg")
        if change == 2:
            config = replace(config, data=replace(config.data, allowed_licenses=("CC0-1.0",)))
        assert not validate.run(config, output=tmp_path / "ref.json").reused
        keys.append(read_reference(tmp_path / "ref.json", ManifestsRef).uri)
    assert len(set(keys)) == 3


def test_s3_workspace(s3_bucket: str, tmp_path: Path) -> None:
    config = shapes_section(f"{s3_bucket}/ws")
    validate.run(config, output=tmp_path / "ref.json")
    reference = read_reference(tmp_path / "ref.json", ManifestsRef)
    assert reference.uri.startswith(f"{s3_bucket}/ws/manifests/")
    row = next(iter(read_manifest(f"{reference.uri}/video_qa.jsonl")))
    assert row.content["media"]["files"][0].startswith(f"{s3_bucket}/ws/corpus/media/videos/")
    assert example_from_row(row, storage.read_bytes).media.files[0]
    assert validate.run(config, output=tmp_path / "ref.json").reused


# --- whole deliveries that are refused ------------------------------------------------------------------------------


def only(split: str) -> Callable[[Row], bool]:
    return lambda row: bool(row["split"] == split)


def test_missing_manifest(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.jsonl.*no manifest of dataset 'mine'.*data\.manifests"):
        validate.run(section(tmp_path, manifests={"mine": "nowhere.jsonl"}), output=tmp_path / "ref.json")


def test_empty_manifest(tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match="an empty manifest"):
        validate.run(section(tmp_path, manifests={"mine": "mine.jsonl"}), output=tmp_path / "ref.json")


@pytest.mark.parametrize("split", ["train", "test"])
def test_empty_split(split: str, corpus: Path, tmp_path: Path) -> None:
    rows: list[Row | bytes] = [row for row in rows_of(corpus, "text") if row["split"] != split]
    manifests = {"text": write_manifest(tmp_path / "text.jsonl", rows)}
    with pytest.raises(DataError, match=f"split {split}.*no good row"):
        validate.run(section(tmp_path, manifests=manifests), output=tmp_path / "ref.json")
    assert not (tmp_path / "ref.json").exists()


def test_dataset_without_training_rows(corpus: Path, tmp_path: Path) -> None:
    held_out: list[Row | bytes] = [row for row in rows_of(corpus, "text") if row["split"] == "test"]
    manifests = {
        "all": write_manifest(tmp_path / "all.jsonl", [*rows_of(corpus, "text")]),
        "rest": write_manifest(tmp_path / "rest.jsonl", held_out),
    }
    with pytest.raises(DataError, match="split train of dataset rest"):
        validate.run(section(tmp_path, manifests=manifests), output=tmp_path / "ref.json")


def test_too_many_refused_rows_name_reasons_and_keep_quarantine_and_docs(corpus: Path, tmp_path: Path) -> None:
    """The run stops, nothing is committed, and the user still finds what to correct."""
    rows: list[Row | bytes] = [*rows_of(corpus, "text"), b"{", b"{"]
    manifests = {"mine": write_manifest(tmp_path / "mine.jsonl", rows)}
    with pytest.raises(DataError) as caught:
        validate.run(section(tmp_path, manifests=manifests), output=tmp_path / "ref.json")
    message = str(caught.value)
    assert "2 of 7 rows refused" in message and "json (2)" in message and "at most 5%" in message
    assert f"({manifests['mine']})" in message and "line 6: json" in message and "column 2" in message
    assert "line 1" not in message, "that is the parser's count within the line"
    path = Path(re.search(r"(\S+quarantine\.jsonl)", message)[1])  # type: ignore[index]
    assert path.parent.name.endswith(".failed") and len(quarantine_in(str(path.parent))) == 2
    assert (path.parent / "data_docs" / "index.html").is_file()
    assert [p.name for p in (tmp_path / "manifests").iterdir()] == [path.parent.name]
    assert not storage.is_committed(str(path.parent)) and not (tmp_path / "ref.json").exists()


def test_tolerated_rows_are_told_made_or_reused(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A pipeline step shows what `run` prints: rows that were left out must not go unsaid there."""
    manifests = {"mine": write_manifest(tmp_path / "mine.jsonl", [*rows_of(corpus, "text"), b"{"])}
    tolerant = section(tmp_path, manifests=manifests)
    tolerant = replace(tolerant, data=replace(tolerant.data, max_quarantined_fraction=0.5, required_splits=("train",)))
    for how in ("made", "reused"):
        validate.run(tolerant, output=tmp_path / "ref.json")
        shown = capsys.readouterr().out
        assert "1 quarantined" in shown and "broken rules: json (1); see " in shown and f"validate_data: {how}" in shown


def test_command_line_prints_the_message_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "section.json").write_text(to_json(section(tmp_path, manifests={"mine": "nowhere.jsonl"})))
    assert validate.main(["--section", str(tmp_path / "section.json"), "--output", str(tmp_path / "ref.json")]) == 2
    assert capsys.readouterr().err.startswith("DataError: ")


@pytest.mark.parametrize("command", [validate.main, resolve.main])
def test_command_line_prints_a_message_before_any_trace(
    command: Callable[[list[str]], int],
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Also for what nobody foresaw, here a key that is computed wrongly."""

    def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr(validate, "read_delivered", fail)
    monkeypatch.setattr(resolve, "cut_sections", fail)
    (tmp_path / "section.json").write_text(to_json(section(tmp_path, manifests={})))
    recipe = str(Path(__file__).parents[2] / "workflows/recipes/tiny.yaml")
    first = ["--section", str(tmp_path / "section.json")] if command is validate.main else ["--recipe", recipe]
    assert command([*first, "--output", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.startswith("internal error: ZeroDivisionError: by zero")


# --- the suite and the measuring ------------------------------------------------------------------------------------


def frame_row(index: int, **values: Any) -> Row:
    return {INDEX: index, "dataset": "d"} | dict.fromkeys(RULES, 0) | {"num_annotations": 1} | values


def test_suite_finds_quantities_that_a_rule_overlooked(tmp_path: Path) -> None:
    """The limits are stated twice: a rule that is broken in code does not let pixels through as fractions."""
    rows = [frame_row(0, largest_coordinate=640.0), frame_row(1, seconds_beyond_end=1.0), frame_row(2), frame_row(3)]
    assert run_suite(rows, run_name="t", docs=tmp_path) == {0: ("point_outside",), 1: ("time_outside",)}
    assert {quantity.rule for quantity in QUANTITIES} <= set(RULES)


def test_suite_logs_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """KFP shows every message; lines of Great Expectations' longer ones looked like output of the stage."""
    caplog.set_level(logging.INFO)
    run_suite([frame_row(0)], run_name="t", docs=tmp_path)
    assert "\n" not in caplog.text.strip()


def test_suite_that_cannot_be_evaluated_is_no_verdict_on_data(tmp_path: Path) -> None:
    """Great Expectations reports a check that crashed as failed: it must stop the program, not quarantine rows."""
    with pytest.raises(RuntimeError):
        run_suite([frame_row(0), frame_row(1) | {"json": None}], run_name="t", docs=tmp_path / "null")
    with pytest.raises(RuntimeError):
        run_suite([frame_row(0), frame_row(0)], run_name="t", docs=tmp_path / "twice")
    with pytest.raises(RuntimeError):
        run_suite([], run_name="t", docs=tmp_path / "none")


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("kind", ["image", "video"])
def test_truncation_is_found_wherever_it_happens(kind: str, kept: float, corpus: Path) -> None:
    pattern = "videos/tracking*.mp4" if kind == "video" else "images/image_qa-*.jpg"
    for path in sorted((corpus / "media").glob(pattern))[:3]:
        content = path.read_bytes()
        assert not measure_file(content, kind).fault  # type: ignore[arg-type]
        cut = measure_file(content[: int(len(content) * kept)], kind)  # type: ignore[arg-type]
        assert cut.fault == "broken_file", (path.name, cut)
