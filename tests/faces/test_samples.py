"""Samples of every depth and meaning against those a file was written from: the image, or `undecodable`."""

import io
import struct
import zlib
from itertools import product

import numpy as np
import pytest
from bad_images import chunk
from PIL import Image
from tiff_samples import BLACK_IS_ZERO, FLOAT, PALETTE, RGB, SIGNED, UNSIGNED, WHITE_IS_ZERO, Tiff

from batchverify.cache.image_keys import content_key
from batchverify.faces.images import decode
from batchverify.records import DecodedImage, Limits, Reason, Skipped

CMYK, YCBCR, LAB, CFA, LINEAR_RAW = 5, 6, 8, 32803, 34892
GREY = np.linspace(0, 1, 24 * 20).reshape(20, 24, 1)
COLOURS = np.concatenate([GREY, GREY[::-1], GREY[:, ::-1]], axis=2)
ONE = np.ones((20, 24, 1))


def error(data: bytes, wanted: np.ndarray) -> float | None:
    """The largest difference in grey levels to (H, W, 1 or 3) shares of white; None if it is undecodable."""
    result = decode(data, Limits(), 4096)
    if isinstance(result, DecodedImage):
        return float(np.abs(result.pixels - 255 * wanted).max())
    assert result.reason is Reason.UNDECODABLE
    return None


def samples(tiff: Tiff, shares: np.ndarray) -> np.ndarray:
    """Shares of white as the samples of a file."""
    if tiff.photometric == WHITE_IS_ZERO:
        shares = 1 - shares
    if tiff.sample_format == FLOAT:
        return shares
    return np.rint(shares * (2 ** (tiff.bits - (tiff.sample_format == SIGNED)) - 1)).astype(np.int64)


DEPTHS = [
    *product([UNSIGNED], [1, 2, 4, 6, 8, 10, 12, 14, 16, 32]),
    *product([SIGNED], [8, 16, 32]),
    *product([FLOAT], [16, 32, 64]),
]
# What must not be lost, whatever else is undecodable: (photometric, format, bits) in either byte order.
READ = {
    *product([WHITE_IS_ZERO, BLACK_IS_ZERO], [UNSIGNED], [1, 2, 4, 8]),
    (BLACK_IS_ZERO, UNSIGNED, 16),
    (BLACK_IS_ZERO, FLOAT, 32),
    (RGB, UNSIGNED, 8),
    (RGB, UNSIGNED, 16),
}


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("photometric", [WHITE_IS_ZERO, BLACK_IS_ZERO, RGB])
@pytest.mark.parametrize(("kind", "bits"), DEPTHS)
def test_what_is_decoded_is_the_image(order, photometric, kind, bits):
    shares = COLOURS if photometric == RGB else GREY
    # The nearest step of few bits, and what Pillow drops of 16 bits of a colour.
    allowed = 255 / (2 ** min(bits, 8) - 1) / 2 + 0.5
    for planar, fill_order in product([False, True], [1, 2]):
        if fill_order == 2 and (bits > 8 or kind == FLOAT):
            continue
        tiff = Tiff(bits, kind, photometric, planar, order, fill_order)
        found = error(tiff.write(samples(tiff, shares)), shares)
        assert found is None or found <= allowed, tiff
        if (photometric, kind, bits) in READ and not planar and fill_order == 1:
            assert found is not None


@pytest.mark.parametrize("photometric", [WHITE_IS_ZERO, BLACK_IS_ZERO])
@pytest.mark.parametrize("bits", [12, 16, 32])
def test_deep_greys_are_scaled_by_their_depth(photometric, bits):
    # Pillow reads 12 and 32 bits where black is zero and the low byte comes first.
    tiff = Tiff(bits, photometric=photometric)
    found = error(tiff.write(samples(tiff, GREY)), GREY)
    assert found is None or found <= 0.6
    assert found is not None or (photometric == WHITE_IS_ZERO and bits != 16)


