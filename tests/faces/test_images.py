"""Decoding: every mode and orientation against plain numpy, and the reduction of large pictures."""

import io
import random
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from batchverify.faces.images import decode
from batchverify.records import DecodedImage, Limits

LIMITS = Limits()
ORIENTATION = 0x0112

# What a camera stores so that the picture is seen upright, by its EXIF orientation.
STORED = {
    1: lambda seen: seen,
    2: lambda seen: seen[:, ::-1],
    3: lambda seen: seen[::-1, ::-1],
    4: lambda seen: seen[::-1],
    5: lambda seen: seen.swapaxes(0, 1),
    6: lambda seen: np.rot90(seen, 1),
    7: lambda seen: np.rot90(seen, 2).swapaxes(0, 1),
    8: lambda seen: np.rot90(seen, -1),
}


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def picture(data: bytes, long_side: int = 4096) -> DecodedImage:
    result = decode(data, LIMITS, long_side)
    assert isinstance(result, DecodedImage), result
    assert result.pixels.dtype == np.uint8
    assert result.pixels.ndim == 3
    assert result.pixels.shape[2] == 3
    return result


@pytest.mark.parametrize("size", [(1, 1), (3, 1), (5, 7), (64, 63), (2400, 1801)])
def test_every_pixel_comes_through(size):
    """Pixels are taken over four at a time; those of a large image lie in several blocks of memory."""
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    assert np.array_equal(picture(encoded(Image.fromarray(pixels), "BMP")).pixels, pixels)


