"""What the model sees of a pack, taken apart again for a person: from the arrays that training gets, not beside them.

    LoadedPack -> PackView: examples -> branches -> tokens, and pictures rebuilt from the patches

Roles follow from the loss weights: a token that some position is trained to predict is `reply`, another one of a branch
`prompt`, everything shared `root`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from molmo2core.annotations import Annotation
from molmo2core.drawing import Mark
from molmo2core.errors import DataError
from molmo2core.examples import ROOT, BoolArray, ByteArray, Deviation, Example, IntArray, TokenizedExample
from molmo2core.loading.dataset import LoadedPack, PlacedExample
from molmo2core.message_tree.attention_rule import allowed
from molmo2core.packing.config import PackingConfig
from molmo2core.preprocessing.config import STYLES, VisualGeometry
from molmo2core.preprocessing.frame_times import sampled_times, tracking_grid
from molmo2core.preprocessing.image import choose_tiling
from molmo2core.preprocessing.lengths import root_bound
from molmo2core.preprocessing.points import ParsedPoint, parse_tags
from molmo2core.preprocessing.preprocessor import Preprocessor
from molmo2core.preprocessing.styles import style_of
from molmo2core.shards.lengths import SampleLengths
from molmo2core.shards.reader import ExampleReader
from molmo2core.special_tokens import TextTokenizer

Role = Literal["root", "prompt", "reply"]

MASK_ROWS = 384
"""Rows and columns of the picture of an attention mask at most."""
_SAME_TIME_SECONDS = 0.051
"""Times in replies are written in tenths."""
_WHOLE = (0.0, 0.0, 1.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class TokenView:
    """Equal tokens that follow each other."""

    text: str
    id: int
    count: int
    role: Role
    position: int
    """Of the first."""
    weight: float
    """Loss weight of predicting it; 0: not trained."""
    is_only_target: bool = False
    """The end of a branch: predicted, but never an input."""


@dataclass(frozen=True, kw_only=True)
class BranchView:
    """One branch of a message tree."""

    number: int
    """Its subsegment id, less that of its document."""
    annotation: int
    """Number of the annotation in its example."""
    task: str
    style: str
    """Name under which the released models know the task (preprocessing/styles.py)."""
    turns: tuple[tuple[Role, str], ...]
    """Texts by turns, special tokens visible, the end that is only a target included."""
    tokens: tuple[TokenView, ...]
    positions: tuple[int, int]
    """First and last."""
    num_tokens: int
    num_targets: int
    weights: tuple[float, ...]
    """Different loss weights of its targets."""
    total_weight: float
    unseen: tuple[str, ...]
    """Points of the reply at a time or image that is not shown."""


@dataclass(frozen=True, kw_only=True, eq=False)
class VisualView:
    """One crop or frame."""

    caption: str
    pixels: ByteArray
    """[crop_size, crop_size, 3]"""
    marks: tuple[Mark, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class ExampleView:
    """One example of a pack."""

    dataset: str
    uid: str
    sample: int
    epoch: int
    part: tuple[int, int] | None
    """Range of annotations, if the tree was cut."""
    medium: str
    """Kind and size of the medium, in words."""
    high_res: bool
    root: tuple[TokenView, ...]
    root_length: int
    branches: tuple[BranchView, ...]
    visuals: tuple[VisualView, ...]
    num_tokens: int
    num_crops: int
    bound: tuple[int, int]
    """Most tokens and crops, as planned with."""

    @property
    def name(self) -> str:
        """`dataset/uid`."""
        return f"{self.dataset}/{self.uid}"


@dataclass(frozen=True, kw_only=True, eq=False)
class PackView:
    """One pack."""

    title: str
    examples: tuple[ExampleView, ...]
    deviations: tuple[Deviation, ...]
    num_tokens: int
    num_crops: int
    loss_weight: float
    packing: PackingConfig
    mask: ByteArray
    """[rows, columns] share of keys that a query may attend to, 0..255; of evenly chosen queries."""


def view_pack(
    loaded: LoadedPack, title: str, *, packing: PackingConfig, reader: ExampleReader, preprocessor: Preprocessor
) -> PackView:
    """Take a pack apart.

    Args:
        loaded: by a PackDataset with this reader and preprocessor.
        title: what the pack is called.
        packing: budgets to hold it against.
        reader: of its examples.
        preprocessor: that made its tokens.
    """
    pack = loaded.pack
    return PackView(
        title=title,
        examples=tuple(_view_example(placed, reader, preprocessor) for placed in loaded.examples),
        deviations=loaded.deviations,
        num_tokens=len(pack.input_ids),
        num_crops=len(pack.crops),
        loss_weight=float(pack.loss_weights.sum(dtype=np.float64)),
        packing=packing,
        mask=mask_picture(pack.subsegment_ids, pack.is_visual),
    )


def mask_picture(subsegment_ids: IntArray, is_visual: BoolArray, side: int = MASK_ROWS) -> ByteArray:
    """The attention rule, at most `side` on each side: some queries, and shares of neighbouring keys.

    Returns:
        [rows, columns] uint8, 255 where a query may attend to all keys of the column.
    """
    length = len(subsegment_ids)
    edges = np.linspace(0, length, min(side, length) + 1).astype(np.int64)
    queries = (edges[:-1] + edges[1:]) // 2
    seen = allowed(subsegment_ids, is_visual, queries)
    shares = np.add.reduceat(seen, edges[:-1], axis=1, dtype=np.float32) / np.diff(edges)
    picture: ByteArray = np.round(255 * shares).astype(np.uint8)
    return picture


def _view_example(placed: PlacedExample, reader: ExampleReader, preprocessor: Preprocessor) -> ExampleView:
    example, tokenized = reader.example(placed.sample), placed.example
    drawn = preprocessor.draw(example, epoch=placed.epoch, branches=placed.branches)
    kept = drawn.branches[: len(tokenized.tasks)]  # an over-long pack lost the last ones
    is_root = tokenized.subsegment_ids == ROOT
    root_length = int(is_root.sum())
    shown = _shown(example, preprocessor, high_res=drawn.high_res)
    branches = [
        _view_branch(number, branch.number, branch.annotation, tokenized, preprocessor.tokenizer, shown)
        for number, branch in enumerate(kept)
    ]
    return ExampleView(
        dataset=example.dataset,
        uid=example.uid,
        sample=placed.sample,
        epoch=placed.epoch,
        part=placed.branches,
        medium=_medium(example),
        high_res=drawn.high_res,
        root=_tokens(tokenized.input_ids[is_root], 0, np.zeros(root_length), preprocessor.tokenizer, "root"),
        root_length=root_length,
        branches=tuple(view for view, _ in branches),
        visuals=_visuals(tokenized, shown, [mark for _, marks in branches for mark in marks], preprocessor.geometry),
        num_tokens=len(tokenized.input_ids),
        num_crops=len(tokenized.crops),
        bound=_bound(reader.lengths(placed.sample), placed, preprocessor),
    )


def _view_branch(
    number: int,
    annotation_number: int,
    annotation: Annotation,
    tokenized: TokenizedExample,
    tokenizer: TextTokenizer,
    shown: Sequence[_Shown],
) -> tuple[BranchView, list[ParsedPoint]]:
    """The branch, and the points of its replies."""
    own = tokenized.subsegment_ids == number
    ids = np.append(tokenized.input_ids[own], tokenizer.special.eos)
    weights = np.insert(tokenized.loss_weights[own], 0, 0.0)  # of each token as the target of the one before
    first = int(tokenized.position_ids[own][0])
    edges = np.flatnonzero(np.diff(weights > 0)) + 1
    turns: list[tuple[Role, str]] = [
        (
            "reply" if part_weights[0] > 0 else "prompt",
            tokenizer.backend.decode(part.tolist(), skip_special_tokens=False),
        )
        for part, part_weights in zip(np.split(ids, edges), np.split(weights, edges), strict=True)
    ]
    points = [point for role, text in turns if role == "reply" for tag in parse_tags(text) for point in tag.points]
    targets = weights[weights > 0]
    view = BranchView(
        number=number,
        annotation=annotation_number,
        task=annotation.task,
        style=style_of(annotation),
        turns=tuple(turns),
        tokens=_tokens(ids, first, weights, tokenizer, "prompt", ends=True),
        positions=(first, first + len(ids) - 2),
        num_tokens=len(ids) - 1,
        num_targets=len(targets),
        weights=tuple(sorted({round(float(weight), 6) for weight in targets})),
        total_weight=float(targets.sum(dtype=np.float64)),
        unseen=tuple(
            f"{point.object_id} at {point.index:g}" for point in points if not any(_is_on(point, s) for s in shown)
        ),
    )
    return view, points


def _tokens(
    ids: IntArray,
    first_position: int,
    weights: npt.NDArray[np.floating[Any]],
    tokenizer: TextTokenizer,
    other: Role,
    ends: bool = False,
) -> tuple[TokenView, ...]:
    """Runs of equal ids and weights; the last one stands alone if it `ends` a branch."""
    changes = (np.diff(ids) != 0) | (np.diff(weights) != 0)
    if ends:
        changes[-1] = True
    starts = [0, *(np.flatnonzero(changes) + 1).tolist()]
    return tuple(
        TokenView(
            text=_text_of(int(ids[start]), tokenizer),
            id=int(ids[start]),
            count=stop - start,
            role="reply" if weights[start] > 0 else other,
            position=first_position + start,
            weight=float(weights[start]),
            is_only_target=ends and stop == len(ids),
        )
        for start, stop in zip(starts, [*starts[1:], len(ids)], strict=True)
    )


def _text_of(token: int, tokenizer: TextTokenizer) -> str:
    """A token alone; one that is a part of a character has only the tokenizer's own name."""
    text = tokenizer.backend.decode([token], skip_special_tokens=False)
    return text if text and "\ufffd" not in text else tokenizer.backend.id_to_token(token) or f"[{token}]"


