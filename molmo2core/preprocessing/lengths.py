"""Upper bounds of lengths, known without decoding: what packs are planned with (DECISIONS D2).

A bound is never below the true length.  Those of branches stand in branch_lengths.py; root bounds count a byte of text
as a token, which a byte-level tokenizer cannot exceed.
"""

from __future__ import annotations

from collections.abc import Sequence

from molmo2core.annotations import MediaKind
from molmo2core.examples import Media
from molmo2core.preprocessing.config import PreprocessingConfig, ThinImages, VisualGeometry
from molmo2core.preprocessing.frame_times import sampled_times
from molmo2core.preprocessing.image import choose_tiling, low_res_grid, pooled_grid
from molmo2core.preprocessing.root import SUBTITLE_HEADER, frame_text, image_text, subtitle_text
from molmo2core.preprocessing.video import frame_grid
from molmo2core.special_tokens import TextTokenizer

_BOS_TOKENS = 1


def subtitle_tokens(media: Media, tokenizer: TextTokenizer) -> int:
    """Tokens of all subtitle lines with their header; 0 without subtitles."""
    if not media.subtitles:
        return 0
    texts = [SUBTITLE_HEADER, *(subtitle_text(line) for line in media.subtitles)]
    return sum(len(tokenizer.encode_text(text)) for text in texts)


def root_bound(
    kind: MediaKind,
    sizes: Sequence[tuple[int, int]],
    duration_seconds: float,
    subtitle_tokens: int,
    geometry: VisualGeometry,
    config: PreprocessingConfig,
    *,
    high_res: bool = False,
    fps: float = 0.0,
    grid_fps: float = 0.0,
) -> tuple[int, int]:
    """Most tokens and crops of a root under the limits of one stage; crops are exact, but for `high_res`.

    Args:
        kind: of the medium.
        sizes: displayed (width, height) of each image.
        duration_seconds: of a video, or of the clip of it.
        subtitle_tokens: from the function of that name.
        geometry: of crops and pooling.
        config: limits.
        high_res: the dataset is one of `config.high_res.datasets`.  Whether an image is seen in more crops is drawn
            each time it is drawn, after planning; the plan has room for either.
        fps: of a video, as measured.
        grid_fps: of an example with tracks, from frame_times.tracking_grid.

    Returns:
        (tokens with BOS, crops).
    """
    match kind:
        case "none":
            return _BOS_TOKENS, 0
        case "image" | "images":
            limits = {config.image_crops(kind, high_res=drawn) for drawn in (False, high_res)}
            bounds = [_images_bound(sizes, limit, geometry, config.thin_images) for limit in limits]
            return _BOS_TOKENS + max(tokens for tokens, _ in bounds), max(crops for _, crops in bounds)
        case "video":
            times = sampled_times(duration_seconds, config, fps=fps, grid_fps=grid_fps)
            rows, columns = frame_grid(geometry)
            around = 2 if config.frame_layout == "frame_tokens_around_video" else 2 * len(times)
            texts = sum(len(frame_text(number, time)) for number, time in enumerate(times))
            subtitles = min(subtitle_tokens, config.max_subtitle_tokens)
            return _BOS_TOKENS + len(times) * rows * columns + around + texts + subtitles, len(times)


def _images_bound(
    sizes: Sequence[tuple[int, int]], max_crops: int, geometry: VisualGeometry, thin_images: ThinImages
) -> tuple[int, int]:
    """Tokens and crops of images in up to `max_crops` crops each; only the text of their numbers is a bound."""
    tilings = [choose_tiling(height, width, geometry, max_crops, thin_images) for width, height in sizes]
    named = range(1, len(sizes) + 1) if len(sizes) > 1 else []
    tokens = sum(num_image_tokens(tiling, geometry) for tiling in tilings)
    tokens += sum(len(image_text(number).encode()) for number in named)
    return tokens, sum(1 + rows * columns for rows, columns in tilings)


def num_image_tokens(tiling: tuple[int, int], geometry: VisualGeometry) -> int:
    """Length of root.image_ids: both views, column tokens of the second, two tokens around each."""
    low_rows, low_columns = low_res_grid(geometry)
    rows, columns = pooled_grid(tiling, geometry)
    return low_rows * low_columns + 2 + rows * (columns + 1) + 2