def corners(width: int = 48, height: int = 32) -> np.ndarray:
    """Four quarters of four colours: no rotation or mirroring looks like another."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[: height // 2, : width // 2] = (200, 30, 30)
    pixels[: height // 2, width // 2 :] = (30, 200, 30)
    pixels[height // 2 :, : width // 2] = (30, 30, 200)
    pixels[height // 2 :, width // 2 :] = (220, 220, 220)
    return pixels


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[ORIENTATION] = orientation
    return tags


@pytest.mark.parametrize("kind", ["JPEG", "MPO", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_comes_back_upright(kind, orientation):
    seen = corners()
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](seen)))
    kinds: dict[str, dict[str, Any]] = {
        "WEBP": {"lossless": True},
        "MPO": {"save_all": True, "append_images": [stored]},
    }
    options = kinds.get(kind, {})
    got = picture(encoded(stored, kind, exif=exif(orientation), **options)).pixels
    assert got.shape == seen.shape
    assert np.abs(got.astype(int) - seen).mean() <= (4 if kind in ("JPEG", "MPO") else 0)


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_orientations_that_do_not_exist_are_upright(orientation):
    assert np.array_equal(
        picture(encoded(Image.fromarray(corners()), "PNG", exif=exif(orientation))).pixels, corners()
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_damaged_exif_block_does_not_cost_the_picture(kind):
    tags = exif(6)
    tags[0x010E] = "a description"
    image = Image.fromarray(corners())
    for seed in range(60):
        block, dice = bytearray(tags.tobytes()), random.Random(seed)
        for _ in range(6):
            block[dice.randrange(0 if seed % 2 else 6, len(block))] = dice.randrange(256)
        block = block[: dice.randrange(1, 16)] if seed % 5 == 0 else block
        assert sorted(picture(encoded(image, kind, exif=bytes(block))).pixels.shape) == [3, 32, 48]


def test_plain_modes_become_rgb():
    seen = corners()
    image = Image.fromarray(seen)
    grey = np.asarray(image.convert("L"))
    assert np.array_equal(picture(encoded(image, "BMP")).pixels, seen)
    assert np.array_equal(picture(encoded(image, "PPM")).pixels, seen)
    assert np.array_equal(picture(encoded(image.convert("L"), "PNG")).pixels, np.repeat(grey[..., None], 3, 2))
    bits = Image.fromarray(grey > 100)
    assert np.array_equal(picture(encoded(bits, "PNG")).pixels[..., 1], np.where(grey > 100, 255, 0))
    palette = image.quantize(4)
    assert np.array_equal(picture(encoded(palette, "PNG")).pixels, np.asarray(palette.convert("RGB")))


def test_cmyk_jpeg_has_its_colours_not_their_negative():
    red = Image.new("CMYK", (32, 32), (0, 255, 255, 0))
    assert np.abs(picture(encoded(red, "JPEG", quality=95)).pixels.astype(int) - (255, 0, 0)).max() < 12


def test_sixteen_bit_greys_are_scaled():
    values = np.linspace(0, 65535, 48 * 32).round().astype(np.uint16).reshape(32, 48)
    wanted = np.rint(values / 257).astype(np.uint8)
    for kind in ("PNG", "TIFF"):
        assert np.array_equal(picture(encoded(Image.fromarray(values), kind)).pixels[..., 0], wanted)
    big_endian = encoded(Image.frombytes("I;16B", (48, 32), values.astype(">u2").tobytes()), "TIFF")
    assert np.array_equal(picture(big_endian).pixels[..., 2], wanted)


def test_dark_sixteen_bit_greys_stay_dark():
    values = np.full((8, 8), 200, np.uint16)
    assert picture(encoded(Image.fromarray(values), "PNG")).pixels.max() == 1


def test_float_tiffs_in_bytes_in_shares_and_with_gaps():
    shares = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    wanted = np.rint(shares * 255).astype(np.uint8)
    assert np.array_equal(picture(encoded(Image.fromarray(shares), "TIFF")).pixels[..., 0], wanted)
    as_bytes = shares * 255
    as_bytes[0, 0] = np.nan
    assert np.array_equal(picture(encoded(Image.fromarray(as_bytes), "TIFF")).pixels[..., 0], wanted)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_alpha_is_laid_over_white(kind):
    pixels = np.zeros((16, 16, 4), np.uint8)
    pixels[:8] = (200, 100, 0, 128)
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    got = picture(encoded(Image.fromarray(pixels), kind, **options)).pixels
    assert np.abs(got[:8].astype(int) - (227, 177, 127)).max() <= 1
    assert (got[8:] == 255).all()


def test_grey_alpha_and_transparent_colours_are_laid_over_white():
    grey = np.zeros((4, 4, 2), np.uint8)
    grey[:2] = (0, 255)
    got = picture(encoded(Image.fromarray(grey), "PNG")).pixels
    assert (got[:2] == 0).all()
    assert (got[2:] == 255).all()
    keyed = Image.fromarray(corners())
    got = picture(encoded(keyed, "PNG", transparency=(200, 30, 30))).pixels
    assert tuple(got[0, 0]) == (255, 255, 255)
    assert tuple(got[0, -1]) == (30, 200, 30)


@pytest.mark.parametrize("transparency", [2, bytes([255, 255, 0, 255])])
def test_palette_with_transparency(transparency):
    indices = np.repeat(np.arange(4, dtype=np.uint8), 4).reshape(4, 4)
    image = Image.fromarray(indices).convert("L").convert("P")
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90, 1, 2, 3])
    image.putdata(indices.ravel().tolist())
    got = picture(encoded(image, "PNG", transparency=transparency)).pixels
    assert [tuple(row[0]) for row in got.tolist()] == [(10, 20, 30), (40, 50, 60), (255, 255, 255), (1, 2, 3)]


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "TIFF", "PNG"])
def test_of_several_frames_the_first_is_taken(kind):
    frames = [Image.new("RGB", (24, 16), colour) for colour in ((250, 0, 0), (0, 0, 250), (0, 250, 0))]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    got = picture(data)
    assert got.pixels.shape == (16, 24, 3)
    assert (got.pixels == (250, 0, 0)).all()


def drawing(width: int, height: int) -> Image.Image:
    image = Image.new("RGB", (width, height), (120, 90, 60))
    draw = ImageDraw.Draw(image)
    draw.ellipse((width * 0.2, height * 0.1, width * 0.8, height * 0.9), fill=(230, 200, 180))
    draw.rectangle((width * 0.3, height * 0.3, width * 0.4, height * 0.4), fill=(20, 20, 90))
    return image


@pytest.mark.parametrize("size", [(1600, 1200), (1601, 901), (700, 2100), (3000, 7)])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_large_pictures_are_reduced_and_scale_says_by_how_much(size, kind, orientation):
    image = drawing(*size)
    got = picture(encoded(image, kind, quality=95, exif=exif(orientation)), 200)
    factor = 200 / max(size)
    small = (max(1, round(size[0] * factor)), max(1, round(size[1] * factor)))
    assert got.pixels.shape == ((small[0], small[1], 3) if orientation == 6 else (small[1], small[0], 3))
    assert got.scale == max(size) / 200
    wanted = np.asarray(image.resize(small, Image.Resampling.BOX)).astype(int)
    wanted = np.rot90(wanted, -1) if orientation == 6 else wanted
    assert np.abs(got.pixels.astype(int) - wanted).mean() < 4


def test_pictures_within_the_long_side_keep_every_pixel():
    noise = np.random.default_rng(0).integers(0, 256, (50, 64, 3), dtype=np.uint8)
    got = picture(encoded(Image.fromarray(noise), "PNG"), 64)
    assert np.array_equal(got.pixels, noise)
    assert got.scale == 1
