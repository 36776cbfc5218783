"""Encoded pictures -> RGB pixels as displayed: the one place where image files from outside are opened.

Validation and loading call the same function, so that a row that was validated decodes, and one that does not was
refused.  Nothing is approximated: JPEG is decoded at full size (libjpeg's reduced "draft" sizes have other pixels).
"""

from __future__ import annotations

import io
import warnings
from typing import Final

import numpy as np
from PIL import Image, UnidentifiedImageError

from molmo2core.errors import DataError
from molmo2core.examples import ByteArray

MAX_PIXELS: Final = 89_000_000
"""Pixels of one image or frame at most; Pillow takes little more for a decompression bomb."""
MAX_JPEG_SCANS: Final = 100
"""Passes of a progressive JPEG at most (encoders write about ten): each costs 15 bytes and a walk over all pixels."""
MAX_HEADER_READS: Final = 20_000
MAX_HEADER_BYTES: Final = 64_000_000
"""What Pillow may read before the first pixel.  It joins the comments of a GIF one by one: 10 MB of them took 79 s."""
FORMATS: Final = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""Pillow's names of what is opened.  Its other plugins stay closed to files from outside: EPS starts Ghostscript."""

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # MAX_PIXELS is lower and an error

_ORIENTATION = 0x0112
_AS_DISPLAYED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> what makes it upright; 1 and anything else is upright."""
_TIFF_TILE_SIDES = (322, 323)
_JPEG = b"\xff\xd8"
_UNREADABLE = {
    b"ftyphei": "an HEIC picture",
    b"ftypmif1": "an HEIC picture",
    b"ftypavif": "an AVIF picture that this Pillow cannot open",
    b"ftyp": "a video",
    b"%PDF": "a PDF document",
    b"%!PS": "a PostScript document",
    b"<svg": "an SVG drawing",
    b"<?xml": "an XML document",
    b"<html": "a web page",
    b"<!DOCTYPE": "a document",
    b"jP  \r\n": "a JPEG 2000 picture",
    b"\x00JXL": "a JPEG XL picture",
    b"8BPS": "a Photoshop document",
}
"""Marks within the first bytes of what people deliver by mistake, more special ones first."""
_MARK_REACH = 16


class TooManyPixels(DataError):
    """A picture above MAX_PIXELS."""


class _MeteredFile(io.BytesIO):
    """A file in memory of which only so much can be read as long as it is `metered`."""

    metered = True
    _reads, _bytes = 0, 0

    def read(self, size: int | None = -1, /) -> bytes:
        """As BytesIO; raises ValueError above the limits."""
        content = super().read(size)
        if self.metered:
            self._reads, self._bytes = self._reads + 1, self._bytes + len(content)
            if self._reads > MAX_HEADER_READS or self._bytes > MAX_HEADER_BYTES:
                raise ValueError(f"no pixel within {self._reads} pieces and {self._bytes} bytes of header")
        return content


def decode_image(data: bytes, where: str = "image") -> ByteArray:
    """RGB pixels as displayed: EXIF orientation applied, first frame or page, alpha dropped, ICC profile ignored.

    Modes other than RGB are converted as Pillow does, because the released processors do (model.md 4.1 step 1):
    16-bit greys are cut at 255, not scaled.  EXIF that cannot be read counts as none.

    Returns:
        [height, width, 3] uint8, read-only.

    Raises:
        TooManyPixels: more than MAX_PIXELS are declared; none is decoded then.
        DataError: the bytes are no complete picture of FORMATS.
    """
    if (scans := _num_jpeg_scans(data)) > MAX_JPEG_SCANS:
        expected = f"at most {MAX_JPEG_SCANS}"
        raise DataError(where, found=f"a JPEG of {scans} scans", expected=expected, mend="save it anew")
    try:
        file = _MeteredFile(data)
        with Image.open(file, formats=FORMATS) as image:
            file.metered = False
            _refuse_oversized(image, where)
            image.load()
            upright = _upright(image)
            return np.asarray(upright if upright.mode == "RGB" else upright.convert("RGB"))  # convert would copy
    except DataError:
        raise
    except UnidentifiedImageError:
        expected = f"a picture: {', '.join(FORMATS)}"
        raise DataError(where, found=_described(data), expected=expected, mend="convert it to JPEG or PNG") from None
    except Image.DecompressionBombError as error:  # while opening, from twice Pillow's own limit
        raise TooManyPixels(where, found=str(error), expected=f"at most {MAX_PIXELS} pixels") from None
    except Exception as error:  # Pillow's plugins raise whatever they stumble over in bytes from outside
        raise DataError(
            where,
            found=f"{len(data)} bytes that do not decode: {type(error).__name__}: {error}",
            expected="a complete picture",
            mend="deliver it again",
        ) from error


def _num_jpeg_scans(data: bytes) -> int:
    """Marks that start a scan; nothing else in a JPEG's pixels looks like them."""
    if not data.startswith(_JPEG):
        return 0
    values = np.frombuffer(data, np.uint8)  # eight times as fast as bytes.count
    return int(np.count_nonzero((values[:-1] == 0xFF) & (values[1:] == 0xDA)))


def _refuse_oversized(image: Image.Image, where: str) -> None:
    """Before anything is decoded; a TIFF's tiles can be larger than its picture, and are held in memory whole."""
    tags = getattr(image, "tag_v2", {})
    tile_width, tile_height = (tags.get(tag, 0) for tag in _TIFF_TILE_SIDES)
    for width, height in (image.size, (tile_width, tile_height)):
        if width * height > MAX_PIXELS:
            raise TooManyPixels(
                where, found=f"{width} x {height} pixels", expected=f"at most {MAX_PIXELS}", mend="scale it down"
            )


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(_ORIENTATION)
    except Exception:  # as varied as what writes EXIF; the picture itself is fine
        return image
    method = _AS_DISPLAYED.get(orientation) if isinstance(orientation, int) else None
    return image if method is None else image.transpose(method)


def _described(data: bytes) -> str:
    """What bytes that are no picture of FORMATS seem to be."""
    if not data:
        return "no bytes"
    start = data[:_MARK_REACH]
    kind = next((name for mark, name in _UNREADABLE.items() if mark in start), "no picture that can be opened")
    return f"{kind} (begins with {start!r})"
