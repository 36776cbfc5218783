"""The root of a message tree: BOS, then the medium as the released models lay it out (model.md 4.2, 5.5, 5.6).

image    <low_res_im_start> <im_patch>.. <im_end> <im_start> (<im_patch>.. <im_col>).. <im_end>
images   Image 1 [image] Image 2 [image] ...         as text, only if there is more than one
video    0.0 <im_start> <im_patch>.. <im_end> 0.5 <im_start> ...    times as text; other layouts by `frame_layout`
         subtitle\\n0.0 - 1.5 words\\n ...            lines as text, whole lines up to the limit
none     nothing
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from molmo2core.errors import DataError
from molmo2core.examples import ByteArray, Example, IntArray, Media, Subtitle
from molmo2core.image_decoding import decode_image
from molmo2core.preprocessing.config import FrameLayout, PreprocessingConfig, VisualGeometry
from molmo2core.preprocessing.frame_times import sampled_times, shown_instants, tracking_grid
from molmo2core.preprocessing.image import (
    choose_tiling,
    image_crops,
    image_pooling,
    low_res_grid,
    pooled_grid,
)
from molmo2core.preprocessing.video import frame_grid, frame_patches, video_pooling
from molmo2core.special_tokens import SpecialTokens, TextTokenizer
from molmo2core.video_decoding import decode_frames

SUBTITLE_HEADER = "subtitle\n"
_SUBTITLE_REACH_SECONDS = 1.0
"""A line is kept if a sampled instant lies this near to it (`frame_1`, model.md 5.6)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Root:
    """Tokens and pixels that all branches share."""

    ids: IntArray
    """[R]"""
    crops: ByteArray
    """[C, P, D]"""
    pooling: IntArray
    """[V, K] indices into the C * P patches."""


def build_root(
    example: Example,
    *,
    geometry: VisualGeometry,
    config: PreprocessingConfig,
    tokenizer: TextTokenizer,
    high_res: bool = False,
) -> Root:
    """Decode the medium of `example` and lay it out.

    Args:
        example: of its annotations, only tracks count: they settle at which times a video is looked at.
        geometry: of crops and pooling.
        config: limits.
        tokenizer: for numbers, times and subtitles.
        high_res: a single image is cut into up to `config.high_res.max_crops` crops.

    Raises:
        DataError: the medium does not decode, or an image set is larger than `config.max_images`.
    """
    where, media = f"{example.dataset}/{example.uid}", example.media
    match media.kind:
        case "none":
            return _joined([], [], [], geometry, tokenizer)
        case "image" | "images":
            return _image_root(where, media, geometry, config, tokenizer, high_res)
        case "video":
            return _video_root(where, example, geometry, config, tokenizer)


def image_ids(tiling: tuple[int, int], geometry: VisualGeometry, special: SpecialTokens) -> IntArray:
    """Token ids of one image; no column tokens in the low-resolution view."""
    (low_rows, low_columns), (rows, columns) = low_res_grid(geometry), pooled_grid(tiling, geometry)
    low = np.full(low_rows * low_columns + 2, special.im_patch, np.int32)
    low[0], low[-1] = special.low_res_im_start, special.im_end
    lines = np.full((rows, columns + 1), special.im_patch, np.int32)
    lines[:, -1] = special.im_col
    start, end = np.array([special.im_start], np.int32), np.array([special.im_end], np.int32)
    return np.concatenate([low, start, lines.reshape(-1), end])


def video_ids(
    times: Sequence[float], layout: FrameLayout, geometry: VisualGeometry, tokenizer: TextTokenizer
) -> IntArray:
    """Token ids of the frames at `times` (seconds), each behind its time."""
    rows, columns = frame_grid(geometry)
    special = tokenizer.special
    patches = [special.im_patch] * (rows * columns)
    match layout:
        case "image_tokens":
            before, after = [special.im_start], [special.im_end]
        case "frame_tokens":
            before, after = [special.frame_start], [special.frame_end]
        case "frame_tokens_around_video":
            before, after = [], []
    frames = [
        token
        for number, time in enumerate(times)
        for token in (*tokenizer.encode_text(frame_text(number, time)), *before, *patches, *after)
    ]
    if layout == "frame_tokens_around_video":
        frames = [special.frame_start, *frames, special.frame_end]
    return np.array(frames, np.int32)


