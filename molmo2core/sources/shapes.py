"""A real corpus that we make: coloured shapes, still and moving, with ground truth known exactly.

    python -m molmo2core.sources.shapes --output FOLDER [--seed N] [--images N] [--videos N] ...

Writes what a user with own data would write (docs/manifest.md): `manifests/<dataset>.jsonl` for seven datasets and
the media that they name, `media/images/*.jpg` and `media/videos/*.mp4`; and a tokenizer trained on the texts.
Every medium belongs to one dataset and one split.  Everything follows from the seed and the position of a medium in
its dataset; nothing depends on the order of work.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from molmo2core import storage
from molmo2core.annotations import Annotation, MediaKind, Pointing, Tracking
from molmo2core.errors import DataError, exit_with_message
from molmo2core.examples import Split, Subtitle
from molmo2core.sources import shapes_annotations as texts
from molmo2core.sources.config import ShapesConfig
from molmo2core.sources.shapes_render import draw, encode_jpeg, encode_mp4
from molmo2core.sources.shapes_scene import (
    SET_IMAGE_SIZES,
    random_appearing_scene,
    random_moving_scene,
    random_scene,
)
from molmo2core.sources.shapes_tokenizer import save_tokenizer, train_tokenizer

FORMAT = 2
"""Changes whenever the same configuration would render another corpus."""
LICENSE = "CC0-1.0"
DATASETS = ("captions", "image_qa", "image_pointing", "video_qa", "video_pointing", "tracking", "text")
"""One manifest each, one mixture group each."""
IMAGE_SHARES = {"captions": 0.2, "image_qa": 0.4, "image_pointing": 0.4}
IMAGE_SET_SHARES = {"image_qa": 0.5, "image_pointing": 0.5}
VIDEO_SHARES = {"captions": 0.2, "video_qa": 0.3, "video_pointing": 0.25, "tracking": 0.25}
SHORT_VIDEO_SECONDS, VIDEO_SECONDS = (2.0, 4.0), (2.0, 6.0)


@dataclass(frozen=True, kw_only=True)
class RenderedRow:
    """One manifest row and its media, before they are written."""

    kind: MediaKind
    files: tuple[bytes, ...] = ()
    subtitles: tuple[Subtitle, ...] = ()
    annotations: Sequence[Annotation]


@dataclass(frozen=True, kw_only=True)
class PlannedRow:
    """A row to be rendered: `index` counts the rows that `make` makes."""

    dataset: str
    split: Split
    make: Callable[[np.random.Generator, int], RenderedRow]
    index: int

    @property
    def id(self) -> str:
        """Unique in the corpus."""
        return f"{self.make.__name__}-{self.index:06d}"


def make_corpus(folder: Path | str, config: ShapesConfig) -> bool:
    """Render the corpus into `folder`, local or `s3://`, which becomes visible whole or not at all.

    Returns:
        Whether it was rendered; False when it was already there.

    Raises:
        PlatformError: the folder cannot be written.
        DataError: something else, or the corpus of another configuration, already stands there.
    """
    uri = str(folder)
    there = storage.is_committed(uri)
    if not there and storage.is_remote(uri):
        with tempfile.TemporaryDirectory() as rendered:
            make_corpus(Path(rendered) / "corpus", config)
            _upload(Path(rendered) / "corpus", uri)
    elif not there:
        storage.commit_folder(uri, lambda attempt: _fill(attempt, config))
    meta = storage.open_committed(uri).meta
    if meta != _meta(config):
        raise DataError(
            uri,
            found=f"the corpus of {meta}",
            expected=str(_meta(config)),
            mend="choose another workspace, or remove the folder if nothing needs it",
        )
    return not there


def plan_rows(config: ShapesConfig) -> list[PlannedRow]:
    """Every row of the corpus: per dataset and kind, the first 80 % train, then 10 % validation, 10 % test."""
    makers: list[tuple[str, Callable[[np.random.Generator, int], RenderedRow], int]] = []
    for dataset, number in _shared_out(config.images, IMAGE_SHARES).items():
        makers.append((dataset, {"captions": image_caption, "image_qa": image_qa}.get(dataset, image_pointing), number))
    for dataset, number in _shared_out(config.image_sets, IMAGE_SET_SHARES).items():
        makers.append((dataset, {"image_qa": image_set_qa}.get(dataset, image_set_pointing), number))
    video_makers = {
        "captions": video_caption,
        "video_qa": video_qa,
        "video_pointing": video_pointing,
        "tracking": tracking,
    }
    for dataset, number in _shared_out(config.videos, VIDEO_SHARES).items():
        makers.append((dataset, video_makers[dataset], number))
    makers.append(("text", text, config.texts))
    return [
        PlannedRow(dataset=dataset, split=_split(index, number), make=maker, index=index)
        for dataset, maker, number in makers
        for index in range(number)
    ]


def image_caption(rng: np.random.Generator, index: int) -> RenderedRow:
    """An image with its caption."""
    scene = random_scene(rng)
    return RenderedRow(kind="image", files=(encode_jpeg(draw(scene)),), annotations=texts.image_captions(scene, rng))


def image_qa(rng: np.random.Generator, index: int) -> RenderedRow:
    """An image with several questions."""
    scene = random_scene(rng, most=3)
    return RenderedRow(kind="image", files=(encode_jpeg(draw(scene)),), annotations=texts.image_questions(scene, rng))


def image_pointing(rng: np.random.Generator, index: int) -> RenderedRow:
    """An image with several labels to point at; every sixteenth file lies on its side with an EXIF orientation."""
    scene = random_scene(rng)
    jpeg = encode_jpeg(draw(scene), exif_rotated=index % 16 == 1)
    return RenderedRow(kind="image", files=(jpeg,), annotations=texts.image_points(scene, rng))


def image_set_qa(rng: np.random.Generator, index: int) -> RenderedRow:
    """2-5 images with questions about the set."""
    scenes = [random_scene(rng, SET_IMAGE_SIZES, most=2) for _ in range(int(rng.integers(2, 6)))]
    files = tuple(encode_jpeg(draw(scene)) for scene in scenes)
    return RenderedRow(kind="images", files=files, annotations=texts.image_set_questions(scenes, rng))


def image_set_pointing(rng: np.random.Generator, index: int) -> RenderedRow:
    """2-5 images with labels to point at in all of them."""
    scenes = [random_scene(rng, SET_IMAGE_SIZES, most=2) for _ in range(int(rng.integers(2, 6)))]
    files = tuple(encode_jpeg(draw(scene)) for scene in scenes)
    return RenderedRow(kind="images", files=files, annotations=texts.image_set_points(scenes, rng))


def video_caption(rng: np.random.Generator, index: int) -> RenderedRow:
    """A video and what moves in it."""
    scene = random_moving_scene(rng, durations=VIDEO_SECONDS)
    return RenderedRow(kind="video", files=(encode_mp4(scene),), annotations=texts.video_captions(scene))


def video_qa(rng: np.random.Generator, index: int) -> RenderedRow:
    """A video with questions; every third has subtitles that some of the questions need."""
    scene = random_moving_scene(rng, durations=VIDEO_SECONDS)
    subtitles, about_subtitles = texts.subtitles_and_questions(scene, rng) if index % 3 == 0 else ((), [])
    annotations = [*texts.video_questions(scene, rng), *about_subtitles]
    b_frames = 2 if index % 4 == 1 else 0
    return RenderedRow(
        kind="video", files=(encode_mp4(scene, b_frames=b_frames),), subtitles=subtitles, annotations=annotations
    )


def video_pointing(rng: np.random.Generator, index: int) -> RenderedRow:
    """A video in which things appear; every eighth file has a display matrix that turns it."""
    scene = random_appearing_scene(rng, durations=VIDEO_SECONDS)
    rotation = (90, 270, 180)[index // 8 % 3] if index % 8 == 0 else 0
    return RenderedRow(
        kind="video", files=(encode_mp4(scene, rotation=rotation),), annotations=texts.video_points(scene, rng)
    )


def tracking(rng: np.random.Generator, index: int) -> RenderedRow:
    """A video with things to follow; every eighth file has a variable frame rate."""
    scene = random_moving_scene(rng, durations=SHORT_VIDEO_SECONDS, variable_rate=index % 8 == 0)
    return RenderedRow(kind="video", files=(encode_mp4(scene),), annotations=texts.video_tracks(scene, rng))


def text(rng: np.random.Generator, index: int) -> RenderedRow:
    """A conversation without a medium."""
    return RenderedRow(kind="none", annotations=texts.conversation(rng))


def _upload(corpus: Path, uri: str) -> None:
    """Copy the files to the addresses that recipes name, `corpus/tokenizer` for one, then the marker.

    commit_folder would put them under an address of its own, so that writers of different content cannot mix; two
    writers of one corpus write the same bytes.
    """
    names = [name for name in storage.list_files(str(corpus)) if name != storage.MARKER]

    def copy(name: str) -> None:
        storage.write_bytes(storage.join(uri, name), (corpus / name).read_bytes())

    with ThreadPoolExecutor(max_workers=8) as pool:
        for _ in tqdm(pool.map(copy, names), desc="upload", total=len(names), unit="file", delay=2.0, file=sys.stderr):
            pass
    copy(storage.MARKER)


def _fill(folder: Path, config: ShapesConfig) -> dict[str, Any]:
    for name in ("manifests", "media/images", "media/videos"):
        (folder / name).mkdir(parents=True)
    lines: dict[str, list[str]] = {}
    said: list[str] = []
    for row in tqdm(plan_rows(config), desc="shapes corpus", unit="row", mininterval=1.0, file=sys.stderr):
        rng = np.random.default_rng([config.seed, zlib.crc32(row.id.encode())])
        rendered = row.make(rng, row.index)
        lines.setdefault(row.dataset, []).append(json.dumps(_written(folder, row, rendered)))
        said += _texts(rendered)
    for dataset, rows in lines.items():
        (folder / "manifests" / f"{dataset}.jsonl").write_text("\n".join(rows) + "\n")
    save_tokenizer(train_tokenizer(said, config.vocab_size), folder / "tokenizer")
    return _meta(config)


def _meta(config: ShapesConfig) -> dict[str, Any]:
    return {"format": FORMAT, "config": dataclasses.asdict(config)}


def _written(folder: Path, row: PlannedRow, rendered: RenderedRow) -> dict[str, Any]:
    """Write the media of a row; return its manifest row."""
    place, suffix = ("videos", "mp4") if rendered.kind == "video" else ("images", "jpg")
    names = []
    for number, content in enumerate(rendered.files, 1):
        ending = f"-{number}" if rendered.kind == "images" else ""
        name = f"media/{place}/{row.id}{ending}.{suffix}"
        (folder / name).write_bytes(content)
        names.append(f"../{name}")
    media: dict[str, Any] = {"kind": rendered.kind, "files": names}
    if rendered.subtitles:
        media["subtitles"] = [dataclasses.asdict(subtitle) for subtitle in rendered.subtitles]
    return {
        "id": row.id,
        "split": row.split,
        "media": media,
        "annotations": [_without_defaults(annotation) for annotation in rendered.annotations],
        "license": LICENSE,
        "source": f"molmo2core.sources.shapes {FORMAT}",
        "generator": "",
    }


def _without_defaults(value: Any) -> Any:
    """A dataclass as JSON, fields that have their default left out, as a person would write it."""
    if isinstance(value, tuple):
        return [_without_defaults(item) for item in value]
    if not dataclasses.is_dataclass(value):
        return value
    fields = ((field, getattr(value, field.name)) for field in dataclasses.fields(value))
    return {field.name: _without_defaults(item) for field, item in fields if item != field.default}


def _texts(rendered: RenderedRow) -> Iterator[str]:
    """Everything that the tokenizer should know of a row: strings, and coordinates as they will be written."""
    yield "user\nassistant\n"
    for annotation in rendered.annotations:
        yield from _strings(_without_defaults(annotation))
        if isinstance(annotation, Pointing):
            yield f'Point to <points coords="1 1 500 250;2 2 500 250">{annotation.label}</points> There are none.'
            yield f"Counting the {annotation.label} shows a total of 1."
        if isinstance(annotation, Tracking):
            yield f'<tracks coords="0.5 1 500 250;1.0 1 500 250">{annotation.label}</tracks>'
    for subtitle in rendered.subtitles:
        yield f"subtitle\n{subtitle.text}"


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)


def _shared_out(number: int, shares: dict[str, float]) -> dict[str, int]:
    """`number` split by `shares`, largest remainders first; nobody gets none while there is enough for all."""
    exact = {name: number * share for name, share in shares.items()}
    given = {name: max(int(value), min(1, number // len(shares))) for name, value in exact.items()}
    by_need = sorted(exact, key=lambda name: given[name] - exact[name])
    while sum(given.values()) < number:
        given[by_need[0]] += 1
        by_need = sorted(exact, key=lambda name: given[name] - exact[name])
    while sum(given.values()) > number:
        given[max(given, key=lambda name: given[name] - exact[name])] -= 1
    return given


def _split(index: int, number: int) -> Split:
    held_out = max(1, round(number * 0.1)) if number >= 2 else 0
    if index >= number - held_out:
        return "test"
    return "validation" if number >= 3 and index >= number - 2 * held_out else "train"


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    defaults = ShapesConfig()
    parser = argparse.ArgumentParser(prog="python -m molmo2core.sources.shapes", description=main.__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder to make")
    for field in dataclasses.fields(ShapesConfig):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=int, default=getattr(defaults, field.name))
    options = vars(parser.parse_args(arguments))
    output = options.pop("output")
    try:
        make_corpus(output, ShapesConfig(**options))
    except Exception as error:
        return exit_with_message(error)
    print(f"shapes corpus: {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
