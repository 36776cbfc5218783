"""What the corpus says is what the decoded pixels show."""

from __future__ import annotations

import io
from collections import Counter
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image, ImageOps

from molmo2core.annotations import Pointing, QuestionAnswer, Tracking
from molmo2core.manifest.schema import parse_row, read_manifest
from molmo2core.sources.config import ShapesConfig
from molmo2core.sources.shapes import make_corpus
from molmo2core.sources.shapes_scene import COLOURS

SEEDS = (0, 1)


@pytest.fixture(scope="module", params=SEEDS)
def corpus(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("truth") / "corpus"
    make_corpus(folder, ShapesConfig(seed=request.param, images=100, image_sets=20, videos=60, texts=2))
    return folder


def colour_at(picture: Image.Image, x: float, y: float) -> str:
    """The nearest named colour of the displayed pixel at fractions (x, y)."""
    pixel = np.array(picture.getpixel((min(int(x * picture.width), picture.width - 1),
                                       min(int(y * picture.height), picture.height - 1))))  # fmt: skip
    distances = {name: float(np.abs(np.array(rgb) - pixel).max()) for name, rgb in COLOURS.items()}
    nearest = min(distances, key=lambda name: distances[name])
    return nearest if distances[nearest] < 60 else f"none ({pixel})"


def displayed_frames(path: str) -> tuple[list[float], list[Image.Image]]:
    with av.open(path) as container:
        frames = list(container.decode(video=0))
    return [float(frame.time or 0) for frame in frames], [
        frame.to_image().rotate(frame.rotation, expand=True) if frame.rotation else frame.to_image() for frame in frames
    ]


def frame_at(times: list[float], frames: list[Image.Image], time: float) -> Image.Image:
    """The frame on the screen at `time`: the last that starts no later."""
    return frames[max(int(np.searchsorted(times, time + 1e-4, side="right")) - 1, 0)]


def test_points_lie_on_their_colour(corpus: Path) -> None:
    """Would catch swapped axes, forgotten EXIF or video rotation, a wrong frame for a time, a wrong image number."""
    checked: Counter[str] = Counter()
    for dataset in ("image_pointing", "video_pointing"):
        for row in map(parse_row, read_manifest(str(corpus / "manifests" / f"{dataset}.jsonl"))):
            if row.media.kind == "video":
                times, frames = displayed_frames(row.media.files[0])
            else:
                images = [
                    ImageOps.exif_transpose(Image.open(io.BytesIO(Path(f).read_bytes()))) for f in row.media.files
                ]
            for annotation in row.annotations:
                assert isinstance(annotation, Pointing)
                for point in annotation.points:
                    picture = images[point.image - 1] if point.time is None else frame_at(times, frames, point.time)
                    seen = colour_at(picture, point.x, point.y)
                    assert seen in COLOURS, (row.id, annotation.label, seen)
                    named = annotation.label.split()[0]
                    if named in COLOURS:
                        assert seen == named, (row.id, annotation.label)
                        checked[annotation.task] += 1
    assert min(checked[task] for task in ("image_pointing", "image_counting", "multi_image_pointing")) > 5
    assert checked["video_pointing"] > 5


def test_tracks_follow_their_colour_and_hidden_positions_are_hidden(corpus: Path) -> None:
    """Would catch drift between annotated and drawn motion, also in the variable-frame-rate files."""
    checked: Counter[str] = Counter()
    for row in map(parse_row, read_manifest(str(corpus / "manifests" / "tracking.jsonl"))):
        times, frames = displayed_frames(row.media.files[0])
        for annotation in row.annotations:
            assert isinstance(annotation, Tracking)
            named = annotation.label.split()[0]
            for track in annotation.tracks if named in COLOURS else ():
                for position in track.positions:
                    seen = colour_at(frame_at(times, frames, position.time), position.x, position.y)
                    if position.visible:
                        assert seen == named, (row.id, annotation.label, position)
                    checked["visible" if position.visible else "hidden"] += 1
                    checked["hidden and covered"] += not position.visible and seen != named
    assert checked["visible"] > 50
    assert checked["hidden and covered"] >= 0.5 * checked["hidden"] > 0  # the rest is hidden only at its rim


def test_colour_answers_are_the_only_such_colour_in_single_shape_images(corpus: Path) -> None:
    """The answer to a colour question is a colour that the image shows, over a large area."""
    asked = 0
    for row in map(parse_row, read_manifest(str(corpus / "manifests" / "image_qa.jsonl"))):
        if row.media.kind != "image":
            continue
        pixels = np.asarray(Image.open(row.media.files[0]), dtype=np.int64)
        for annotation in row.annotations:
            assert isinstance(annotation, QuestionAnswer)
            if annotation.category == "colour":
                near = np.abs(pixels - np.array(COLOURS[annotation.answer])).max(axis=-1) < 40
                assert near.mean() > 0.008, (row.id, annotation)
                asked += 1
    assert asked > 20
