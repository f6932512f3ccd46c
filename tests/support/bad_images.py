"""Bad and odd images, thousands of them, the same ones in every run."""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Iterator

from PIL import Image

SIZE = (24, 20)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind: bytes, body: bytes, wrong: int = 0) -> bytes:
    """A PNG chunk; wrong: added to its checksum."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body) ^ wrong)


def with_chunk(png: bytes, extra: bytes, *, last: bool = False) -> bytes:
    """A PNG with another chunk after its header, or before its end."""
    place = len(png) - 12 if last else 33
    return png[:place] + extra + png[place:]


def good_images() -> dict[str, bytes]:
    """One small image of every format and of the variants of JPEG, by name."""
    image = Image.linear_gradient("L").resize(SIZE).convert("RGB")
    frames = {"save_all": True, "append_images": [image.rotate(90), image.rotate(180)]}
    tags = Image.Exif()
    tags[0x0112] = 6
    return {
        "jpeg": encoded(image, "JPEG"),
        "exif": encoded(image, "JPEG", exif=tags),
        "progressive": encoded(image, "JPEG", progressive=True),
        "grey": encoded(image.convert("L"), "JPEG"),
        "cmyk": encoded(image.convert("CMYK"), "JPEG"),
        "mpo": encoded(image, "MPO", **frames),
        "png": encoded(image, "PNG", exif=tags),
        "palette": encoded(image.quantize(8), "PNG", transparency=2),
        "apng": encoded(image, "PNG", **frames),
        "gif": encoded(image, "GIF", **frames),
        "webp": encoded(image, "WEBP", **frames),
        "lossless": encoded(image, "WEBP", lossless=True, exif=tags),
        "avif": encoded(image, "AVIF"),
        "bmp": encoded(image, "BMP"),
        "tiff": encoded(image, "TIFF", exif=tags),
        "lzw": encoded(image, "TIFF", compression="tiff_lzw"),
        "ppm": encoded(image, "PPM"),
        "jpeg 2000": encoded(image, "JPEG2000"),
    }


def bad_images(tries: int, seed: int = 0) -> Iterator[tuple[str, bytes]]:
    """`tries` damaged images: cut, with flipped bytes, polyglots, with bytes put in or left out."""
    whole = list(good_images().items())
    for number in range(tries):
        dice = random.Random(seed * tries + number)
        name, data = whole[number % len(whole)]
        yield f"{name} {seed * tries + number}", _damaged(data, dice)


def _damaged(data: bytes, dice: random.Random) -> bytes:
    place = dice.randrange(min(len(data), 200) if dice.random() < 0.6 else len(data))
    few = dice.randbytes(dice.randint(1, 6))
    return (
        data[:place],
        data[:place] + few + data[place + len(few) :],
        data[:place] + few + data[place:],
        data[:place] + data[place + len(few) :],
        data[:place] + b"\xff" * len(few) + data[place + len(few) :],
        data + b"PK\x03\x04" + few,
        b"<html><body>" + data,
    )[dice.randrange(7)]
