"""The shapes corpus: covers every task, keeps splits apart, gives the same bytes, and its odd files are really odd."""

from __future__ import annotations

import io
import itertools
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import pytest
from av.video.frame import PictureType
from PIL import Image

from molmo2core.annotations import TASKS, Point, Pointing
from molmo2core.errors import DataError
from molmo2core.manifest.schema import ParsedRow, parse_row, read_manifest
from molmo2core.sources import shapes
from molmo2core.sources.config import ShapesConfig
from molmo2core.special_tokens import load_tokenizer
from molmo2core.storage import list_files, open_committed

CONFIG = ShapesConfig(images=60, image_sets=12, videos=60, texts=20)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shapes") / "corpus"
    shapes.make_corpus(folder, CONFIG)
    return folder


@pytest.fixture(scope="module")
def rows(corpus: Path) -> dict[str, list[ParsedRow]]:
    return {
        name: [parse_row(row) for row in read_manifest(str(corpus / "manifests" / f"{name}.jsonl"))]
        for name in shapes.DATASETS
    }


def everything(rows: dict[str, list[ParsedRow]]) -> Iterator[tuple[ParsedRow, Any]]:
    return ((row, annotation) for of_dataset in rows.values() for row in of_dataset for annotation in row.annotations)


def test_every_task_occurs_in_training(rows: dict[str, list[ParsedRow]]) -> None:
    """A task that is never rendered would leave its whole path unexercised by the dry run."""
    tasks = Counter(annotation.task for row, annotation in everything(rows) if row.split == "train")
    assert set(tasks) == set(TASKS)


def test_hard_cases_occur(rows: dict[str, list[ParsedRow]]) -> None:
    """None to point at, multiple choice, occlusion, exits, several turns, several annotations on one medium."""
    found: Counter[str] = Counter()
    for row, annotation in everything(rows):
        found["tree"] += len(row.annotations) > 1
        found["choice"] += bool(getattr(annotation, "options", ()))
        found["subtitles"] += bool(row.media.subtitles)
        if hasattr(annotation, "points"):
            found["none"] += not annotation.points
            found["several points"] += len(annotation.points) > 1
            found["second image"] += any(point.image > 1 for point in annotation.points)
        if hasattr(annotation, "tracks"):
            found["no track"] += not annotation.tracks
            found["several tracks"] += len(annotation.tracks) > 1
            for track in annotation.tracks:
                visible = [position.visible for position in track.positions]
                found["occlusion"] += False in visible
                found["exit"] += track.positions[-1].time + 1.5 < max(
                    position.time for other in annotation.tracks for position in other.positions
                )
        if hasattr(annotation, "turns"):
            found["several turns"] += len(annotation.turns) > 2
    exits = [a for _, a in everything(rows) if getattr(a, "category", "") == "leaves" and a.answer == "yes"]
    found["exit"] += len(exits)
    assert all(found.values()), found


def test_splits_share_no_medium_and_every_dataset_has_all(corpus: Path, rows: dict[str, list[ParsedRow]]) -> None:
    checksums = {name: facts["sha256"] for name, facts in open_committed(str(corpus)).files.items()}
    split_of: dict[str, str] = {}
    for of_dataset in rows.values():
        assert {row.split for row in of_dataset} == {"train", "validation", "test"}
        for row in of_dataset:
            for name in row.media.files:
                checksum = checksums[str(Path(name).relative_to(corpus))]
                assert split_of.setdefault(checksum, row.split) == row.split


def test_same_seed_same_bytes_other_seed_other_bytes(corpus: Path, tmp_path: Path) -> None:
    """Catches randomness from anywhere but the seed, B frames and multi-threaded encoders included."""
    shapes.make_corpus(tmp_path / "again", CONFIG)
    assert open_committed(str(tmp_path / "again")).files == open_committed(str(corpus)).files
    small = ShapesConfig(images=5, image_sets=2, videos=4, texts=2)
    shapes.make_corpus(tmp_path / "seed0", small)
    shapes.make_corpus(tmp_path / "seed1", ShapesConfig(**(vars(small) | {"seed": 1})))
    first, second = (open_committed(str(tmp_path / name)) for name in ("seed0", "seed1"))
    same = [name for name in first.files if first.files[name] == second.files.get(name)]
    assert not any(name.startswith("media") for name in same)


