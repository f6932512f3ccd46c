"""No chunk that pixels do not depend on decides whether a PNG is read."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from batchverify.faces.images import decode
from batchverify.faces.png import without_metadata
from batchverify.records import DecodedImage, Limits, Reason, Skipped

PIXELS = np.random.default_rng(0).integers(0, 256, (20, 24, 3), np.uint8)
LONG = b"a" * 1_560_000


def chunk(name: bytes, body: bytes, *, checksum: int | None = None) -> bytes:
    right = zlib.crc32(name + body)
    return (
        struct.pack(">I", len(body))
        + name
        + body
        + struct.pack(">I", right if checksum is None else checksum)
    )


def with_chunk(extra: bytes, *, behind: bytes = b"IHDR", **options) -> bytes:
    """The pixels as a PNG with one more chunk."""
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).save(buffer, "PNG", **options)
    data = buffer.getvalue()
    start = 8
    while True:
        length, name = struct.unpack_from(">I4s", data, start)
        start += 12 + length
        if name == behind:
            return data[:start] + extra + data[start:]


EXTRA = {
    "a compressed text": chunk(b"zTXt", b"prompt\0\0" + zlib.compress(LONG)),
    "an international text": chunk(b"iTXt", b"prompt\0\1\0\0\0" + zlib.compress(LONG)),
    "a profile": chunk(b"iCCP", b"profile\0\0" + zlib.compress(LONG)),
    "a profile that is none": chunk(b"iCCP", b"profile\0\0nothing"),
    "a method that nobody knows": chunk(b"zTXt", b"prompt\0\7nothing"),
    "a text with a wrong checksum": chunk(b"tEXt", b"prompt\0text", checksum=1),
    "EXIF with a wrong checksum": chunk(b"eXIf", b"II*\0nothing", checksum=1),
    "a short size": chunk(b"pHYs", b"\0"),
    "a short gamma": chunk(b"gAMA", b"\0"),
    "short primaries": chunk(b"cHRM", b"\0" * 5),
    "a short rendering": chunk(b"sRGB", b""),
    "a short time": chunk(b"tIME", b"\0"),
    "a private chunk": chunk(b"prVt", b"\0" * 9),
    "no frames": chunk(b"acTL", b"\0" * 8),
    "a short animation": chunk(b"acTL", b"\0"),
}


@pytest.mark.parametrize("kind", EXTRA)
@pytest.mark.parametrize("behind", [b"IHDR", b"IDAT"])
def test_metadata_costs_no_image(kind, behind):
    result = decode(with_chunk(EXTRA[kind], behind=behind), Limits(), 4096)
    assert isinstance(result, DecodedImage), result
    assert np.array_equal(result.pixels, PIXELS)


def test_a_hundred_texts_cost_no_image():
    texts = chunk(b"zTXt", b"prompt\0\0" + zlib.compress(b"a" * 1_000_000)) * 100
    result = decode(with_chunk(texts), Limits(), 4096)
    assert isinstance(result, DecodedImage)
    assert np.array_equal(result.pixels, PIXELS)


def test_orientation_and_transparency_stay():
    exif = Image.Exif()
    exif[0x0112] = 3
    data = with_chunk(EXTRA["a profile"], exif=exif, transparency=tuple(PIXELS[0, 0].tolist()))
    result = decode(data, Limits(), 4096)
    assert isinstance(result, DecodedImage)
    wanted = PIXELS[::-1, ::-1].copy()
    wanted[-1, -1] = 255
    assert np.array_equal(result.pixels, wanted)


def test_what_is_needed_is_still_needed():
    damaged = with_chunk(EXTRA["a profile"])
    result = decode(damaged[: len(damaged) * 3 // 4], Limits(), 4096)
    assert isinstance(result, Skipped)
    assert result.reason is Reason.UNDECODABLE
    large = with_chunk(EXTRA["a profile"])
    refused = decode(large, Limits(pixels=20 * 24 - 1), 4096)
    assert isinstance(refused, Skipped)
    assert refused.reason in (Reason.TOO_LARGE, Reason.UNDECODABLE)


def test_what_is_left_is_the_same_image_for_other_readers_too():
    info = PngImagePlugin.PngInfo()
    info.add_text("note", "text")
    plain = with_chunk(b"", pnginfo=info)
    left = without_metadata(plain)
    assert b"tEXt" not in left
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(left))), PIXELS)
    for end in range(len(plain)):
        assert without_metadata(plain[:end])[:8] == plain[: min(end, 8)]
