"""What the samples of a decoded image mean: scaled to RGB, or refused where the decoder does not know it."""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from PIL import Image, ImageFile

# Tags of TIFF 6.0.
BITS, COMPRESSION, PHOTOMETRIC, STRIPS, PER_PIXEL, ROWS = 258, 259, 262, 273, 277, 278
PLANES, COLOUR_MAP, INK_SET, DOT_RANGE, FORMAT = 284, 320, 332, 336, 339
COEFFICIENTS, SUBSAMPLING, BLACK_WHITE, FILL_ORDER = 529, 530, 532, 266
WHITE_IS_ZERO, PALETTE, CMYK, YCBCR, LAB = 0, 3, 5, 6, 8
UNSIGNED, FLOAT = 1, 3
# Enumerated colour spaces of JPEG 2000: CMYK, sRGB, grey, sYCC.
_JPEG2000_COLOURS = (12, 16, 17, 18)
# What a codestream of JPEG 2000 starts with, and each part of a tile in it.
_CODESTREAM, _TILE_PART = b"\xff\x4f\xff\x51", b"\xff\x90"
# Rows that are converted at once: a large image takes little more memory than its pixels.
_ROWS = 256


def check_meaning(image: ImageFile.ImageFile, data: bytes) -> None:
    """Raise `ValueError` for an opened image that the decoder would turn into another picture.

    data: the encoded image, as the decoder gets it.
    """
    if image.format == "TIFF":
        _check_tiff(image)
    elif image.format == "JPEG2000":
        _check_jpeg2000(data)
    elif image.format == "BMP":
        _check_bmp(image, data)
    elif image.format == "PNG" and data[24] == 16 and image.mode == "RGB" and "transparency" in image.info:
        raise ValueError("a PNG with a transparent colour of 16 bits")


def _check_tiff(image: ImageFile.ImageFile) -> None:
    tags = image.tag_v2  # type: ignore[attr-defined]
    bits, kind = tags.get(BITS, (1,)), tags.get(PHOTOMETRIC)
    formats = set(tags.get(FORMAT, (UNSIGNED,)))
    raw, planes = tags.get(COMPRESSION, 1) == 1, tags.get(PLANES, 1)
    wide = max(bits) > 8
    refused = {
        "does not say what its samples are": kind is None,
        "has samples that are neither unsigned nor floats": not formats <= {UNSIGNED, FLOAT},
        "has floats of which white is the smallest": formats == {FLOAT} and kind == WHITE_IS_ZERO,
        "has bits in reverse and more than 8 of them": wide and tags.get(FILL_ORDER, 1) != 1,
        "has packed samples of 32 bits, high byte first": not raw and max(bits) > 16 and tags.prefix == b"MM",
        "has planes of more than 8 bits": planes == 2 and wide and raw,
        "has planes in which white is 0": planes == 2 and kind == WHITE_IS_ZERO,
        "has planes with bits in reverse": planes == 2 and tags.get(FILL_ORDER, 1) != 1,
        "has planes of Lab": planes == 2 and kind == LAB,
        "has inks that are not CMYK": kind == CMYK and tags.get(INK_SET, 1) != 1,
        "has inks of another range": kind == CMYK and _differs(tags.get(DOT_RANGE, (0, 255)), (0, 255)),
        "has a colour map of the wrong size or of 8 bits": kind == PALETTE and not _has_colours(tags, bits),
        "has YCbCr that is subsampled or of another range": kind == YCBCR and _is_odd_ycbcr(tags, bits, raw),
        "has fewer strips than rows": raw and _lacks_strips(image, tags, planes, len(bits)),
    }
    for what, applies in refused.items():
        if applies:
            raise ValueError(f"a TIFF that {what}")


def _differs(values: object, wanted: tuple[float, ...]) -> bool:
    """Whether a tag's values are not these."""
    given = np.atleast_1d(np.asarray(values, float))
    return given.shape != (len(wanted),) or not np.allclose(given, wanted, atol=0.01)