def test_corpus_is_reused_and_another_configuration_refused(tmp_path: Path) -> None:
    config = ShapesConfig(images=5, image_sets=2, videos=4, texts=2)
    assert shapes.make_corpus(tmp_path / "corpus", config) is True
    assert shapes.make_corpus(tmp_path / "corpus", config) is False
    with pytest.raises(DataError, match="another workspace"):
        shapes.make_corpus(tmp_path / "corpus", ShapesConfig(images=6, image_sets=2, videos=4, texts=2))


def test_some_videos_are_rotated_some_have_a_variable_rate_some_b_frames(corpus: Path) -> None:
    seen: Counter[str] = Counter()
    sizes, rates = set(), set()
    for name in list_files(str(corpus / "media" / "videos")):
        with av.open(str(corpus / "media" / "videos" / name)) as container:
            frames = list(container.decode(video=0))
            stream = container.streams.video[0]
            assert frames[0].pts == 0
            steps = {round((b.time or 0) - (a.time or 0), 4) for a, b in itertools.pairwise(frames)}
            seen["rotated"] += frames[0].rotation != 0
            seen["variable"] += max(steps) > 1.5 * min(steps)
            seen["b frames"] += any(frame.pict_type == PictureType.B for frame in frames)
            sizes.add((stream.width, stream.height))
            rates.add(stream.average_rate)
    assert seen["rotated"] and seen["variable"] and seen["b frames"], seen
    assert len(sizes) > 3 and len(rates) > 3


def test_some_images_lie_on_their_side_with_an_exif_orientation(corpus: Path) -> None:
    folder = corpus / "media" / "images"
    orientations = Counter(
        Image.open(io.BytesIO((folder / name).read_bytes())).getexif().get(0x0112, 1)
        for name in list_files(str(folder))
        if name.startswith("image_pointing")
    )
    assert orientations[6] and orientations[1]


def test_tokenizer_covers_every_byte_and_loads_in_transformers(corpus: Path) -> None:
    tokenizer = load_tokenizer(corpus / "tokenizer")
    text = "".join(map(chr, range(256))) + ' 日本語 🙂 <points coords="1 1 500 250">red circle</points>'
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.special.im_start == CONFIG.vocab_size
    digits = tokenizer.encode("1234")
    assert len(digits) == 4  # single digits, as in Qwen
    assert len(tokenizer.encode(" circle")) == 1  # words of the corpus are learnt

    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(str(corpus / "tokenizer"))
    assert theirs(text, add_special_tokens=False).input_ids == tokenizer.encode(text)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (tokenizer.special.bos, tokenizer.special.eos)
    assert theirs.pad_token_id == tokenizer.special.pad and theirs.padding_side == "left"


def test_tokenizer_learns_what_is_said_and_no_defaults() -> None:
    """A field added to the annotations must not take merges away from words that the model reads."""
    annotation = Pointing(task="image_counting", label="circle", points=(Point(x=0.5, y=0.5),))
    texts = list(shapes._texts(shapes.RenderedRow(kind="image", annotations=[annotation])))
    assert "circle" in texts and not any("point_then_count" in text for text in texts)


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--images", "5", "--image-sets", "2", "--videos", "4", "--texts", "2"]
    assert shapes.main(["--output", str(tmp_path / "corpus"), "--seed", "3", *sizes]) == 0
    assert json.loads((tmp_path / "corpus" / "_SUCCESS.json").read_text())["meta"]["config"]["seed"] == 3
    assert shapes.main(["--output", str(tmp_path / "corpus"), "--seed", "4", *sizes]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("DataError: ")
