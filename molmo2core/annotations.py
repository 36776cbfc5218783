"""What people annotate on a medium: one frozen dataclass per form of annotation, and the table of tasks.

Coordinates are fractions of the displayed width and height (after EXIF or video rotation), 0 <= x, y <= 1.
Times are seconds from the start of the video as displayed.  These classes are the manifest's annotation contract
(see manifest/schema.py, which parses them strictly) and what shards store.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

MediaKind = Literal["none", "image", "images", "video"]
CaptionKind = Literal["long", "short", "transcript", "merged", "motion", "object"]
CountForm = Literal["point_then_count", "count_then_point", "count"]
TrackForm = Literal["track", "ground", "single_point"]

_GRID_TOLERANCE_SECONDS = 0.01

STRICT = {"extra": "forbid", "strict": True, "allow_inf_nan": False}
"""How pydantic parses these classes (manifest/schema.py): no unknown key, no silent conversion."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """One role's text in a conversation."""

    __pydantic_config__ = STRICT

    role: Literal["system", "user", "assistant"]
    """A system text is one line and comes first; the model reads it in front of the first user text."""
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One position on an image or frame.

    `radius` is the distance, as a fraction of the shorter side, within which an answer counts as a hit when a
    model is evaluated; training ignores it.
    """

    __pydantic_config__ = STRICT

    x: float
    y: float
    image: int = 1
    """1-based number of the image in an image set; 1 for a single image or a video."""
    time: float | None = None
    """Seconds; only and always for videos."""
    radius: float = 0.05


@dataclass(frozen=True, kw_only=True, slots=True)
class TrackPosition:
    """Where one object is at one time.  An occluded or absent object is written with `visible` false or left out."""

    __pydantic_config__ = STRICT

    time: float
    x: float
    y: float
    visible: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Track:
    """One object through time; `positions` in ascending time."""

    __pydantic_config__ = STRICT

    object_id: int
    positions: tuple[TrackPosition, ...]
    radius: float = 0.05


@dataclass(frozen=True, kw_only=True, slots=True)
class Caption:
    """A description of the whole medium, or of a part of a video."""

    __pydantic_config__ = STRICT

    task: Literal["image_caption", "video_caption"]
    text: str
    kind: CaptionKind = "long"
    """`transcript`: as spoken.  Videos only: `merged` (of clip captions), `motion`, `object` (what `label` does)."""
    label: str = ""
    """The object of kind `object`."""
    start: float | None = None
    """Seconds: the text is about the part from `start` to `end`; without `end`, about the frame at `start`."""
    end: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class QuestionAnswer:
    """A question with one right answer; with `options` it is multiple choice and `answer` is one of them."""

    __pydantic_config__ = STRICT

    task: Literal["image_qa", "multi_image_qa", "video_qa", "subtitle_qa"]
    question: str
    answer: str
    options: tuple[str, ...] = ()
    category: str = ""
    """Free label by which evaluation breaks results down (`colour`, `count`, ...)."""
    explanation: str = ""
    """Reasoning that the model gives before the answer."""
    style: str = ""
    """Name under which the released models know this kind of answer (`chart_qa`, `user_qa`, ...); empty: the task's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pointing:
    """Every place where `label` is seen; no points means that there are none.  `*_counting` also states the number."""

    __pydantic_config__ = STRICT

    task: Literal[
        "image_pointing",
        "image_counting",
        "multi_image_pointing",
        "multi_image_counting",
        "video_pointing",
        "video_counting",
    ]
    label: str
    points: tuple[Point, ...] = ()
    question: str = ""
    """Asked word for word in place of a phrasing of ours."""
    count_form: CountForm = "point_then_count"
    """Of `*_counting`: points and then their number, the other way round, or the number alone."""
    count: int | None = None
    """The number, where only it is known (form `count`); otherwise the number of points."""

    @property
    def number(self) -> int:
        """How many there are."""
        return len(self.points) if self.count is None else self.count


@dataclass(frozen=True, kw_only=True, slots=True)
class Tracking:
    """Objects that `label` describes, followed at `sampling_fps` positions per second.

    `form`: all of them at every time; where each is first and last seen (`ground`); or one, shown at one time, at
    every later time (`single_point`).
    """

    __pydantic_config__ = STRICT

    task: Literal["tracking"]
    label: str
    sampling_fps: float
    tracks: tuple[Track, ...] = ()
    form: TrackForm = "track"


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversation:
    """Free turns: perhaps a system text, then user and assistant alternating, assistant last."""

    __pydantic_config__ = STRICT

    task: Literal["text"]
    turns: tuple[Turn, ...]


def on_sampling_grid(time: float, sampling_fps: float) -> bool:
    """Whether `time` is a multiple of 1 / `sampling_fps` seconds, to within 0.01 s (data.md 6.5)."""
    return abs(time - round(time * sampling_fps) / sampling_fps) <= _GRID_TOLERANCE_SECONDS


Annotation = Caption | QuestionAnswer | Pointing | Tracking | Conversation

MEDIA_OF_TASK: dict[str, tuple[MediaKind, ...]] = {
    "image_caption": ("image",),
    "video_caption": ("video",),
    "image_qa": ("image",),
    "multi_image_qa": ("images",),
    "video_qa": ("video",),
    "subtitle_qa": ("video",),
    "image_pointing": ("image",),
    "image_counting": ("image",),
    "multi_image_pointing": ("images",),
    "multi_image_counting": ("images",),
    "video_pointing": ("video",),
    "video_counting": ("video",),
    "tracking": ("video",),
    "text": ("none",),
}
TASKS = tuple(MEDIA_OF_TASK)

WeightFamily = Literal["image_caption", "video_caption", "pointing", "other"]
"""Families of tasks that loss weights distinguish (loss_weights.py)."""

WEIGHT_FAMILY_OF_TASK: dict[str, WeightFamily] = {
    "image_caption": "image_caption",
    "video_caption": "video_caption",
    "image_pointing": "pointing",
    "image_counting": "pointing",
    "multi_image_pointing": "pointing",
    "multi_image_counting": "pointing",
    "video_pointing": "pointing",
    "video_counting": "pointing",
    "tracking": "pointing",
    "image_qa": "other",
    "multi_image_qa": "other",
    "video_qa": "other",
    "subtitle_qa": "other",
    "text": "other",
}