def _has_colours(tags: Mapping[int, Any], bits: tuple[int, ...]) -> bool:
    colours = tags.get(COLOUR_MAP, ())
    return len(colours) == 3 << bits[0] and (max(colours) > 255 or max(colours) == 0)


def _is_odd_ycbcr(tags: Mapping[int, Any], bits: tuple[int, ...], raw: bool) -> bool:
    return (
        len(bits) == 1
        or (raw and _differs(tags.get(SUBSAMPLING, (2, 2)), (1, 1)))
        or _differs(tags.get(COEFFICIENTS, (0.299, 0.587, 0.114)), (0.299, 0.587, 0.114))
        or _differs(tags.get(BLACK_WHITE, (0, 255, 128, 255, 128, 255)), (0, 255, 128, 255, 128, 255))
    )


def _lacks_strips(image: ImageFile.ImageFile, tags: Mapping[int, Any], planes: int, samples: int) -> bool:
    """Whether an uncompressed TIFF has fewer strips than its rows need: the decoder leaves the others black."""
    if STRIPS not in tags:
        return False
    extents = image.tile[-1][1]
    height = extents[3] if extents and planes == 1 else 0
    strips = -(-tags[257] // min(tags.get(ROWS, tags[257]), tags[257]))
    return bool(len(tags[STRIPS]) < strips * (samples if planes == 2 else 1) or height not in (0, tags[257]))


def _check_bmp(image: Image.Image, data: bytes) -> None:
    """A palette of greys makes the decoder forget how many bits a pixel has."""
    bits = int.from_bytes(data[24:26] if data[14] == 12 else data[28:30], "little")
    if (image.mode == "1" and bits != 1) or (image.mode == "L" and bits != 8):
        raise ValueError(f"a BMP of {bits} bits with a palette of greys")


def _check_jpeg2000(data: bytes) -> None:
    """Samples of less than 8 bits are not scaled to white, unknown colours are RGB, and absent tiles are black."""
    start, colours = _codestream(data)
    count = int.from_bytes(data[start + 40 : start + 42], "big")
    if any((depth & 127) + 1 < 8 for depth in data[start + 42 : start + 42 + 3 * count : 3]):
        raise ValueError("a JPEG 2000 of less than 8 bits")
    if colours not in (None, *_JPEG2000_COLOURS):
        raise ValueError("a JPEG 2000 with a colour space that is not read")
    if _lacks_tiles(data, start):
        raise ValueError("a JPEG 2000 with fewer tiles than it says")


def _codestream(data: bytes) -> tuple[int, int | None]:
    """Where the codestream of a JPEG 2000 starts, and the number of its colour space if the file states one."""
    if data.startswith(_CODESTREAM):
        return 0, None
    colours = None
    for kind, start, end in _boxes(data, 0, len(data)):
        if kind == b"jp2h":
            spaces = [data[at : at + 7] for name, at, _ in _boxes(data, start, end) if name == b"colr"]
            numbers = [int.from_bytes(space[3:], "big") for space in spaces if space[:1] == b"\1"]
            colours = numbers[0] if numbers else None
        elif kind == b"jp2c" and data.startswith(_CODESTREAM, start):
            return start, colours
    raise ValueError("a JPEG 2000 without a codestream")


def _boxes(data: bytes, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """The boxes between two places of a JPEG 2000: kind, and where their contents start and end."""
    while start + 8 <= end:
        length, content = int.from_bytes(data[start : start + 4], "big"), start + 8
        if length == 1:
            length, content = int.from_bytes(data[content : content + 8], "big"), content + 8
        behind = min(start + length, end) if length else end
        if behind < content:
            raise ValueError("a JPEG 2000 with a damaged box")
        yield data[start + 4 : start + 8], content, behind
        start = behind


def _lacks_tiles(data: bytes, start: int) -> bool:
    """Whether a codestream lacks parts of tiles. The decoder leaves a tile black of which it finds none."""
    area = [int.from_bytes(data[at : at + 4], "big") for at in range(start + 8, start + 40, 4)]
    across, down = (-(-(area[side] - area[side + 6]) // max(area[side + 4], 1)) for side in (0, 1))
    position = start + 2
    while data[position : position + 2] not in (_TILE_PART, b""):
        position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    found, stated = Counter[int](), dict[int, int]()
    while data.startswith(_TILE_PART, position) and position + 12 <= len(data):
        tile, length, _, parts = struct.unpack_from(">HIBB", data, position + 4)
        # The last one may reach to the end without saying so.
        position = position + max(length, 12) if length else len(data)
        if position > len(data):
            break
        found[tile] += 1
        stated[tile] = parts or stated.get(tile, 0)
    return len(found) < across * down or any(found[tile] < parts for tile, parts in stated.items())


def rgb(image: Image.Image, data: bytes) -> Image.Image:
    """A loaded image of any mode as RGB, its transparency over white. data: the encoded image."""
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        return _from_high_depth(image)
    if image.mode == "L" and image.format == "PNG" and "transparency" in image.info:
        # The decoder scales samples of 2 and 4 bits, but not the grey that is transparent.
        image.info["transparency"] *= 255 // ((1 << min(data[24], 8)) - 1)
    if image.mode == "La":
        image = image.convert("LA")
    if image.mode in ("LA", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        return _over_white(image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _over_white(image: Image.Image) -> Image.Image:
    """An image with transparency as RGB over white."""
    width, height = image.size
    result = Image.new("RGB", image.size)
    for top in range(0, height, _ROWS):
        rows = image.crop((0, top, width, min(top + _ROWS, height))).convert("RGBA")
        white = Image.new("RGBA", rows.size, (255, 255, 255, 255))
        result.paste(Image.alpha_composite(white, rows).convert("RGB"), (0, top))
    return result


def _from_high_depth(image: Image.Image) -> Image.Image:
    """Greys of 12, 16 and 32 bits by the value of white; floats in 0..1 are fractions of white, in 1..255 bytes."""
    samples = np.asarray(image)
    strips = [slice(top, top + _ROWS) for top in range(0, len(samples), _ROWS)]
    factor = _float_factor(samples[rows] for rows in strips) if image.mode == "F" else None
    greys = np.empty(samples.shape, np.uint8)
    for rows in strips:
        part = samples[rows]
        values = _integers(image, part) if factor is None else _finite(part) * factor
        greys[rows] = np.clip(np.rint(values), 0, 255)
        if "transparency" in image.info:
            greys[rows][part == image.info["transparency"]] = 255
    return Image.fromarray(greys).convert("RGB")


def _finite(samples: np.ndarray) -> np.ndarray:
    return np.nan_to_num(samples.astype(np.float32))


def _float_factor(strips: Iterable[np.ndarray]) -> np.float32:
    """What floats are multiplied with to become bytes. Raises `ValueError` if black or white is unknown."""
    lowest = peak = np.float32(0)
    for part in strips:
        values = _finite(part)
        lowest, peak = values.min(initial=lowest), values.max(initial=peak)
    if peak > 255:
        raise ValueError(f"floats up to {peak:g}, of which nobody says which is white")
    factor = np.float32(255 if peak <= 1 else 1)
    # Rounding may lead a little below black.
    if lowest * factor < -1:
        raise ValueError(f"floats from {lowest:g}, of which nobody says which is black")
    return factor


def _integers(image: Image.Image, samples: np.ndarray) -> np.ndarray:
    """Integer samples as float32 in 0..255."""
    tags = getattr(image, "tag_v2", {})
    bits = tags.get(BITS, (16,))[0]
    if bits == 32:
        samples = samples.view(np.uint32)
    values = samples.astype(np.float32) / np.float32(((1 << bits) - 1) / 255)
    return 255 - values if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO else values