@dataclass(frozen=True, kw_only=True)
class _Shown:
    """Where one crop or frame is from."""

    caption: str
    index: float
    """Number of its image, from 1, or the time of its frame."""
    is_time: bool
    box: tuple[float, float, float, float]
    """Left, top, right, bottom in its image, as fractions."""


def _is_on(point: ParsedPoint, shown: _Shown) -> bool:
    return abs(point.index - shown.index) < (_SAME_TIME_SECONDS if shown.is_time else 0.5)


def _shown(example: Example, preprocessor: Preprocessor, *, high_res: bool) -> list[_Shown]:
    """All crops and frames of an example in order, from what was measured of its medium."""
    media, config, geometry = example.media, preprocessor.config, preprocessor.geometry
    if media.kind == "video":
        grid_fps = tracking_grid(example.annotations)
        times = sampled_times(media.duration_seconds, config, fps=media.fps, grid_fps=grid_fps)
        return [_Shown(caption=f"{time:.1f} s", index=round(time, 1), is_time=True, box=_WHOLE) for time in times]
    shown = []
    for number, (width, height) in enumerate(media.sizes, 1):
        name = f"image {number}: " if len(media.sizes) > 1 else ""
        shown.append(_Shown(caption=f"{name}low resolution", index=number, is_time=False, box=_WHOLE))
        max_crops = config.image_crops(media.kind, high_res=high_res)
        rows, columns = choose_tiling(height, width, geometry, max_crops, config.thin_images)
        vertical, horizontal = _spans(rows, geometry), _spans(columns, geometry)
        for row, (top, bottom) in enumerate(vertical, 1):
            for column, (left, right) in enumerate(horizontal, 1):
                caption = f"{name}row {row} of {rows}, column {column} of {columns}"
                shown.append(_Shown(caption=caption, index=number, is_time=False, box=(left, top, right, bottom)))
    return shown


