"""A clip on its whole way: manifest, validation, shards, root, drawing.  Its times count from its own start."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from molmo2core.evaluation.drawing import draw_example
from molmo2core.examples import Example
from molmo2core.manifest.measure import measure_file
from molmo2core.manifest.rules import CheckedRow, find_problems
from molmo2core.manifest.schema import Measured, example_from_row, parse_row, row_from_line, row_to_json
from molmo2core.manifest.validate import _measured_row
from molmo2core.preprocessing.config import PreprocessingConfig, VisualGeometry
from molmo2core.preprocessing.lengths import root_bound
from molmo2core.preprocessing.root import build_root
from molmo2core.shards.encoding import example_from_sample, sample_from_example
from molmo2core.shards.writer import sample_lengths
from molmo2core.storage import read_bytes
from molmo2core.testing.tiny_tokenizer import tiny_tokenizer
from molmo2core.testing.video_files import encode_video, level_frame

GEOMETRY = VisualGeometry(crop_size=54, patch_size=6, overlap_margins=(1, 1))
CONFIG = PreprocessingConfig(max_frames=16)


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six seconds at ten frames per second; frame k shows the number k."""
    path = tmp_path_factory.mktemp("film") / "film.mp4"
    path.write_bytes(encode_video([level_frame(number) for number in range(60)], rate=10, options={"g": "15"}))
    return path


def validated(film: Path, media: dict[str, Any], annotation: dict[str, Any]) -> Example:
    """The example of a row that passes validation."""
    content = {
        "id": "a", "split": "train", "license": "CC0-1.0", "source": "test", "annotations": [annotation],
        "media": {"kind": "video", "files": [film.name]} | media,
    }  # fmt: skip
    row = row_from_line(str(film.parent / "films.jsonl"), 1, json.dumps(content).encode())
    parsed = parse_row(row)  # type: ignore[arg-type]
    facts = measure_file(film.read_bytes(), "video")
    assert find_problems(CheckedRow(row=parsed, files=(facts,))) == []
    (address,) = parsed.media.files
    clean = _measured_row(parsed, {address: facts}, {address: "0" * 64})
    assert isinstance(clean.measured, Measured)
    read = row_from_line(str(film.parent / "films.jsonl"), 1, row_to_json(clean))
    example = example_from_row(read, read_bytes)  # type: ignore[arg-type]
    sample = sample_from_example(example, sample_lengths(example, tiny_tokenizer()))
    again = example_from_sample(sample | {"media": b"".join(sample["media"])})  # type: ignore[arg-type]
    assert again == example
    return again


def shown_numbers(example: Example) -> list[int]:
    root = build_root(example, geometry=GEOMETRY, config=CONFIG, tokenizer=tiny_tokenizer())
    tokens, crops = root_bound(
        "video", example.media.sizes, example.media.duration_seconds, 99, GEOMETRY, CONFIG, fps=example.media.fps
    )
    assert crops == len(root.crops) and len(root.ids) <= tokens
    return [round((float(crop[60].mean()) - 20) / 3) for crop in root.crops]


CAPTION = {"task": "video_caption", "text": "x"}


@pytest.mark.parametrize(
    ("clip", "duration", "shown"),
    [
        (None, 6.0, [0, 5, 10, 15, 20, 25, 30, 35, 40, 45, 50, 55, 59]),
        ((0.0, 1.0), 1.0, [0, 5, 10]),
        ((2.0, 3.2), 1.2, [20, 25, 30, 32]),
        ((2.04, 2.09), 0.05, [20, 20]),
        ((4.9, 6.0), 1.1, [49, 54, 59, 59]),
        ((5.5, 6.0004), 0.5, [55, 59]),  # a rounded end
    ],
)
def test_frames_of_a_clip(film: Path, clip: tuple[float, float] | None, duration: float, shown: list[int]) -> None:
    """The clip's own start and last instant; catches stamps of the file, and sampling to the file's end."""
    media = {} if clip is None else {"clip": {"start": clip[0], "end": clip[1]}}
    example = validated(film, media, CAPTION)
    assert (example.media.duration_seconds, example.media.fps) == (duration, 10.0)
    assert shown_numbers(example) == shown


def test_times_of_a_clip(film: Path) -> None:
    """Stamps, subtitles and tracks count from the clip's start."""
    positions = [{"time": k / 2, "x": 0.5, "y": 0.5} for k in range(3)]
    tracking = {
        "task": "tracking", "label": "dog", "sampling_fps": 2.0, "tracks": [{"object_id": 1, "positions": positions}]
    }  # fmt: skip
    media = {"clip": {"start": 3.0, "end": 4.5}, "subtitles": [{"start": 0.0, "end": 1.0, "text": "hello"}]}
    example = validated(film, media, tracking)
    tokenizer = tiny_tokenizer()
    root = build_root(example, geometry=GEOMETRY, config=CONFIG, tokenizer=tokenizer)
    text = tokenizer.decode([token for token in root.ids.tolist() if token < tokenizer.special.im_start])
    # 10 frames per second are the most that is allowed, and all annotated times are among them
    assert "0.0  0.1  0.2 " in text and " 1.4 " in text and text.endswith("subtitle\n0.0 - 1.0 hello\n")
    assert [round((float(crop[60].mean()) - 20) / 3) for crop in root.crops] == list(range(30, 45))


def test_drawing_shows_the_clip(film: Path) -> None:
    example = validated(film, {"clip": {"start": 3.0, "end": 4.5}}, CAPTION)
    pictures = draw_example(example, example.annotations[0], "")
    assert pictures[0].caption == "0.0 s" and pictures[-1].caption == "1.5 s"
    with Image.open(io.BytesIO(pictures[0].jpeg)) as picture:
        grey = float(np.asarray(picture)[-40:, -40:].mean())
    assert abs(grey - (20 + 3 * 30)) < 8