def test_dark_greys_stay_dark_whatever_their_depth():
    for bits in (12, 16, 32):
        dark = np.full((20, 24, 1), 2**bits // 100)
        result = decode(Tiff(bits).write(dark), Limits(), 4096)
        assert isinstance(result, DecodedImage)
        assert set(np.unique(result.pixels)) <= {2, 3}


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("planar", [False, True])
@pytest.mark.parametrize("order", "<>")
def test_inks_and_further_samples(bits, planar, order):
    inks = np.concatenate([1 - COLOURS, 0 * ONE], axis=2)
    half = np.concatenate([COLOURS, ONE / 2], axis=2)
    cases = [
        (Tiff(bits, photometric=CMYK, planar=planar, order=order), inks, COLOURS),
        (Tiff(bits, photometric=RGB, planar=planar, order=order, extra=(0,)), half, COLOURS),
        (Tiff(bits, photometric=RGB, planar=planar, order=order, extra=(2,)), half, COLOURS / 2 + 0.5),
        (
            Tiff(bits, photometric=RGB, planar=planar, order=order, extra=(1,)),
            half * [0.5, 0.5, 0.5, 1],
            None,
        ),
    ]
    for tiff, shares, wanted in cases:
        found = error(tiff.write(samples(tiff, shares)), COLOURS / 2 + 0.5 if wanted is None else wanted)
        assert found is None or found <= 2, tiff
        assert planar or found is not None


def test_other_meanings_are_the_image_or_undecodable():
    level = np.rint(GREY * 255)
    lightness = (GREY * 100 + 16) / 116
    linear = np.where(lightness > 6 / 29, lightness**3, 3 * (6 / 29) ** 2 * (lightness - 4 / 29))
    seen = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    neutral = np.full((20, 24, 2), 128)
    for photometric in (YCBCR, LAB, 9, 10):
        grey = np.concatenate([level, 0 * neutral if photometric == LAB else neutral], axis=2)
        found = error(Tiff(photometric=photometric).write(grey), GREY if photometric == YCBCR else seen)
        assert found is None or found <= 3
    for photometric in (4, CFA, LINEAR_RAW):
        assert error(Tiff(photometric=photometric).write(level), GREY) is None


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_palettes(bits):
    dice = np.random.default_rng(bits)
    indices = dice.integers(0, 2**bits, (20, 24, 1))
    colours = dice.integers(0, 65536, (3, 2**bits))
    wide = Tiff(bits, photometric=PALETTE, palette=tuple(colours.ravel().tolist())).write(indices)
    found = error(wide, colours.T[indices[..., 0]] / 65535)
    assert found is not None and found <= 1
    # Some writers put 8 bits where 16 are due: every colour would be black.
    narrow = Tiff(bits, photometric=PALETTE, palette=tuple((colours // 256).ravel().tolist())).write(indices)
    assert error(narrow, colours.T[indices[..., 0]] / 65535) is None


def test_floats_without_a_known_white_are_undecodable():
    assert error(Tiff(32, FLOAT).write(GREY * 4095), GREY) is None


def test_floats_without_a_known_black_are_undecodable():
    """Those in -1..1 would lose their dark half."""
    assert error(Tiff(32, FLOAT).write(GREY * 2 - 1), GREY) is None
    assert error(Tiff(32, FLOAT).write(GREY - 0.001), GREY) is not None


def test_greys_of_other_formats_are_scaled_by_their_depth():
    for white in (255, 1000, 4095, 65535):
        levels = np.rint(GREY[..., 0] * white).astype(">u2" if white > 255 else "u1")
        found = error(b"P5 24 20 %d\n" % white + levels.tobytes(), GREY)
        assert found is not None and found <= 0.6
    dark = b"P5 2 1 65535\n" + np.array([200, 250], ">u2").tobytes()
    assert error(dark, np.array([[[200], [250]]]) / 65535) is not None
    buffer = io.BytesIO()
    Image.fromarray(np.rint(GREY[..., 0] * 65535).astype(np.uint16)).save(buffer, "JPEG2000")
    found = error(buffer.getvalue(), GREY)
    assert found is not None and found <= 1


def test_a_transparent_grey_of_sixteen_bits_is_white():
    levels = np.array([[0, 300, 65535], [300, 301, 65535]], np.uint16)
    buffer = io.BytesIO()
    Image.fromarray(levels).save(buffer, "PNG", transparency=300)
    result = decode(buffer.getvalue(), Limits(), 4096)
    assert isinstance(result, DecodedImage)
    assert result.pixels[..., 0].tolist() == [[0, 255, 255], [255, 1, 255]]


def test_vectors_that_were_made_of_other_pixels_are_not_looked_up():
    tiff, png = Tiff(12).write(np.zeros((4, 4, 1))), b"\x89PNG"
    assert content_key(png).hex() == "0f4636c78f65d3639ece5a064b5ae753e3408614a14fb18ab4d7540d2c248543"
    assert content_key(tiff) != content_key(tiff[:4] + b"\1" + tiff[5:])


@pytest.mark.parametrize(
    "other",
    [
        {262: None},
        {258: (16,), 339: (2,)},
        {258: (32,), 339: (3,), 262: (0,)},
        {258: (8, 8, 8), 262: (6,), 277: (3,)},
        {262: (3,), 320: tuple(range(256)) * 3},
        {262: (5,), 258: (8, 8, 8, 8), 277: (4,), 332: (2,)},
        {278: (4,)},
        {258: (16,), 266: (2,)},
    ],
    ids=lambda tags: "-".join(map(str, tags)),
)
def test_tiffs_that_would_be_another_image_are_refused_with_the_reason(other):
    samples_per_pixel = (other.get(277) or (1,))[0]
    result = decode(Tiff(other=other).write(np.zeros((20, 24, samples_per_pixel))), Limits(), 4096)
    assert isinstance(result, Skipped)
    assert result.reason is Reason.UNDECODABLE
    assert "TIFF that" in result.message


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_a_transparent_grey_of_any_depth_is_white(bits):
    values = np.tile(np.array([0, 1]), (2, 4))
    samples = np.unpackbits(values.astype(">u2").view(np.uint8).reshape(2, 8, 2), axis=2)[..., -bits:]
    rows = b"".join(b"\0" + np.packbits(row).tobytes() for row in samples)
    header = struct.pack(">IIBBBBB", 8, 2, bits, 0, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"tRNS", b"\0\1")
    data = start + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    assert error(data, values[..., None]) == 0
