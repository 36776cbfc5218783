"""Geometry of visual input and the limits that a training stage or an evaluation sets."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from molmo2core.annotations import MediaKind

Style = Literal["style_and_length_v2", "demo_or_style_v2", "few_phrasings"]
"""How prompts are worded (wording.py): stage 1; stages 2-3 and inference (model.md 6.4); and as the latter, but with
few templates, for models that are too small to learn many."""
STYLES: tuple[Style, ...] = get_args(Style)

FrameLayout = Literal["image_tokens", "frame_tokens", "frame_tokens_around_video"]
"""The tokens around frames (data.md 0.2).

`image_tokens`: <im_start> and <im_end> around each frame, as the released weights know it.  `frame_tokens`:
<frame_start> and <frame_end> around each.  `frame_tokens_around_video`: one <frame_start> before the first time and one
<frame_end> after the last frame, as the published training script has it."""

FrameSampling = Literal["as_trained", "as_native_processor"]
"""Which frames of a video are taken (frame_times.py).

`as_trained`: at exact times, the last instant included.  `as_native_processor`: the frame numbers that transformers'
own video processor takes, without the last one."""

ThinImages = Literal["as_trained", "as_released_processors"]
"""How an image with a side not longer than the crops' margins is tiled (model.md 4.1 step 2).

`as_trained`: the side counts as one pixel, so that the other one decides.  `as_released_processors`: the subtraction
gives what it gives, and a zero or negative size mostly ends in a single crop."""


@dataclass(frozen=True, kw_only=True)
class VisualGeometry:
    """What the weights fix (model.md 1.3, 4.1).  Released models: the defaults."""

    crop_size: int = 378
    """Side of a crop in pixels."""
    patch_size: int = 14
    """Side of a patch in pixels."""
    overlap_margins: tuple[int, int] = (4, 4)
    """Patches that neighbouring crops share, (before, after)."""
    image_pooling: tuple[int, int] = (2, 2)
    """Patches per visual token of an image, (rows, columns)."""
    video_pooling: tuple[int, int] = (3, 3)
    """Patches per visual token of a frame, (rows, columns)."""

    def __post_init__(self) -> None:
        if self.crop_size % self.patch_size:
            raise ValueError(f"crop_size {self.crop_size} is no multiple of patch_size {self.patch_size}")
        if sum(self.overlap_margins) >= self.grid:
            raise ValueError(f"overlap_margins {self.overlap_margins} leave nothing of {self.grid} patches")

    @property
    def grid(self) -> int:
        """Patches along one side of a crop."""
        return self.crop_size // self.patch_size

    @property
    def num_patches(self) -> int:
        """Patches of a crop."""
        return self.grid * self.grid

    @property
    def patch_bytes(self) -> int:
        """Values of one flattened RGB patch."""
        return self.patch_size * self.patch_size * 3

    @property
    def max_pool(self) -> int:
        """Patches of the widest pooling window: the K of pooling indices."""
        return max(self.image_pooling[0] * self.image_pooling[1], self.video_pooling[0] * self.video_pooling[1])


@dataclass(frozen=True, kw_only=True)
class HighRes:
    """Training sees some images of some datasets in more crops, as inference does (model.md 4.4)."""

    datasets: tuple[str, ...] = ()
    """Whose single images: the image pointing datasets.  Image sets never."""
    probability: float = 0.3
    """Drawn anew each time an example is drawn."""
    max_crops: int = 24
    """High-resolution crops then."""


@dataclass(frozen=True, kw_only=True)
class PreprocessingConfig:
    """How an example becomes tokens in one training stage or evaluation.  Defaults: stage 2 as described."""

    max_crops: int = 8
    """High-resolution crops of an image, the low-resolution view not counted."""
    max_set_crops: int = 8
    """The same for each image of a set, where it is less than `max_crops`."""
    high_res: HighRes = field(default_factory=HighRes)
    max_images: int = 5
    """Images of a set; more is an error at validation, never silently cut."""
    max_frames: int = 128
    """Frames of a video."""
    max_fps: float = 2.0
    """Frames per second at most; the last instant is always added (model.md 5.1)."""
    max_tracking_fps: float = 10.0
    """The same for examples with tracks, whose frames lie on the grid of the annotated times (data.md 6.5)."""
    frame_sampling: FrameSampling = "as_trained"
    frame_layout: FrameLayout = "image_tokens"
    max_subtitle_tokens: int = 1024
    """Subtitle lines are kept whole, in order, up to this many tokens."""
    style: Style = "demo_or_style_v2"
    thin_images: ThinImages = "as_trained"

    def image_crops(self, kind: MediaKind, *, high_res: bool) -> int:
        """Most high-resolution crops of one image of a medium of this kind.

        Args:
            kind: `image` or `images`.
            high_res: the medium was drawn for high resolution, or may be.
        """
        if kind == "images":
            return min(self.max_crops, self.max_set_crops)
        return max(self.max_crops, self.high_res.max_crops) if high_res else self.max_crops
