"""Draw scenes with Pillow and encode them as JPEG and H.264 MP4 (PyAV)."""

from __future__ import annotations

import io
import itertools
import math
from fractions import Fraction
from typing import Any

import av
from PIL import Image, ImageDraw

from molmo2core.sources.shapes_scene import COLOURS, Background, MovingScene, Scene, Shape

_SUPERSAMPLING = 3
_BAR_COLOUR = (120, 120, 120)
_TIME_BASE = Fraction(1, 90_000)
_ENCODING = {"preset": "veryfast", "crf": "18", "x264-params": "cpu-independent=1"}
"""With fast arithmetic (the default) x264 gives other bytes from run to run, seen in about every tenth video."""
_EXIF_ORIENTATION = 0x0112
_ROTATED_CLOCKWISE_FOR_DISPLAY = 6


def draw(scene: Scene) -> Image.Image:
    """The scene as RGB, antialiased by supersampling."""
    scale = _SUPERSAMPLING
    canvas = _backdrop(scene.background, scene.width, scene.height).resize(
        (scene.width * scale, scene.height * scale), Image.Resampling.NEAREST
    )
    pen = ImageDraw.Draw(canvas)
    for shape in scene.shapes:
        _draw_shape(pen, shape, scale)
    if scene.bar:
        pen.rectangle((scene.bar[0] * scale, 0, scene.bar[1] * scale, scene.height * scale), fill=_BAR_COLOUR)
    return canvas.reduce(scale)


def encode_jpeg(image: Image.Image, *, exif_rotated: bool = False) -> bytes:
    """JPEG bytes without chroma subsampling.

    Args:
        image: the displayed picture.
        exif_rotated: store it lying on its side, with the EXIF orientation that turns it upright for display.
    """
    exif = Image.Exif()
    if exif_rotated:
        exif[_EXIF_ORIENTATION] = _ROTATED_CLOCKWISE_FOR_DISPLAY
        image = image.transpose(Image.Transpose.ROTATE_90)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=92, subsampling=0, exif=exif)
    return buffer.getvalue()


def encode_mp4(scene: MovingScene, *, rotation: int = 0, b_frames: int = 0) -> bytes:
    """H.264 MP4 bytes of `scene`, one coded frame per entry of `frame_times`.

    Args:
        scene: what is displayed.
        rotation: 0, 90, 180 or 270: store frames so turned that the file's display matrix must turn them this far
            clockwise for display, as phones do.
        b_frames: consecutive B frames at most; coding order then differs from display order.
    """
    turned = rotation in (90, 270)
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", options=_ENCODING | {"bf": str(b_frames)})
        stream.width, stream.height = (scene.height, scene.width) if turned else (scene.width, scene.height)
        stream.pix_fmt = "yuv420p"
        stream.time_base = stream.codec_context.time_base = _TIME_BASE
        stream.codec_context.gop_size = 24
        stream.codec_context.thread_count = 1  # also for the sake of equal bytes
        if rotation:
            stream.set_display_rotation(-rotation)  # PyAV counts counter-clockwise
        ticks = [round(time / _TIME_BASE) for time in (*scene.frame_times, scene.duration)]
        lasts = {start: end - start for start, end in itertools.pairwise(ticks)}
        frames = (_video_frame(draw(scene.at(time)), rotation) for time in scene.frame_times)
        for start, frame in zip(ticks[:-1], frames, strict=True):
            frame.pts, frame.time_base = start, _TIME_BASE
            container.mux(_timed(stream.encode(frame), lasts))
        container.mux(_timed(stream.encode(None), lasts))
    return buffer.getvalue()


def _timed(packets: list[av.Packet[Any]], lasts: dict[int, int]) -> list[av.Packet[Any]]:
    """The packets with their durations, else the muxer guesses how long the last frame is shown."""
    for packet in packets:
        assert packet.pts is not None
        packet.duration = lasts[packet.pts]
    return packets


def _video_frame(picture: Image.Image, rotation: int) -> av.VideoFrame:
    frame: av.VideoFrame = av.VideoFrame.from_image(picture.rotate(rotation, expand=True) if rotation else picture)
    return frame


def _backdrop(background: Background, width: int, height: int) -> Image.Image:
    column = Image.new("RGB", (1, height))
    for row in range(height):
        share = row / max(height - 1, 1)
        mixed = tuple(round(a + (b - a) * share) for a, b in zip(background.top, background.bottom, strict=True))
        column.putpixel((0, row), mixed)
    return column.resize((width, height), Image.Resampling.NEAREST)


def _draw_shape(pen: ImageDraw.ImageDraw, shape: Shape, scale: int) -> None:
    x, y, radius = shape.x * scale, shape.y * scale, shape.radius * scale
    colour = COLOURS[shape.colour]
    if shape.form == "circle":
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
    elif shape.form == "square":
        half = radius / math.sqrt(2)
        pen.rectangle((x - half, y - half, x + half, y + half), fill=colour)
    elif shape.form == "triangle":
        angles = (math.radians(angle) for angle in (-90, 30, 150))
        pen.polygon([(x + radius * math.cos(a), y + radius * math.sin(a)) for a in angles], fill=colour)
    else:
        arm = radius / 3
        pen.rectangle((x - arm, y - radius, x + arm, y + radius), fill=colour)
        pen.rectangle((x - radius, y - arm, x + radius, y + arm), fill=colour)