def _spans(count: int, geometry: VisualGeometry) -> list[tuple[float, float]]:
    """Begin and end of each of `count` overlapping crops along one side, as fractions of it."""
    margin = sum(geometry.overlap_margins)
    step = geometry.grid - margin
    side = count * step + margin
    return [(step * number / side, (step * number + geometry.grid) / side) for number in range(count)]


def _visuals(
    tokenized: TokenizedExample, shown: Sequence[_Shown], points: Sequence[ParsedPoint], geometry: VisualGeometry
) -> tuple[VisualView, ...]:
    if len(shown) != len(tokenized.crops):
        raise DataError(
            tokenized.uid, found=f"{len(tokenized.crops)} crops", expected=f"{len(shown)}, from its measured size"
        )
    return tuple(
        VisualView(
            caption=place.caption,
            pixels=crop_pixels(crop, geometry),
            marks=tuple(
                Mark(
                    x=(point.x - place.box[0]) / (place.box[2] - place.box[0]),
                    y=(point.y - place.box[1]) / (place.box[3] - place.box[1]),
                    radius=0.03,
                    name=str(point.object_id),
                )
                for point in points
                if _is_on(point, place)
                and place.box[0] <= point.x <= place.box[2]
                and place.box[1] <= point.y <= place.box[3]
            ),
        )
        for place, crop in zip(shown, tokenized.crops, strict=True)
    )


def crop_pixels(crop: ByteArray, geometry: VisualGeometry) -> ByteArray:
    """[P, D] patches -> [crop_size, crop_size, 3]: inverse of preprocessing.image.patches."""
    grid, size = geometry.grid, geometry.patch_size
    return crop.reshape(grid, grid, size, size, 3).transpose(0, 2, 1, 3, 4).reshape(grid * size, grid * size, 3)


def _medium(example: Example) -> str:
    media = example.media
    sizes = ", ".join(f"{width} x {height}" for width, height in media.sizes)
    match media.kind:
        case "none":
            return "text only"
        case "video":
            subtitles = f", {len(media.subtitles)} subtitle lines" if media.subtitles else ""
            return f"video {sizes}, {media.duration_seconds:.2f} s at {media.fps:.2f} fps{subtitles}"
        case "image":
            return f"image {sizes}"
        case "images":
            return f"{len(media.sizes)} images {sizes}"


def _bound(lengths: SampleLengths, placed: PlacedExample, preprocessor: Preprocessor) -> tuple[int, int]:
    """Most tokens and crops of these branches, from the columns of the shard."""
    config = preprocessor.config
    tokens, crops = root_bound(
        lengths.kind,
        lengths.sizes,
        lengths.duration_seconds,
        lengths.subtitle_tokens,
        preprocessor.geometry,
        config,
        high_res=placed.dataset in config.high_res.datasets,
        fps=lengths.fps,
        grid_fps=lengths.grid_fps,
    )
    first, stop = placed.branches or (0, len(lengths.branch_tokens))
    column = STYLES.index(config.style)
    return tokens + sum(bounds[column] for bounds in lengths.branch_tokens[first:stop]), crops
