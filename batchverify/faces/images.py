"""Reads one image, local or in an object store, and decodes it to upright uint8 RGB, within limits."""

from __future__ import annotations

import io
import os
import stat
import struct
import warnings
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import PIL
import pyarrow as pa
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError, features

from batchverify.errors import UsageError
from batchverify.faces.metadata import lacks_end, lacks_header, lacks_rows, scans, without_metadata
from batchverify.faces.samples import check_meaning, rgb
from batchverify.records import DecodedImage, Limits, Reason, Skipped
from batchverify.storage.fence import Fence
from batchverify.storage.location import Location, scheme_of
from batchverify.storage.object_store import is_denied, retry

# Formats that Pillow decodes by itself: for EPS and others it would start programs. JPEG includes MPO, which must not
# be listed: Pillow has no plug-in of that name to open files with and would fail at all formats after it.
FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "BMP", "GIF", "TIFF", "PPM", "JPEG2000")
# What turns an image upright, by its EXIF orientation; 1 is upright already.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_LONGEST_MESSAGE = 160
# How often a file that changes while it is read is read.
READS = 3
# Raised when images that were undecodable are read.
READER = 2
# A JPEG's scans each touch every pixel: a billion take a second. Cameras and encoders make some ten.
MOST_SCANS, MOST_SCANNED = 200, 5_000_000_000
# The most pixels for decoders that take long for a pixel (Pillow's in Python) or much memory (JPEG 2000, 24 bytes),
# and the most bytes for those in Python, which may also be kept busy by bytes that make no pixel.
_SLOW_DECODERS = {"bmp_rle": 16_000_000, "ppm": 4_000_000, "ppm_plain": 4_000_000, "jpeg2k": 64_000_000}
_SLOW_BYTES = 32_000_000
# Decoders that Pillow may have been built without.
_OPTIONAL = ("avif", "jpg_2000", "libtiff", "webp")


@lru_cache(maxsize=1)
def decoder_set() -> str:
    """What `undecodable` depends on: another release of the decoder, or of this module, may read more files."""
    without = "".join(f", without {name}" for name in _OPTIONAL if not features.check(name))
    return f"pillow {PIL.__version__}, reader {READER}{without}"


def own_process() -> None:
    """Configure Pillow for a process that is ours alone.

    Its size guard is replaced by `Limits.pixels`. Its warnings are hidden: they name no file, and what matters is
    reported as a reason.
    """
    Image.MAX_IMAGE_PIXELS = None
    warnings.filterwarnings("ignore", module=r"PIL\.")


def read_image(location: str, limits: Limits, fence: Fence | None = None) -> bytes | Skipped:
    """The bytes of the image at an absolute path or URI, or the reason why they cannot be read.

    fence: the folder that a local image must lie in, wherever symbolic links lead.
    """
    if scheme_of(location):
        return _or_reason(lambda: retry(lambda: _read_remote(Location.parse(location), limits)), location)
    result = _or_reason(lambda: _read_local(location, limits, fence), location)
    # Whether a file outside exists, is a folder or may be read is not told either.
    if fence is not None and isinstance(result, Skipped) and fence.is_left_by(location):
        return Skipped(Reason.FORBIDDEN, fence.refusal(location))
    return result


def _or_reason(read: Callable[[], bytes | Skipped], location: str) -> bytes | Skipped:
    try:
        return read()
    except (FileNotFoundError, NotADirectoryError):
        return Skipped(Reason.NOT_FOUND, f"no such file: {location}")
    except (OSError, ValueError, pa.ArrowException, UsageError) as exc:  # ValueError: NUL, lone surrogates
        reason = Reason.FORBIDDEN if is_denied(exc) else Reason.UNREADABLE
        return Skipped(reason, f"{location}: {getattr(exc, 'strerror', None) or exc}")


def _read_local(path: str, limits: Limits, fence: Fence | None) -> bytes | Skipped:
    for _ in range(READS):
        data = _read_once(path, limits, fence)
        if data is not None:
            return data
    return _changed(path)


def _read_once(path: str, limits: Limits, fence: Fence | None) -> bytes | Skipped | None:
    """None if the file changed meanwhile: half of an old and half of a new image may decode to a third one."""
    # Without O_NONBLOCK opening a named pipe would wait for a writer.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    with open(descriptor, "rb") as file:
        if fence is not None and not fence.holds(descriptor, path):
            return Skipped(Reason.FORBIDDEN, fence.refusal(path))
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            kind = "a folder" if stat.S_ISDIR(status.st_mode) else "not a regular file"
            return Skipped(Reason.UNREADABLE, f"{path}: {kind}")
        if status.st_size > limits.bytes:
            return _file_too_large(path, status.st_size, limits)
        # Not past the size that was checked: the file may grow, and some files in /proc never end.
        data = file.read(status.st_size) or b""
        after = os.fstat(file.fileno())
        same = (after.st_size, after.st_mtime_ns) == (status.st_size, status.st_mtime_ns)
        return data if same and len(data) == status.st_size else None


def _read_remote(location: Location, limits: Limits) -> bytes | Skipped:
    with location.filesystem.open_input_file(location.path) as file:
        size = file.size()
        if size > limits.bytes:
            return _file_too_large(str(location), size, limits)
        data: bytes = file.read()
        return data if len(data) == size else _changed(str(location))


