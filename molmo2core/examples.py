"""The five nouns of the data path.  Read this first.

    ManifestRow -> Example -> TokenizedExample -> PackedExample -> Batch

Each is frozen; every function on the path is named by the pair it connects; nothing edits an example in place.

Shape legend: S tokens of a sequence, C crops, P patches of a crop, D bytes of a patch (patch x patch x 3),
V pooled visual tokens, K patches per pool.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypedDict

import numpy as np
import numpy.typing as npt

from molmo2core.annotations import STRICT, Annotation, MediaKind

if TYPE_CHECKING:
    import torch

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")

IntArray = npt.NDArray[np.int32]
FloatArray = npt.NDArray[np.float32]
ByteArray = npt.NDArray[np.uint8]
BoolArray = npt.NDArray[np.bool_]

ROOT = 10_000
"""Subsegment id of root tokens (BOS, visual tokens, subtitles) inside their example (data.md 2.1)."""
DOCUMENT = 100_000
"""Subsegment ids of the e-th example of a pack are offset by e * DOCUMENT (data.md 2.3)."""
PADDING = -1
"""Subsegment id of a padding token; also 'no patch' in a pooling index."""


@dataclass(frozen=True, kw_only=True)
class ManifestRow:
    """One line of a manifest as delivered, before anything about it is believed."""

    dataset: str
    line: int
    """1-based line number in the manifest."""
    content: Mapping[str, Any]
    """The JSON object."""


@dataclass(frozen=True, kw_only=True)
class Subtitle:
    """One subtitle line, seconds."""

    __pydantic_config__ = STRICT

    start: float
    end: float
    text: str


@dataclass(frozen=True, kw_only=True)
class Media:
    """One visual input, still encoded (JPEG, PNG, ..., MP4), and what was measured of it when it was validated."""

    kind: MediaKind
    files: tuple[bytes, ...] = ()
    """Encoded bytes: one for an image or a video, several for an image set, none for text."""
    sizes: tuple[tuple[int, int], ...] = ()
    """Displayed (width, height) in pixels of each file, after EXIF or video rotation."""
    duration_seconds: float = 0.0
    """Duration of a video, or of the clip of it, else 0."""
    fps: float = 0.0
    """Frames per second of a video on average, else 0."""
    clip_start_seconds: float = 0.0
    """Where the clip starts in the file.  All times of the example count from there."""
    subtitles: tuple[Subtitle, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Example:
    """Validated: one medium and the annotations that become the branches of its message tree."""

    uid: str
    """Unique in its dataset."""
    dataset: str
    split: Split
    media: Media
    annotations: tuple[Annotation, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenizedExample:
    """One example as the model sees it alone.  A root and at least one branch; branches appear in ascending id."""

    uid: str
    input_ids: IntArray
    """[S]"""
    target_ids: IntArray
    """[S] the next token of each position; the last position of each branch targets EOS."""
    loss_weights: FloatArray
    """[S] weight of each target, 0 = ignored."""
    position_ids: IntArray
    """[S] 0..R-1 in the root, every branch restarts at R."""
    subsegment_ids: IntArray
    """[S] ROOT or the branch number 0, 1, ..."""
    is_visual: BoolArray
    """[S] one of the eight token kinds that attend to each other in both directions."""
    crops: ByteArray
    """[C, P, D] patches of each crop or frame, row-major, channel fastest, not normalised."""
    pooling: IntArray
    """[V, K] indices into the C*P patches, PADDING where a window is cut; row v feeds the v-th <im_patch>."""
    tasks: tuple[str, ...]
    """Task of branch 0, 1, ..."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedExample:
    """Several tokenized examples in one sequence; arrays as in TokenizedExample, concatenated.

    `subsegment_ids` carry e * DOCUMENT, `pooling` indexes the concatenated crops, position ids are unchanged.
    """

    uids: tuple[str, ...]
    input_ids: IntArray
    target_ids: IntArray
    loss_weights: FloatArray
    position_ids: IntArray
    subsegment_ids: IntArray
    is_visual: BoolArray
    crops: ByteArray
    pooling: IntArray
    tasks: tuple[tuple[str, ...], ...]
    """[example][branch] task names."""


@dataclass(frozen=True, kw_only=True)
class Deviation:
    """One example of a pack that is not as planned."""

    kind: Literal["replaced", "shortened"]
    """Its medium does not decode; or the pack was longer than planned."""
    pack: int
    """Number of the pack in its plan."""
    dataset: str
    uid: str
    why: str
    by: str = ""
    """`dataset/uid` of what stands in for a replaced one; empty: nothing fitted."""


class Batch(TypedDict):
    """What a rank receives for one step: its packs as tensors, and Python numbers that need no device sync.

    A pack is a dict of tensors named as in PackedExample (`input_ids`, `target_ids`, `position_ids` int64;
    `subsegment_ids`, `pooling` int64; `loss_weights` float32; `is_visual` bool; `crops` uint8).
    """

    packs: list[dict[str, torch.Tensor]]
    pack_numbers: list[int]
    """Place of each pack in its plan."""
    uids: list[tuple[str, ...]]
    datasets: list[tuple[str, ...]]
    """Of each example, by pack."""
    tasks: list[tuple[tuple[str, ...], ...]]
    """[pack][example][branch] task names."""
    loss_weight: float
    """Sum of loss weights of all packs."""
    num_tokens: int
    num_examples: int
    num_crops: int
    deviations: list[Deviation]
    """From the plan."""
    data_wait_seconds: float
    """How long training waited for this batch."""
    loader_idle_seconds: float
    """How long a worker, on average, waited for room before it made its part of this batch."""