def frame_text(number: int, time: float) -> str:
    """What stands before a frame; the space ahead separates it from the frame before."""
    return f"{' ' if number else ''}{time:.1f} "


def image_text(number: int) -> str:
    """What stands before image `number` (from 1) of a set."""
    return f"Image {number}"


def subtitle_text(line: Subtitle) -> str:
    """One subtitle as a line of the root."""
    return f"{line.start:.1f} - {line.end:.1f} {line.text}\n"


def subtitle_ids(
    subtitles: Sequence[Subtitle], times: Sequence[float], max_tokens: int, tokenizer: TextTokenizer
) -> IntArray:
    """Header and the lines near a sampled instant, whole, in order, until one does not fit into `max_tokens`."""
    ids = tokenizer.encode_text(SUBTITLE_HEADER)
    header = len(ids)
    for line in subtitles:
        if not any(line.start - _SUBTITLE_REACH_SECONDS <= t <= line.end + _SUBTITLE_REACH_SECONDS for t in times):
            continue
        more = tokenizer.encode_text(subtitle_text(line))
        if len(ids) + len(more) > max_tokens:
            break
        ids += more
    return np.array(ids if len(ids) > header else [], np.int32)


def _image_root(
    where: str,
    media: Media,
    geometry: VisualGeometry,
    config: PreprocessingConfig,
    tokenizer: TextTokenizer,
    high_res: bool,
) -> Root:
    if not media.files:
        raise DataError(where, found="no image", expected="at least one")
    if len(media.files) > config.max_images:
        raise DataError(where, found=f"{len(media.files)} images", expected=f"at most {config.max_images}")
    max_crops = config.image_crops(media.kind, high_res=high_res)
    ids, crops, pooling = [], [], []
    for number, data in enumerate(media.files, 1):
        pixels = decode_image(data, f"{where} image {number}")
        tiling = choose_tiling(pixels.shape[0], pixels.shape[1], geometry, max_crops, config.thin_images)
        if len(media.files) > 1:
            ids.append(np.array(tokenizer.encode_text(image_text(number)), np.int32))
        ids.append(image_ids(tiling, geometry, tokenizer.special))
        crops.append(image_crops(pixels, tiling, geometry))
        pooling.append(image_pooling(tiling, geometry))
    return _joined(ids, crops, pooling, geometry, tokenizer)


def _video_root(
    where: str, example: Example, geometry: VisualGeometry, config: PreprocessingConfig, tokenizer: TextTokenizer
) -> Root:
    media = example.media
    if len(media.files) != 1:
        raise DataError(where, found=f"{len(media.files)} video files", expected="one")
    grid_fps = tracking_grid(example.annotations)
    times = sampled_times(media.duration_seconds, config, fps=media.fps, grid_fps=grid_fps)
    instants = [media.clip_start_seconds + time for time in shown_instants(times, config, media.fps)]
    crops = frame_patches(decode_frames(media.files[0], instants, where), len(times), geometry)
    ids = [
        video_ids(times, config.frame_layout, geometry, tokenizer),
        subtitle_ids(media.subtitles, times, config.max_subtitle_tokens, tokenizer),
    ]
    return _joined(ids, [crops], [video_pooling(len(times), geometry)], geometry, tokenizer)


def _joined(
    ids: Sequence[IntArray],
    crops: Sequence[ByteArray],
    pooling: Sequence[IntArray],
    geometry: VisualGeometry,
    tokenizer: TextTokenizer,
) -> Root:
    """Concatenate the parts; each pooling counts patches from its own first crop."""
    first_patch, shifted = 0, []
    for part, index in zip(crops, pooling, strict=True):
        shifted.append(np.where(index >= 0, index + first_patch, index).astype(np.int32))
        first_patch += len(part) * geometry.num_patches
    no_crops = np.zeros((0, geometry.num_patches, geometry.patch_bytes), np.uint8)
    return Root(
        ids=np.concatenate([np.array([tokenizer.special.bos], np.int32), *ids]),
        crops=crops[0] if len(crops) == 1 else np.concatenate([no_crops, *crops]),
        pooling=np.concatenate([np.zeros((0, geometry.max_pool), np.int32), *shifted]),
    )