def _changed(name: str) -> Skipped:
    return Skipped(Reason.UNREADABLE, f"{name}: it changed while it was read")


def _file_too_large(name: str, size: int, limits: Limits) -> Skipped:
    return Skipped(Reason.TOO_LARGE, f"{name}: {size / 1e6:.1f} MB, the limit is {limits.bytes / 1e6:g} MB")


def decode(data: bytes, limits: Limits, long_side: int) -> DecodedImage | Skipped:
    """Decode one image to an upright RGB `DecodedImage`, or return the reason why that is impossible.

    An image whose longer side exceeds `long_side` pixels is reduced to it. The decoder first reduces a large JPEG
    (`draft`), to not less than twice `long_side`. Transparency becomes white, 16-bit values are scaled to 8 bits, and
    only the first of several frames is used. Samples that would not come out as they are meant make an image
    `undecodable`. Raises `MemoryError`, for which the image alone is not to blame.
    """
    try:
        data = without_metadata(data)
        scan_count = scans(data, MOST_SCANS + 1)
        if scan_count > MOST_SCANS:
            what = f"a JPEG of more than {MOST_SCANS} scans, of thousands of segments or of fill bytes"
            return _too_large(what, limits)
        if lacks_header(data):
            return _too_large("a PNM with a header that does not end", limits)
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        original = image.size
        if original[0] * original[1] > limits.pixels:
            limit = f"the limit is {limits.pixels / 1e6:g} megapixels"
            return _too_large(f"{original[0]} x {original[1]} pixels, {limit}", limits)
        if _is_slow(image, len(data), limits) or scan_count * original[0] * original[1] > MOST_SCANNED:
            message = f"{original[0]} x {original[1]} pixels in a form that is slow to decode"
            return _too_large(message, limits)
        check_meaning(image, data)
        # The smallest size that the decoder may reduce a JPEG to.
        factor = min(2 * long_side / max(original), 1)
        image.draft("RGB", (max(1, int(original[0] * factor)), max(1, int(original[1] * factor))))
        image.load()
        if missing := _missing(image, data):
            return _undecodable(missing)
        orientation = _orientation(image)
        reduced = shrink(rgb(image, data), long_side)
        upright = reduced.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else reduced
        return DecodedImage(np.asarray(upright), max(original) / max(upright.size))
    except Image.DecompressionBombError as exc:
        # Pillow's own guard, in a process that is not ours; it does not depend on `limits`.
        return Skipped(Reason.TOO_LARGE, _text(exc), f"Pillow's limit of {Image.MAX_IMAGE_PIXELS} pixels")
    except MemoryError:
        raise
    except UnidentifiedImageError:  # its message contains a memory address
        what = "not an image, or damaged at its start" if data else "the file is empty"
        return _undecodable(f"{what} (formats: {', '.join(FORMATS)})")
    except Exception as exc:  # noqa: BLE001  damaged files make Pillow raise some twenty types
        return _undecodable(_text(exc))


def too_large_dependence(limits: Limits) -> str:
    """What `too_large` depends on: with another limit the image is tried again."""
    return f"{limits.pixels} pixels"


def _is_slow(image: ImageFile.ImageFile, size: int, limits: Limits) -> bool:
    """Whether decoding takes long or much memory for so few pixels: slow decoders, and tiles larger than images.

    size: bytes of the encoded image.
    """
    tags = getattr(image, "tag_v2", {})
    if tags.get(322, 0) * tags.get(323, 0) > max(limits.pixels, 1 << 20):
        return True
    pixels, decoders = image.size[0] * image.size[1], {tile[0] for tile in image.tile} & _SLOW_DECODERS.keys()
    in_python = decoders - {"jpeg2k"}
    return any(pixels > _SLOW_DECODERS[name] for name in decoders) or (bool(in_python) and size > _SLOW_BYTES)


def _missing(image: Image.Image, data: bytes) -> str:
    """What a loaded image lacks that the decoder made up; empty if it is whole."""
    if image.format == "PNG" and _ends_black(image) and lacks_rows(data):
        return "a PNG with fewer rows than it says"
    return "a JPEG without its end" if lacks_end(data) else ""


def _ends_black(image: Image.Image) -> bool:
    """Whether the last two rows are 0 throughout, as where pixels are missing."""
    width, height = image.size
    return image.crop((0, max(0, height - 2), width, height)).getbbox(alpha_only=False) is None


def _too_large(message: str, limits: Limits) -> Skipped:
    return Skipped(Reason.TOO_LARGE, message, too_large_dependence(limits))


def _undecodable(message: str) -> Skipped:
    return Skipped(Reason.UNDECODABLE, message, decoder_set())


def _text(exc: Exception) -> str:
    """The message of an exception as one short line."""
    return " ".join(str(exc).split())[:_LONGEST_MESSAGE] or type(exc).__name__


def _orientation(image: Image.Image) -> object:
    """The EXIF orientation, 1 to 8; another value if there is none or the EXIF block is damaged."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except (OSError, SyntaxError, LookupError, TypeError, ValueError, struct.error):
        return None


def shrink(image: Image.Image, long_side: int) -> Image.Image:
    """The image reduced to a longer side of `long_side` pixels; itself if it is not larger."""
    factor = long_side / max(image.size)
    if factor >= 1:
        return image
    width, height = (max(1, round(side * factor)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BILINEAR, reducing_gap=2.0)
