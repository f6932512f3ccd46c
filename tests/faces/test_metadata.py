"""No metadata decides whether an image is read, and none keeps the decoder busy."""

import io
import struct
import zlib

import numpy as np
import pytest
from bad_images import chunk, good_images
from PIL import Image, PngImagePlugin
from tiff_samples import Tiff

from batchverify.faces.images import decode
from batchverify.faces.metadata import scans, without_metadata
from batchverify.records import DecodedImage, Limits, Reason, Skipped

PIXELS = np.random.default_rng(0).integers(0, 256, (20, 24, 3), np.uint8)
LONG = b"a" * 1_560_000


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
    "a text with a wrong checksum": chunk(b"tEXt", b"prompt\0text", wrong=1),
    "EXIF with a wrong checksum": chunk(b"eXIf", b"II*\0nothing", wrong=1),
    "a short size": chunk(b"pHYs", b"\0"),
    "a short gamma": chunk(b"gAMA", b"\0"),
    "short primaries": chunk(b"cHRM", b"\0" * 5),
    "a short rendering": chunk(b"sRGB", b""),
    "a short time": chunk(b"tIME", b"\0"),
    "a private chunk": chunk(b"prVt", b"\0" * 9),
    "no frames": chunk(b"acTL", b"\0" * 8),
    "a short animation": chunk(b"acTL", b"\0"),
    "a frame": chunk(b"fdAT", b"\1"),
    "a large XMP": chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(bytes(80_000_000), 9)),
    "transparency with a wrong checksum": chunk(b"tRNS", bytes(40), wrong=1),
    "eighty megabytes of texts": chunk(b"tEXt", b"a\0" + bytes(2_000_000)) * 40,
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


def test_critical_chunks_that_are_unknown_or_damaged_are_refused():
    unknown = decode(with_chunk(chunk(b"CgBI", bytes(4))), Limits(), 4096)
    assert isinstance(unknown, Skipped)
    assert "critical" in unknown.message
    plain = with_chunk(b"")
    start = plain.index(b"IDAT") + 8
    damaged = decode(plain[:start] + b"\x55" + plain[start + 1 :], Limits(), 4096)
    assert isinstance(damaged, Skipped)
    assert damaged.reason is Reason.UNDECODABLE


@pytest.mark.parametrize("rows", [19, 20])
def test_a_png_that_ends_early_is_refused_and_a_black_one_is_read(rows):
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 24, 20, 8, 0, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(bytes(25) * rows)) + chunk(b"IEND", b"")
    result = decode(b"\x89PNG\r\n\x1a\n" + header + data, Limits(), 4096)
    assert isinstance(result, DecodedImage if rows == 20 else Skipped)


def test_a_jpeg_of_thousands_of_scans_is_too_large():
    whole = good_images()["progressive"]
    assert scans(whole, 201) > 1
    start = whole.rindex(b"\xff\xda")
    assert isinstance(decode(whole, Limits(), 4096), DecodedImage)
    result = decode(whole[:start] + whole[start:-2] * 500 + b"\xff\xd9", Limits(), 4096)
    assert isinstance(result, Skipped)
    assert result.reason is Reason.TOO_LARGE


def test_scans_behind_a_whole_image_are_damage():
    whole = good_images()["jpeg"]
    more = whole[:-2] + whole[whole.rindex(b"\xff\xda") : -2] * 500 + b"\xff\xd9"
    assert scans(more, 201) == 1
    result = decode(more, Limits(), 4096)
    assert isinstance(result, Skipped)
    assert result.reason is Reason.UNDECODABLE


def test_a_jpeg_of_thousands_of_segments_and_a_tiff_of_huge_tiles_are_too_large():
    whole = good_images()["jpeg"]
    tiles = {273: None, 278: None, 279: None, 259: (5,), 322: (60_000,), 323: (60_000,), 324: (8,), 325: (9,)}
    segments = whole[:2] + b"\xff\xe1\x00\x09Exif\0\0x" * 3000 + whole[2:]
    for data in (segments, Tiff(other=tiles).write(np.zeros((8, 8, 1)))):
        result = decode(data, Limits(), 4096)
        assert isinstance(result, Skipped)
        assert result.reason is Reason.TOO_LARGE
