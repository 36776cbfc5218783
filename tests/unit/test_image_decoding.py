"""Files from outside: what decodes, and what ends in a DataError within bounded time and memory.

`python tests/unit/test_image_decoding.py FOLDER` decodes every file of FOLDER under a memory limit and prints what
became of each; a test runs it in a process of its own.
"""

from __future__ import annotations

import functools
import io
import json
import random
import resource
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from molmo2core.errors import DataError
from molmo2core.image_decoding import MAX_JPEG_SCANS, MAX_PIXELS, TooManyPixels, decode_image
from molmo2core.manifest.measure import measure_file
from molmo2core.testing.pictures import encoded, encoded_pictures, noise

PICTURES = encoded_pictures()
MEMORY_LIMIT = 3 << 30
"""Address space of the process that opens hostile files; the largest picture allowed takes 1.3 GB in four copies."""
SECONDS = 10.0
"""Processor time for one hostile file; the slowest took 3 s."""

PNG = b"\x89PNG\r\n\x1a\n"
SIDE = 9_400
"""Of the largest square pictures allowed."""
assert SIDE**2 <= MAX_PIXELS < (SIDE + 100) ** 2


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, pixels: bytes, *chunks: bytes) -> bytes:
    """RGB, 8 bits; `pixels` before compression."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return PNG + header + b"".join(chunks) + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")


def gif(width: int, height: int, frame: tuple[int, int], *blocks: bytes) -> bytes:
    screen = b"GIF89a" + struct.pack("<HH", width, height) + b"\x80\0\0" + bytes(6)
    image = b"\x2c" + struct.pack("<HHHH", 0, 0, *frame) + b"\0\x02\x02\x4c\x01\0\x3b"
    return screen + b"".join(blocks) + image


def tiff(width: int, height: int, **tags: int) -> bytes:
    """Grey, 8 bits, compressed by LZW, with more or other tags: `t322=5` sets the 32-bit tag 322."""
    standard = {256: width, 257: height, 258: 8, 259: 5, 262: 1, 277: 1}
    wanted = standard | {int(name[1:]): value for name, value in tags.items()}
    short = {258, 259, 262, 277}
    entries = [struct.pack("<HHII", tag, 3 if tag in short else 4, 1, wanted[tag]) for tag in sorted(wanted)]
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + b"".join(entries) + bytes(2000)


def webp_canvas(width: int, height: int) -> bytes:
    """An animation with a small frame on a large canvas."""
    still = encoded(Image.new("RGB", (8, 8)), "WEBP", lossless=True)[12:]
    place = bytes(6) + struct.pack("<I", 7)[:3] * 2 + b"\x64\0\0\0"
    canvas = b"\x02\0\0\0" + struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
    parts = [(b"VP8X", canvas), (b"ANIM", bytes(6)), (b"ANMF", place + still)]
    body = b"WEBP" + b"".join(kind + struct.pack("<I", len(content)) + content for kind, content in parts)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def with_size(jpeg: bytes, width: int, height: int) -> bytes:
    """A JPEG whose frame header states another size."""
    place = jpeg.find(b"\xff\xc0") + 5
    return jpeg[:place] + struct.pack(">HH", height, width) + jpeg[place + 4 :]


def with_scans(jpeg: bytes, count: int) -> bytes:
    """A progressive JPEG that repeats its last scan until it has `count`: a few bytes for a walk over all pixels."""
    last = jpeg[jpeg.rfind(b"\xff\xda") : -2]
    return jpeg[:-2] + last * (count - jpeg.count(b"\xff\xda")) + jpeg[-2:]


@functools.cache
def hostile_files() -> dict[str, tuple[bytes, str]]:
    """Name -> content, and words of what must come of it: an error's, or the shape of a harmless picture."""
    small = Image.fromarray(noise(48, 64))
    jpeg, black = encoded(small, "JPEG"), bytes(8 * 25)
    progressive = encoded(Image.new("L", (SIDE, SIDE), 128), "JPEG", progressive=True)
    exif_segment = b"\xff\xe1" + struct.pack(">H", 65_000) + b"Exif\0\0MM\0*" + bytes(64_988)
    icc_segment = b"\xff\xe2" + struct.pack(">H", 65_000) + b"ICC_PROFILE\0\1\1" + bytes(64_984)
    turned, deflated = Image.Exif(), b"k\0\0" + zlib.compress(bytes(50 << 20))
    turned[0x0112] = 6
    palette = small.convert("P")
    turning = [palette.rotate(angle) for angle in range(500)]
    return {
        "PNG of 10^10 pixels": (png(100_000, 100_000, bytes(1000)), "pixels"),
        "PNG of 2^62 pixels": (png(2**31 - 1, 2**31 - 1, bytes(1000)), "pixels"),
        "PNG just too large": (png(SIDE + 100, SIDE + 100, bytes(1000)), f"{SIDE + 100} x {SIDE + 100} pixels"),
        "PNG without pixels": (png(0, 0, b""), "expected a picture"),
        "PNG of one line": (encoded(Image.new("RGB", (65_535, 1)), "PNG"), "(1, 65535, 3)"),
        "PNG of one column": (encoded(Image.new("RGB", (1, 65_535)), "PNG"), "(65535, 1, 3)"),
        "PNG with 100 MB of pixels for 64": (png(8, 8, bytes(100 << 20)), "(8, 8, 3)"),
        "PNG with 50 MB of text": (png(8, 8, black, chunk(b"zTXt", deflated)), "too large"),
        "PNG with 50 MB of profile": (png(8, 8, black, chunk(b"iCCP", deflated)), "too large"),
        "PNG with 200 texts of 1 MB": (
            png(8, 8, black, *[chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(1 << 20)))] * 200),
            "Too much memory",
        ),
        "PNG with 10^6 chunks": (png(8, 8, black, chunk(b"prIv", b"") * 1_000_000), "no pixel within"),
        "GIF of 65535 x 65535": (gif(65_535, 65_535, (65_535, 65_535)), "pixels"),
        "GIF with a frame beyond its screen": (gif(10, 10, (65_535, 65_535)), "pixels"),
        "GIF with 10^6 comments": (gif(10, 10, (10, 10), b"\x21\xfe\x04aaaa\0" * 1_000_000), "no pixel within"),
        "GIF with a comment of 10 MB": (
            gif(10, 10, (10, 10), b"\x21\xfe" + (b"\xff" + b"a" * 255) * 40_000 + b"\0"),
            "no pixel within",
        ),
        "GIF of 500 frames": (
            encoded(palette, "GIF", save_all=True, append_images=turning),
            "(48, 64, 3)",
        ),
        "TIFF of 10^10 pixels": (tiff(100_000, 100_000, t273=8, t278=100_000, t279=1000), "pixels"),
        "TIFF with tiles larger than itself": (
            tiff(16, 16, t322=40_000, t323=40_000, t324=8, t325=1000),
            "40000 x 40000",
        ),
        "TIFF with 2^31 rows in a strip": (tiff(16, 16, t273=8, t278=2**31, t279=2**31 - 1), "do not decode"),
        "TIFF with 65535 samples": (tiff(16, 16, t273=8, t277=65_535, t278=16, t279=1000), "expected a picture"),
        "TIFF that leads back to itself": (b"II*\0" + struct.pack("<IHI", 8, 0, 8), "expected a picture"),
        "TIFF with 65535 tags": (
            b"II*\0" + struct.pack("<IH", 8, 65_535) + struct.pack("<HHII", 256, 4, 2**31 - 1, 0) * 65_535,
            "expected a picture",
        ),
        "WebP with a canvas of 268 megapixels": (webp_canvas(16_384, 16_384), "pixels"),
        "WebP with a canvas of 3.6 gigapixels": (webp_canvas(60_000, 60_000), "do not decode"),
        "BMP of 10^10 pixels": (
            b"BM" + struct.pack("<IHHIIiiHHIIiiII", 154, 0, 0, 54, 40, 10**5, -(10**5), 1, 24, *[0] * 6) + bytes(100),
            "pixels",
        ),
        "PPM of 10^10 pixels": (b"P6 99999 99999 255\n" + bytes(100), "pixels"),
        "PPM with a comment of 10 MB": (b"P6\n" + b"#" * 10_000_000, "no pixel within"),
        "JPEG of 65500 x 65500": (with_size(jpeg, 65_500, 65_500), "pixels"),
        "JPEG with 20 MB of EXIF": (jpeg[:2] + exif_segment * 300 + jpeg[2:], "(48, 64, 3)"),
        "JPEG with 80 MB of profile": (jpeg[:2] + icc_segment * 1200 + jpeg[2:], "no pixel within"),
        "JPEG with 10^7 fill bytes": (jpeg[:2] + b"\xff" * 10_000_000 + jpeg[2:], "no pixel within"),
        "JPEG with EXIF of nonsense": (
            jpeg[:2] + b"\xff\xe1" + struct.pack(">H", 48) + b"Exif\0\0" + bytes(range(40)) + jpeg[2:],
            "(48, 64, 3)",
        ),
        "JPEG of 5000 scans": (with_scans(progressive, 5000), "a JPEG of 5000 scans"),
        "JPEG of as many scans as allowed": (with_scans(progressive, MAX_JPEG_SCANS), f"({SIDE}, {SIDE}, 3)"),
        "JPEG as large as allowed, CMYK": (
            encoded(Image.new("CMYK", (SIDE, SIDE)), "JPEG"),
            f"({SIDE}, {SIDE}, 3)",
        ),
        "JPEG as large as allowed, turned": (
            encoded(Image.new("RGB", (SIDE, SIDE)), "JPEG", exif=turned),
            f"({SIDE}, {SIDE}, 3)",
        ),
        "JPEG's first bytes": (jpeg[:3], "expected a picture"),
        "no bytes": (b"", "no bytes"),
        "text": (b"hello " * 100, "no picture that can be opened (begins with b'hello"),
        "SVG": (b'<svg xmlns="http://www.w3.org/2000/svg" width="99999"/>', "an SVG drawing"),
        "PDF": (b"%PDF-1.7\n" + bytes(100), "a PDF document"),
        "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "a PostScript document"),
        "HEIC": (b"\0\0\0\x18ftypheic" + bytes(100), "an HEIC picture"),
        "AVIF with nothing in it": (b"\0\0\0\x18ftypavif" + bytes(100), "an AVIF picture that this Pillow cannot open"),
        "video": (b"\0\0\0\x18ftypisom" + bytes(100), "a video"),
        "ZIP": (b"PK\x03\x04" + bytes(100), "expected a picture"),
    }  # fmt: skip


