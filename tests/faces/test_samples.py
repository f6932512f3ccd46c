"""Whatever is decoded is the picture on disk: depths, meanings and metadata, against samples written here."""

import zlib
from typing import Any

import numpy as np
import pytest
from bad_images import bad_images, chunk, encoded, good_images, tiff, with_chunk
from PIL import Image

from batchverify.faces.images import decode
from batchverify.records import DecodedImage, Limits, Reason, Skipped

WIDTH, HEIGHT = 24, 20
GREYS = np.linspace(0, 255, WIDTH * HEIGHT).round().astype(np.uint8).reshape(HEIGHT, WIDTH)


def outcome(data: bytes) -> DecodedImage | Skipped:
    return decode(data, Limits(pixels=1_000_000), 4096)


def pixels(data: bytes) -> np.ndarray:
    result = outcome(data)
    assert isinstance(result, DecodedImage), result
    return result.pixels


def packed(values: np.ndarray, bits: int) -> bytes:
    """Rows of samples of `bits` bits, high bit first, each row padded to bytes."""
    shifts = np.arange(bits - 1, -1, -1)
    return b"".join(np.packbits((row[:, None] >> shifts & 1).astype(np.uint8)).tobytes() for row in values)


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 12])
@pytest.mark.parametrize("white", [0, 1])
@pytest.mark.parametrize("width", [WIDTH, WIDTH - 1])
def test_tiffs_of_every_depth_have_their_white(bits, white, width):
    top = (1 << bits) - 1
    values = np.rint(GREYS[:, :width] / 255 * top).astype(int)
    data = tiff(packed(values, bits), width, HEIGHT, t258=(bits,), t262=white)
    wanted = np.rint((values if white else top - values) * (255 / top))
    if bits == 12 and not white:
        assert outcome(data).reason is Reason.UNDECODABLE
    else:
        assert np.array_equal(pixels(data)[..., 0], wanted)


@pytest.mark.parametrize(("order", "white"), [("<", 0), ("<", 1), (">", 1)])
def test_sixteen_bit_tiffs(order, white):
    values = GREYS.astype(np.uint16) * 257
    data = tiff(values.astype(f"{order}u2").tobytes(), WIDTH, HEIGHT, order, t258=(16,), t262=white)
    assert np.array_equal(pixels(data)[..., 0], GREYS if white else 255 - GREYS)


def test_whole_numbers_of_32_bits_are_scaled():
    values = GREYS.astype("<u4") * 0x01010101
    assert np.array_equal(pixels(tiff(values.tobytes(), WIDTH, HEIGHT, t258=(32,)))[..., 0], GREYS)


@pytest.mark.parametrize(
    "tags",
    [
        {"t262": None},
        {"t339": (2,)},
        {"t258": (16,), "t339": (2,)},
        {"t258": (32,), "t339": (3,), "t262": 0},
        {"t258": (16, 16, 16), "t262": 2, "t277": 3, "t284": 2, "t273": (8, 8, 8), "t279": (480, 480, 480)},
        {"t258": (8, 8, 8), "t262": 6, "t277": 3},
        {"t262": 3, "t320": tuple(range(256)) * 3},
        {"t262": 5, "t258": (8, 8, 8, 8), "t277": 4, "t332": 2},
        {"t278": 4},
    ],
    ids=str,
)
def test_tiffs_that_would_be_another_picture_are_refused_with_the_reason(tags):
    result = outcome(tiff(bytes(16 * GREYS.size), WIDTH, HEIGHT, **tags))
    assert isinstance(result, Skipped)
    assert result.reason is Reason.UNDECODABLE
    assert "TIFF that" in result.message


