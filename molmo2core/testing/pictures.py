"""Photographs, and small pictures in every mode and file format that people deliver."""

from __future__ import annotations

import io
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from molmo2core.examples import ByteArray

_SIZE = (90, 70)
"""(width, height) of the small pictures."""


def noise(height: int, width: int) -> ByteArray:
    """[height, width, 3] uint8, the same for each size."""
    return np.random.default_rng(height * 10_000 + width).integers(0, 256, (height, width, 3), dtype=np.uint8)


def photographs() -> dict[str, bytes]:
    """JPEG files that installed packages ship for their examples: (427, 640), (427, 640) and (600, 512) pixels."""
    return {
        "temple": (_folder("sklearn") / "datasets/images/china.jpg").read_bytes(),
        "flower": (_folder("sklearn") / "datasets/images/flower.jpg").read_bytes(),
        "portrait": (_folder("matplotlib") / "mpl-data/sample_data/grace_hopper.jpg").read_bytes(),
    }


def grown_photograph(data: bytes, width: int, height: int) -> bytes:
    """A photograph enlarged and given grain, so that neither JPEG nor resizing finds it smooth."""
    image = Image.open(io.BytesIO(data)).convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    grain = np.random.default_rng(0).normal(0, 6, (height, width, 3)).astype(np.float32)
    pixels = np.clip(np.asarray(image) + grain, 0, 255).astype(np.uint8)
    return encoded(Image.fromarray(pixels), "JPEG", quality=90)


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    """`image` as a file of Pillow's format `form`."""
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def encoded_pictures() -> dict[str, bytes]:
    """One blurred-noise picture of 90 x 70 pixels as a file in every mode and format."""
    width, height = _SIZE
    rgb = Image.fromarray(noise(height, width)).filter(ImageFilter.GaussianBlur(2))
    turned = [rgb.rotate(angle) for angle in (30, 60)]
    return _oriented(rgb) | _of_every_mode(rgb) | _deep() | _of_several(rgb, turned) | _of_every_format(rgb)


def _oriented(rgb: Image.Image) -> dict[str, bytes]:
    pictures = {}
    for orientation in range(9):  # 0 is none of the eight and means nothing
        exif = Image.Exif()
        exif[0x0112] = orientation
        pictures[f"JPEG, orientation {orientation}"] = encoded(rgb, "JPEG", exif=exif)
        pictures[f"PNG, orientation {orientation}"] = encoded(rgb, "PNG", exif=exif)
        pictures[f"WebP, orientation {orientation}"] = encoded(rgb, "WEBP", lossless=True, exif=exif)
        if orientation:
            pictures[f"TIFF, orientation {orientation}"] = encoded(rgb, "TIFF", tiffinfo={274: orientation})
    return pictures


def _of_every_mode(rgb: Image.Image) -> dict[str, bytes]:
    grey, palette, rgba = rgb.convert("L"), rgb.convert("P"), rgb.copy()
    alpha = grey.transpose(Image.Transpose.ROTATE_180)
    rgba.putalpha(alpha)
    exif = Image.Exif()
    exif[0x0112] = 6
    return {
        "PNG, grey": encoded(grey, "PNG"),
        "PNG, grey with a transparent level": encoded(grey, "PNG", transparency=99),
        "PNG, grey and alpha": encoded(Image.merge("LA", (grey, alpha)), "PNG"),
        "PNG, RGBA": encoded(rgba, "PNG"),
        "PNG, RGBA turned": encoded(rgba, "PNG", exif=exif),
        "PNG, RGB with a transparent colour": encoded(rgb, "PNG", transparency=(9, 9, 9)),
        "PNG, palette": encoded(palette, "PNG"),
        "PNG, palette with a transparent entry": encoded(palette, "PNG", transparency=7),
        "PNG, palette with alpha": encoded(palette, "PNG", transparency=bytes(range(256))),
        "PNG, 1 bit": encoded(rgb.convert("1"), "PNG"),
        "JPEG, grey": encoded(grey, "JPEG"),
        "JPEG, CMYK": encoded(rgb.convert("CMYK"), "JPEG"),
        "WebP, RGBA": encoded(rgba, "WEBP"),
        "TIFF, 1 bit": encoded(rgb.convert("1"), "TIFF", compression="group4"),
        "TIFF, CMYK": encoded(rgb.convert("CMYK"), "TIFF"),
        "TIFF, YCbCr": encoded(rgb.convert("YCbCr"), "TIFF", compression="tiff_lzw"),
        "TIFF, LAB": encoded(Image.frombytes("LAB", _SIZE, rgb.tobytes()), "TIFF"),
    }


def _deep() -> dict[str, bytes]:
    width, height = _SIZE
    deep = np.random.default_rng(1).integers(0, 65536, (height, width)).astype(np.uint16)
    return {
        "16 bit PNG": encoded(Image.fromarray(deep), "PNG"),
        "16 bit TIFF": encoded(Image.fromarray(deep), "TIFF"),
        "16 bit TIFF, big end first": encoded(Image.frombytes("I;16B", _SIZE, deep.astype(">u2").tobytes()), "TIFF"),
        "32 bit TIFF": encoded(Image.fromarray(deep.astype(np.int32)), "TIFF"),
        "float TIFF": encoded(Image.fromarray(deep.astype(np.float32) / 200), "TIFF"),
    }


def _of_several(rgb: Image.Image, others: list[Image.Image]) -> dict[str, bytes]:
    palettes = [image.convert("P") for image in others]
    several: dict[str, Any] = {"save_all": True, "append_images": others}
    return {
        "animated GIF": encoded(rgb.convert("P"), "GIF", save_all=True, append_images=palettes),
        "animated WebP": encoded(rgb, "WEBP", lossless=True, **several),
        "animated PNG": encoded(rgb, "PNG", **several),
        "TIFF of several pages": encoded(rgb, "TIFF", **several),
        "JPEG of several pictures": encoded(rgb, "MPO", **several),
    }


def _of_every_format(rgb: Image.Image) -> dict[str, bytes]:
    return {
        "JPEG, progressive": encoded(rgb, "JPEG", progressive=True),
        "JPEG, half the colours, odd size": encoded(rgb.crop((0, 0, 89, 69)), "JPEG", subsampling=2),
        "JPEG with a colour profile": encoded(rgb, "JPEG", icc_profile=bytes(3000)),
        "BMP": encoded(rgb, "BMP"),
        "PPM": encoded(rgb, "PPM"),
        "AVIF": encoded(rgb, "AVIF"),
    }


def _folder(package: str) -> Path:
    spec = find_spec(package)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent
