"""Scenes of coloured shapes, still and moving: what is where, at what time.  Pure geometry; nothing is drawn here.

Lengths are pixels of the displayed picture, times seconds.  The same scene gives the pixels (shapes_render.py) and
the ground truth (shapes_annotations.py), so the two cannot disagree.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Form = Literal["circle", "square", "triangle", "cross"]
FORMS: tuple[Form, ...] = ("circle", "square", "triangle", "cross")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (225, 40, 40),
    "green": (40, 175, 70),
    "blue": (55, 90, 235),
    "yellow": (245, 215, 45),
    "purple": (165, 55, 200),
    "white": (250, 250, 250),
}
"""Well separated from each other and from every background (largest channel of a background: 45)."""
IMAGE_SIZES = ((64, 64), (96, 96), (96, 80), (80, 96), (120, 96), (160, 120))
SET_IMAGE_SIZES = ((64, 64), (72, 64), (64, 72))
VIDEO_SIZES = ((96, 96), (112, 96), (96, 112), (128, 96), (160, 120))
FRAME_RATES = (10, 15, 24, 30)
LATTICE = 3
"""Resting shapes stand in the middle of a cell of a lattice of this many columns and rows."""
GRID_SECONDS = 0.5
"""Annotated times are multiples of this: the frames that sampling at 2 fps sees."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One coloured shape; (x, y) is its centre of mass, `radius` that of its circumscribed circle."""

    form: Form
    colour: str
    x: float
    y: float
    radius: float

    @property
    def name(self) -> str:
        """Colour and form."""
        return f"{self.colour} {self.form}"


@dataclass(frozen=True, kw_only=True)
class Background:
    """A vertical gradient between two dark colours; equal colours make it plain."""

    top: tuple[int, int, int]
    bottom: tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A still picture; later shapes and the bar are drawn above earlier shapes."""

    width: int
    height: int
    background: Background
    shapes: tuple[Shape, ...]
    bar: tuple[float, float] | None = None
    """Left and right edge of an upright grey bar in front of everything."""


@dataclass(frozen=True, kw_only=True)
class MovingShape:
    """A shape whose centre moves in straight lines through `path`, shown from `appears` on."""

    form: Form
    colour: str
    radius: float
    path: tuple[tuple[float, float, float], ...]
    """(time, x, y), ascending times; it rests before the first and after the last."""
    appears: float = 0.0

    @property
    def name(self) -> str:
        """Colour and form."""
        return f"{self.colour} {self.form}"

    def at(self, time: float) -> Shape | None:
        """The shape at `time`; None while it is not shown."""
        if time < self.appears:
            return None
        times, xs, ys = zip(*self.path, strict=True)
        x, y = float(np.interp(time, times, xs)), float(np.interp(time, times, ys))
        return Shape(form=self.form, colour=self.colour, x=x, y=y, radius=self.radius)


@dataclass(frozen=True, kw_only=True)
class MovingScene:
    """A video: shapes in motion and the times of its frames."""

    width: int
    height: int
    background: Background
    shapes: tuple[MovingShape, ...]
    frame_times: tuple[float, ...]
    """Start of every frame, from 0, ascending; not evenly spaced in a variable-frame-rate video."""
    duration: float
    bar: tuple[float, float] | None = None

    def at(self, time: float) -> Scene:
        """The picture drawn for `time`."""
        shapes = tuple(shape for moving in self.shapes if (shape := moving.at(time)))
        return Scene(width=self.width, height=self.height, background=self.background, shapes=shapes, bar=self.bar)

    def displayed_time(self, time: float) -> float:
        """Start of the frame that is on the screen at `time`."""
        index = int(np.searchsorted(self.frame_times, time + 1e-6, side="right")) - 1
        return self.frame_times[max(index, 0)]

    @property
    def grid_times(self) -> tuple[float, ...]:
        """Multiples of GRID_SECONDS before the end."""
        return tuple(k * GRID_SECONDS for k in range(math.ceil(self.duration / GRID_SECONDS - 1e-6)))

    def seen(self, index: int, time: float) -> Shape | None:
        """Shape number `index` in the frame on the screen at `time`; None unless its centre can be seen."""
        scene = self.at(self.displayed_time(time))
        shape = self.shapes[index].at(self.displayed_time(time))
        if shape is None or not is_visible(scene, shape):
            return None
        return shape


def is_visible(scene: Scene, shape: Shape, margin: float = 3.0) -> bool:
    """Whether the centre of `shape` lies in the picture and nothing in front comes nearer to it than `margin`."""
    if not (margin <= shape.x <= scene.width - margin and margin <= shape.y <= scene.height - margin):
        return False
    if scene.bar and scene.bar[0] - margin <= shape.x <= scene.bar[1] + margin:
        return False
    in_front = scene.shapes[scene.shapes.index(shape) + 1 :]
    return all(math.dist((shape.x, shape.y), (other.x, other.y)) > other.radius + margin for other in in_front)


def random_scene(rng: np.random.Generator, sizes: Sequence[tuple[int, int]] = IMAGE_SIZES, most: int = 4) -> Scene:
    """A picture of 1 to `most` shapes, mostly 1 to 3, that do not touch."""
    width, height = sizes[rng.integers(len(sizes))]
    shares = np.array([0.45, 0.33, 0.17, 0.05][:most])
    number = 1 + int(rng.choice(len(shares), p=shares / shares.sum()))
    shapes = tuple(
        Shape(form=form, colour=colour, x=x, y=y, radius=radius)
        for (x, y, radius), (form, colour) in zip(
            _free_places(rng, width, height, number), random_looks(rng, number), strict=True
        )
    )
    return Scene(width=width, height=height, background=random_background(rng), shapes=shapes)


def random_looks(rng: np.random.Generator, number: int) -> list[tuple[Form, str]]:
    """Form and colour of each of `number` shapes; colours differ, forms may be the same."""
    colours = list(COLOURS)
    return [(FORMS[rng.integers(len(FORMS))], colours[i]) for i in rng.permutation(len(colours))[:number]]


def random_background(rng: np.random.Generator) -> Background:
    """Dark, every second one plain."""
    top, bottom = (tuple(int(v) for v in rng.integers(15, 46) + rng.integers(-15, 1, 3)) for _ in range(2))
    return Background(top=top, bottom=bottom if rng.random() < 0.5 else top)  # type: ignore[arg-type]


def random_moving_scene(
    rng: np.random.Generator, *, durations: tuple[float, float], variable_rate: bool = False, most: int = 2
) -> MovingScene:
    """Shapes gliding in lanes, each in its own, sometimes behind a bar, sometimes leaving; some cross others' lanes."""
    width, height = VIDEO_SIZES[rng.integers(len(VIDEO_SIZES))]
    times, duration = _frame_times(rng, durations, variable_rate)
    number = int(rng.integers(1, most + 1))
    radius_limit = 0.20 if number == 1 else 0.17
    bar = None
    if rng.random() < 0.4:
        middle, half = rng.uniform(0.4, 0.6) * width, 0.11 * width
        bar = (middle - half, middle + half)
    shapes = []
    lanes = rng.permutation(number)
    for (form, colour), lane in zip(random_looks(rng, number), lanes, strict=True):
        radius = float(rng.uniform(0.13, radius_limit)) * min(width, height)
        y = (lane + 0.5) / number * height + float(rng.uniform(-0.05, 0.05)) * height
        shapes.append(_gliding(rng, form, colour, radius, y, width, height, duration))
    return MovingScene(
        width=width,
        height=height,
        background=random_background(rng),
        shapes=tuple(shapes),
        frame_times=times,
        duration=duration,
        bar=bar,
    )