def test_planes_of_eight_bits_are_read():
    planes = np.stack([GREYS, 255 - GREYS, GREYS // 2])
    places = tuple(8 + each * GREYS.size for each in range(3))
    tags: dict[str, Any] = {"t258": (8, 8, 8), "t262": 2, "t277": 3, "t284": 2}
    tags |= {"t273": places, "t279": (GREYS.size,) * 3}
    assert np.array_equal(pixels(tiff(planes.tobytes(), WIDTH, HEIGHT, **tags)), np.moveaxis(planes, 0, 2))


@pytest.mark.parametrize("top", [1, 100, 255, 1000, 65535])
def test_ppm_is_scaled_by_its_largest_value(top):
    values = np.rint(GREYS / 255 * top).astype(">u2" if top > 255 else np.uint8)
    data = b"P5\n%d %d\n%d\n" % (WIDTH, HEIGHT, top) + values.tobytes()
    assert np.abs(pixels(data)[..., 0] - values * (255 / top)).max() <= 1
    dark = b"P5\n4 1\n65535\n" + b"\0\xc8" * 4
    assert pixels(dark).max() == 1


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_a_transparent_grey_of_any_depth_is_white(bits):
    top = (1 << bits) - 1
    values = np.tile(np.array([0, 1]), (2, 4))
    rows = b"".join(b"\0" + packed(row[None], bits) for row in values)
    header = b"\0\0\0\x08\0\0\0\x02" + bytes([bits, 0, 0, 0, 0])
    key = chunk(b"tRNS", b"\0\1")
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + key + chunk(b"IDAT", zlib.compress(rows))
    got = pixels(data + chunk(b"IEND", b""))[..., 0]
    assert np.array_equal(got, np.where(values == 1, 255, 0)), top


OPTIONAL = [
    chunk(b"zTXt", b"workflow\0\0" + zlib.compress(bytes(1_600_000))),
    chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(bytes(80_000_000), 9)),
    chunk(b"iCCP", b"p\0\0" + zlib.compress(bytes(1_200_000))),
    chunk(b"iCCP", b"p\0\7"),
    *(chunk(kind, b"\1") for kind in (b"pHYs", b"gAMA", b"cHRM", b"tIME", b"acTL", b"fcTL", b"fdAT")),
    *(chunk(kind, bytes(40), 1) for kind in (b"pHYs", b"tEXt", b"eXIf", b"tRNS", b"abCd", b"sRGB")),
    chunk(b"zTXt", b"a\0\5b"),
    chunk(b"tEXt", b"a\0" + bytes(2_000_000)) * 40,
]


@pytest.mark.parametrize("number", range(len(OPTIONAL)))
@pytest.mark.parametrize("last", [False, True])
def test_no_optional_chunk_decides_whether_pixels_are_read(number, last):
    plain = encoded(Image.fromarray(GREYS).convert("RGB"), "PNG")
    assert np.array_equal(pixels(with_chunk(plain, OPTIONAL[number], last=last)), pixels(plain))


def test_critical_chunks_that_are_unknown_or_damaged_are_refused():
    plain = encoded(Image.fromarray(GREYS), "PNG")
    assert "critical" in outcome(with_chunk(plain, chunk(b"CgBI", bytes(4)))).message
    place = plain.index(b"IDAT") + 8
    assert outcome(plain[:place] + b"\x55" + plain[place + 1 :]).reason is Reason.UNDECODABLE


@pytest.mark.parametrize("rows", [19, 20])
def test_a_png_that_ends_early_is_refused_and_a_black_one_is_read(rows):
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", b"\0\0\0\x18\0\0\0\x14\x08\0\0\0\0")
    data = start + chunk(b"IDAT", zlib.compress(bytes(25) * rows)) + chunk(b"IEND", b"")
    assert isinstance(outcome(data), DecodedImage if rows == HEIGHT else Skipped)


def test_a_jpeg_of_thousands_of_scans_is_too_large():
    whole = good_images()["progressive"]
    start = whole.rindex(b"\xff\xda")
    assert isinstance(outcome(whole), DecodedImage)
    assert outcome(whole[:start] + whole[start:-2] * 500 + b"\xff\xd9").reason is Reason.TOO_LARGE


def test_a_jpeg_of_thousands_of_segments_and_a_tiff_of_huge_tiles_are_too_large():
    whole = good_images()["jpeg"]
    segments = b"\xff\xe1\x00\x09Exif\0\0x" * 3000
    assert outcome(whole[:2] + segments + whole[2:]).reason is Reason.TOO_LARGE
    tags: dict[str, Any] = {
        "t273": None,
        "t278": None,
        "t279": None,
        "t322": 60_000,
        "t323": 60_000,
        "t324": (8,),
        "t325": (9,),
    }
    assert outcome(tiff(bytes(9), 8, 8, t259=5, **tags)).reason is Reason.TOO_LARGE


@pytest.mark.filterwarnings("ignore")
def test_ten_thousand_bad_images_are_pixels_or_a_reason():
    outcomes = {DecodedImage: 0, Skipped: 0}
    for name, data in bad_images(10_000):
        result = outcome(data)
        outcomes[type(result)] += 1
        if isinstance(result, Skipped):
            assert result.reason in (Reason.UNDECODABLE, Reason.TOO_LARGE), name
            assert 0 < len(result.message) < 200, name
        else:
            assert result.pixels.ndim == 3, name
    assert min(outcomes.values()) > 1000
    assert isinstance(outcome(b"\x89PNG\r\n\x1a\n"), Skipped)
    assert pixels(encoded(Image.new("L", (1, 60_000), 7), "PNG")).shape[2] == 3
