"""Example <-> sample of an MDS shard.  Media stay as delivered: no re-encoding, no pickle.

Columns: `uid`, `dataset`, `split`, `kind` (str), `media` (bytes: the files in one frame, below), `meta` (JSON: sizes,
duration, frame rate, start of the clip, subtitles), `annotations` (bytes: JSON of manifest.schema).  streaming passes
`bytes` through unchecked, so reading checks.

The rest of what a planner must know (lengths.SampleLengths) stands beside them: `grid_fps` (float64), `subtitle_tokens`
(int), `branch_tokens` (JSON: for each annotation its bound in each style).  The side table repeats all of it.

Frame of several files: u32 count, count x u64 length, then the files; all little-endian.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from molmo2core.errors import DataError
from molmo2core.examples import Example, Media, Subtitle
from molmo2core.manifest.schema import annotations_from_json, annotations_to_json
from molmo2core.shards.lengths import SampleLengths
from molmo2core.shards.mds import Value

COLUMNS = {
    "uid": "str",
    "dataset": "str",
    "split": "str",
    "kind": "str",
    "media": "bytes",
    "meta": "bytes",
    "annotations": "bytes",
    "grid_fps": "float64",
    "subtitle_tokens": "int",
    "branch_tokens": "json",
}
MAX_SAMPLE_BYTES = (1 << 32) - (1 << 20)
"""Offsets within a shard are 32 bit."""


def sample_from_example(example: Example, lengths: SampleLengths) -> dict[str, Value]:
    """The columns of one example and its bounds.

    Raises:
        DataError: the media are too large for a shard.
    """
    media = example.media
    if sum(map(len, media.files)) > MAX_SAMPLE_BYTES:
        raise DataError(
            f"dataset {example.dataset}, example {example.uid}",
            found=f"{sum(map(len, media.files))} bytes of media",
            expected=f"at most {MAX_SAMPLE_BYTES}",
            mend="cut or re-encode the medium",
        )
    meta = {
        "sizes": media.sizes,
        "duration_seconds": media.duration_seconds,
        "fps": media.fps,
        "clip_start_seconds": media.clip_start_seconds,
        "subtitles": [[line.start, line.end, line.text] for line in media.subtitles],
    }
    return {
        "uid": example.uid,
        "dataset": example.dataset,
        "split": example.split,
        "kind": media.kind,
        "media": frame_files(media.files),
        "meta": json.dumps(meta).encode(),
        "annotations": annotations_to_json(example.annotations),
        "grid_fps": lengths.grid_fps,
        "subtitle_tokens": lengths.subtitle_tokens,
        "branch_tokens": [list(tokens) for tokens in lengths.branch_tokens],
    }


def example_from_sample(sample: Mapping[str, Any]) -> Example:
    """The example of a sample.

    Raises:
        DataError: the bytes are not what was written (a damaged shard, or one of another program).
    """
    with _damage_named(sample):
        meta = json.loads(sample["meta"])
        return Example(
            uid=sample["uid"],
            dataset=sample["dataset"],
            split=sample["split"],
            media=Media(
                kind=sample["kind"],
                files=unframe_files(sample["media"]),
                sizes=tuple((width, height) for width, height in meta["sizes"]),
                duration_seconds=meta["duration_seconds"],
                fps=meta["fps"],
                clip_start_seconds=meta["clip_start_seconds"],
                subtitles=tuple(Subtitle(start=start, end=end, text=text) for start, end, text in meta["subtitles"]),
            ),
            annotations=annotations_from_json(sample["annotations"]),
        )


def lengths_from_sample(sample: Mapping[str, Any]) -> SampleLengths:
    """The bounds of a sample: its row of the side table; errors as `example_from_sample`."""
    example = example_from_sample(sample)
    with _damage_named(sample):
        return SampleLengths(
            uid=example.uid,
            kind=example.media.kind,
            sizes=example.media.sizes,
            duration_seconds=example.media.duration_seconds,
            fps=example.media.fps,
            grid_fps=float(sample["grid_fps"]),
            subtitle_tokens=int(sample["subtitle_tokens"]),
            branch_tokens=tuple(tuple(map(int, tokens)) for tokens in sample["branch_tokens"]),
        )


@contextmanager
def _damage_named(sample: Mapping[str, Any]) -> Iterator[None]:
    where = f"shard sample {sample.get('dataset')}/{sample.get('uid')}"
    try:
        yield
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise DataError(where, found=f"damaged or foreign sample ({error})", mend="build the shards again") from error


def frame_files(files: Sequence[bytes]) -> tuple[bytes, ...]:
    """Several files as one, in pieces that are not copied."""
    lengths = np.array([len(file) for file in files], "<u8").tobytes()
    return np.array(len(files), "<u4").tobytes(), lengths, *files


def unframe_files(frame: bytes) -> tuple[bytes, ...]:
    """Inverse of `frame_files`, joined.

    Raises:
        ValueError: the lengths do not add up to the frame's.
    """
    count = int(np.frombuffer(frame, "<u4", 1)[0])
    ends = np.cumsum(np.frombuffer(frame, "<u8", count, offset=4)).astype(np.int64) + 4 + 8 * count
    if (ends[-1] if count else 4) != len(frame):
        raise ValueError(f"media frame of {len(frame)} bytes, expected {ends[-1] if count else 4}")
    starts = [4 + 8 * count, *ends.tolist()]
    return tuple(frame[start:end] for start, end in zip(starts, ends.tolist(), strict=False))
