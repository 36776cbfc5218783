"""Pictures with marks, and how they stand in a page: true positions as green rings, predicted ones as red crosses."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape

from PIL import Image, ImageDraw

from molmo2core.examples import ByteArray

TRUE_COLOUR = (0, 160, 60)
PREDICTED_COLOUR = (220, 30, 30)
DISPLAY_SIDE = 288
"""Pixels of the longer side."""
_CROSS_ARM = 7  # pixels
_LINE = 3  # pixels
_NAME_SIZE = 14  # pixels
_EDGE_COLOUR = (255, 255, 255)


@dataclass(frozen=True, kw_only=True)
class Mark:
    """One position to draw on one picture."""

    x: float
    y: float
    radius: float | None = None
    """Fraction of the shorter side: a true position.  None: a predicted one."""
    name: str = ""
    """Object number of a track."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One drawn image or frame."""

    caption: str
    jpeg: bytes


def draw_marks(pixels: ByteArray, marks: Iterable[Mark], side: int = DISPLAY_SIDE) -> bytes:
    """A JPEG of `pixels` [height, width, 3] with `marks`, its longer side `side` pixels."""
    picture = Image.fromarray(pixels)
    scale = side / max(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(picture)
    for mark in marks:
        _draw_mark(pen, mark, width, height)
    written = io.BytesIO()
    picture.save(written, "JPEG", quality=88)
    return written.getvalue()


def _draw_mark(pen: ImageDraw.ImageDraw, mark: Mark, width: int, height: int) -> None:
    """With a white edge: shapes may have the mark's own colour."""
    x, y = mark.x * width, mark.y * height
    if mark.radius is None:
        for colour, arm, line in ((_EDGE_COLOUR, _CROSS_ARM + 2, _LINE + 4), (PREDICTED_COLOUR, _CROSS_ARM, _LINE)):
            pen.line((x - arm, y - arm, x + arm, y + arm), colour, line)
            pen.line((x - arm, y + arm, x + arm, y - arm), colour, line)
        _draw_name(pen, (x + _CROSS_ARM + 2, y), mark.name, PREDICTED_COLOUR)
        return
    ring = mark.radius * min(width, height)
    pen.ellipse((x - ring - 1, y - ring - 1, x + ring + 1, y + ring + 1), outline=_EDGE_COLOUR, width=_LINE + 2)
    pen.ellipse((x - ring, y - ring, x + ring, y + ring), outline=TRUE_COLOUR, width=_LINE)
    _draw_name(pen, (x - ring - 8, y - ring), mark.name, TRUE_COLOUR)


def _draw_name(pen: ImageDraw.ImageDraw, place: tuple[float, float], name: str, colour: tuple[int, int, int]) -> None:
    pen.text(place, name, colour, font_size=_NAME_SIZE, stroke_width=1, stroke_fill=_EDGE_COLOUR)


def figure(picture: Picture) -> str:
    """The picture as an HTML element that needs no other file."""
    data = base64.b64encode(picture.jpeg).decode()
    caption = f"<figcaption>{escape(picture.caption)}</figcaption>" if picture.caption else ""
    return f'<figure><img alt="{escape(picture.caption)}" src="data:image/jpeg;base64,{data}">{caption}</figure>'
