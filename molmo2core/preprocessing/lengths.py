"""Upper bounds of lengths, known without decoding: what packs are planned with (DECISIONS D2).

A bound is never below the true length.  Branch bounds are the maximum over everything that can be drawn; root bounds
count a byte of text as a token, which a byte-level tokenizer cannot exceed.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import get_args

from molmo2core.annotations import Annotation, MediaKind
from molmo2core.examples import Media
from molmo2core.preprocessing import chat, templates
from molmo2core.preprocessing.config import PreprocessingConfig, Style, ThinImages, VisualGeometry
from molmo2core.preprocessing.image import choose_tiling, low_res_grid, pooled_grid
from molmo2core.preprocessing.root import SUBTITLE_HEADER, frame_text, image_text, subtitle_text
from molmo2core.preprocessing.video import frame_grid, frame_times
from molmo2core.special_tokens import TextTokenizer

_BOS_TOKENS = 1


def annotation_tokens_bound(annotation: Annotation, tokenizer: TextTokenizer) -> int:
    """Most tokens that a branch of `annotation` adds to a sequence, over styles, phrasings and length hints.

    The EOS that ends the branch is only a target and not counted.

    Raises:
        DataError: a multiple-choice answer is none of its options.
    """
    reply = chat.reply_of(annotation)
    styles: tuple[Style, ...] = get_args(Style)
    openings = {
        (prefix, prompt)
        for style in styles
        for prefix, prompt in product(_prefixes(annotation, style, len(reply)), chat.phrasings(annotation, style))
    }
    lengths = [len(chat.encode_user_text(prefix, prompt, tokenizer)) for prefix, prompt in openings]
    empty = chat.Dialogue(messages=("", *chat.later_messages(annotation, reply)))
    branch = chat.encode_dialogue(empty, annotation.task, tokenizer)
    num_replies = sum(turn.is_reply for turn in branch.turns)
    without_opening = sum(len(turn.ids) for turn in branch.turns) - len(chat.encode_user_text((), "", tokenizer))
    return without_opening + max(lengths) + num_replies - 1


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
) -> tuple[int, int]:
    """Most tokens and crops of a root under the limits of one stage; crops are exact, but for `high_res`.

    Args:
        kind: of the medium.
        sizes: displayed (width, height) of each image.
        duration_seconds: of a video.
        subtitle_tokens: from the function of that name.
        geometry: of crops and pooling.
        config: limits.
        high_res: the dataset is one of `config.high_res.datasets`.  Whether an image is seen in more crops is drawn
            each time it is drawn, after planning; the plan has room for either.

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
            times = frame_times(duration_seconds, config.max_frames, config.max_fps)
            rows, columns = frame_grid(geometry)
            texts = sum(len(frame_text(number, time)) for number, time in enumerate(times))
            subtitles = min(subtitle_tokens, config.max_subtitle_tokens)
            return _BOS_TOKENS + len(times) * (rows * columns + 2) + texts + subtitles, len(times)


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


def _prefixes(annotation: Annotation, style: Style, reply_characters: int) -> list[tuple[str, ...]]:
    """Every style prefix that training can draw for a reply of this length."""
    name = templates.style_of(annotation)
    noise = chat.MAX_LENGTH_NOISE_CHARACTERS
    shortest, longest = (chat.hinted_length(reply_characters, n) for n in (-noise, noise))
    lengths: list[int | None] = [None, *range(shortest, longest + 1), chat.INFERENCE_LENGTH]
    return sorted({chat.style_prefix(name, style, length) for length in lengths})