def random_appearing_scene(rng: np.random.Generator, *, durations: tuple[float, float], most: int = 3) -> MovingScene:
    """Shapes at rest that appear one after another at multiples of GRID_SECONDS and stay."""
    width, height = VIDEO_SIZES[rng.integers(len(VIDEO_SIZES))]
    times, duration = _frame_times(rng, durations, variable=False)
    number = int(rng.integers(1, most + 1))
    last_step = math.ceil(duration / GRID_SECONDS) - 2
    shapes = tuple(
        MovingShape(
            form=form,
            colour=colour,
            radius=radius,
            path=((0.0, x, y),),
            appears=_next_frame_time(times, int(rng.integers(0, last_step + 1)) * GRID_SECONDS),
        )
        for (x, y, radius), (form, colour) in zip(
            _free_places(rng, width, height, number), random_looks(rng, number), strict=True
        )
    )
    background = random_background(rng)
    return MovingScene(
        width=width, height=height, background=background, shapes=shapes, frame_times=times, duration=duration
    )


def _gliding(
    rng: np.random.Generator, form: Form, colour: str, radius: float, y: float, width: int, height: int, end: float
) -> MovingShape:
    margin = radius + 2
    kind = rng.choice(["across", "leaves", "upright", "rests"], p=[0.5, 0.2, 0.15, 0.15])
    left, right = margin, width - margin
    if kind == "rests":
        x = float(rng.uniform(left, right))
        return MovingShape(form=form, colour=colour, radius=radius, path=((0.0, x, y),))
    if kind == "upright":
        x = float(rng.uniform(left, right))
        ends = (margin, height - margin) if rng.random() < 0.5 else (height - margin, margin)
        path = ((0.0, x, ends[0]), (end, x, ends[1]))
    else:
        stop = width + radius + 2 if kind == "leaves" else right
        path = ((0.0, left, y), (end * (0.8 if kind == "leaves" else 1.0), stop, y))
        if rng.random() < 0.5:
            path = tuple((t, width - x, y) for t, x, y in path)  # type: ignore[assignment]
    return MovingShape(form=form, colour=colour, radius=radius, path=path)


def _frame_times(
    rng: np.random.Generator, durations: tuple[float, float], variable: bool
) -> tuple[tuple[float, ...], float]:
    """Frame starts and the end of the last frame; a variable rate halves the rate in the middle third."""
    rate = FRAME_RATES[rng.integers(len(FRAME_RATES))]
    number = round(float(rng.uniform(*durations)) * rate)
    steps = np.full(number, 1.0 / rate)
    if variable:
        steps[number // 3 : 2 * number // 3] = 2.0 / rate
        steps = steps[: int(np.searchsorted(np.cumsum(steps), durations[1], side="right"))]
    ends = np.cumsum(steps)
    return (0.0, *(float(t) for t in ends[:-1])), float(ends[-1])


def _next_frame_time(times: tuple[float, ...], time: float) -> float:
    """Start of the frame on the screen at `time`, so that what appears then is already drawn in that frame."""
    return times[int(np.searchsorted(times, time + 1e-6, side="right")) - 1]


def _free_places(rng: np.random.Generator, width: int, height: int, number: int) -> list[tuple[float, float, float]]:
    """(x, y, radius) of `number` discs in different cells of a 3 x 3 lattice; radius 12-16 % of the shorter side.

    A lattice, because a model of half a million weights has to learn to point within minutes on a CPU: from free
    positions it learns colours in that time and positions hardly at all (DECISIONS, tiny recipe).
    """
    cells = rng.permutation(LATTICE * LATTICE)[:number]
    return [
        (
            (cell % LATTICE + 0.5) / LATTICE * width,
            (cell // LATTICE + 0.5) / LATTICE * height,
            float(rng.uniform(0.12, 0.16)) * min(width, height),
        )
        for cell in cells
    ]