def decode_files(folder: Path) -> None:
    """Print one JSON object per file: name, what came of it, processor seconds."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    for path in sorted(folder.iterdir()):
        started = time.process_time()
        try:
            outcome = str(decode_image(path.read_bytes(), "d/7").shape)
        except DataError as error:
            outcome = f"{type(error).__name__}: {error}"
        print(json.dumps([path.name, outcome, time.process_time() - started]), flush=True)


def test_hostile_files_end_in_bounded_time_and_memory(tmp_path: Path) -> None:
    """A bomb that is decoded would run into the memory limit and end the process without a line for its file."""
    files = hostile_files()
    for number, (content, _) in enumerate(files.values()):
        (tmp_path / f"{number:03}").write_bytes(content)
    command = [sys.executable, __file__, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    found = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(found) == len(files)
    for (name, (_, words)), (_, outcome, seconds) in zip(files.items(), found, strict=True):
        assert words in outcome, (name, outcome)
        assert outcome.startswith(("DataError: d/7: ", "TooManyPixels: d/7: ", "(")), (name, outcome)
        assert seconds < SECONDS, (name, seconds)


def test_validation_and_loading_agree_on_hostile_files() -> None:
    """What the loader refuses never passes validation, and `oversized_file` is what has too many pixels."""
    cheap = {name: content for name, (content, _) in hostile_files().items() if len(content) < 100_000}
    assert len(cheap) > 20
    for name, content in cheap.items():
        facts = measure_file(content, "image")
        try:
            shape = decode_image(content).shape
        except TooManyPixels:
            assert facts.fault == "oversized_file", name
        except DataError:
            assert facts.fault == ("broken_file" if content else "empty_file"), name
        else:
            assert facts.size == (shape[1], shape[0]), name


@pytest.mark.parametrize("name", PICTURES)
def test_truncated_files_are_data_errors(name: str) -> None:
    """Cut at forty places and at each of the last 24 bytes: an error, or all pixels where only trailing bytes fell."""
    content, whole = PICTURES[name], decode_image(PICTURES[name])
    lengths = {*range(0, len(content), len(content) // 40), *range(len(content) - 24, len(content))}
    num_errors = 0
    for length in sorted(lengths):
        try:
            pixels = decode_image(content[:length])
        except DataError:
            num_errors += 1
        else:
            np.testing.assert_array_equal(pixels, whole, err_msg=f"{name} cut to {length} of {len(content)} bytes")
    several = any(word in name for word in ("animated", "several"))
    assert num_errors >= (3 if several else 38), "of several pictures only the first counts"


def test_altered_files_never_raise_anything_else(capfd: pytest.CaptureFixture[str]) -> None:
    """8,000 files with up to eight wrong bytes, mostly in the header; 0.4 ms each."""
    rng = random.Random(0)
    names = sorted(PICTURES)
    decoded = 0
    for _ in range(8_000):
        content = bytearray(PICTURES[rng.choice(names)])
        reach = min(rng.choice([64, 400, 20_000]), len(content))
        for _ in range(rng.randint(1, 8)):
            content[rng.randrange(reach)] = rng.randrange(256)
        try:
            decode_image(bytes(content))
        except DataError:
            continue
        decoded += 1
    assert 500 < decoded < 7_500
    capfd.readouterr()  # libtiff and libavif complain on their own


@pytest.mark.parametrize("orientation", range(1, 9))
def test_all_orientations(orientation: int) -> None:
    """Row and column of the stored picture that are displayed at the top and at the left (EXIF 2.3, tag 274)."""
    stored = noise(20, 30)
    exif = Image.Exif()
    exif[0x0112] = orientation
    displayed = {
        1: stored,
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: stored.transpose(1, 0, 2),
        6: stored[::-1].transpose(1, 0, 2),
        7: stored[::-1, ::-1].transpose(1, 0, 2),
        8: stored[:, ::-1].transpose(1, 0, 2),
    }[orientation]
    np.testing.assert_array_equal(decode_image(encoded(Image.fromarray(stored), "PNG", exif=exif)), displayed)


def test_alpha_is_dropped_and_the_first_frame_taken() -> None:
    """No white matte: hidden colours appear, as in training."""
    colour = noise(8, 9)
    hidden = np.dstack([colour, np.zeros((8, 9), np.uint8)])
    np.testing.assert_array_equal(decode_image(encoded(Image.fromarray(hidden), "PNG")), colour)
    frames = [Image.fromarray(noise(8, 9 + n)).resize((9, 8)) for n in range(3)]
    first = np.asarray(frames[0])
    for form in ("PNG", "TIFF"):
        several = encoded(frames[0], form, save_all=True, append_images=frames[1:])
        np.testing.assert_array_equal(decode_image(several), first)


def test_jpeg_is_decoded_at_full_size_and_profiles_are_ignored() -> None:
    """Pillow's draft mode decodes faster to other pixels; a profile would shift every colour."""
    photograph = Image.fromarray(noise(640, 480)).resize((1920, 2560), Image.Resampling.BICUBIC)
    plain = encoded(photograph, "JPEG")
    assert decode_image(plain).shape == (2560, 1920, 3)
    np.testing.assert_array_equal(decode_image(plain), np.asarray(Image.open(io.BytesIO(plain))))
    np.testing.assert_array_equal(
        decode_image(encoded(photograph, "JPEG", icc_profile=bytes(500))), decode_image(plain)
    )


if __name__ == "__main__":
    decode_files(Path(sys.argv[1]))
