"""One image from its place, local or in an object store, to upright uint8 RGB, within limits."""

from __future__ import annotations

import io
import os
import stat
import struct
import warnings

import numpy as np
import PIL
import pyarrow as pa
from PIL import ExifTags, Image, UnidentifiedImageError

from batchverify.errors import UsageError
from batchverify.records import DecodedImage, Limits, Reason, Skipped
from batchverify.storage.location import Location, scheme_of
from batchverify.storage.object_store import is_denied, retry

# Formats that Pillow decodes by itself; EPS and friends would start other programs. JPEG opens MPO, too:
# a name that Pillow opens under no plug-in of its own makes it fail at every format after it.
FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "BMP", "GIF", "TIFF", "PPM", "JPEG2000")
# What turns a picture upright, by its EXIF orientation; 1 is upright already.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SHOWN = 160


def decoder_set() -> str:
    """What `undecodable` depends on: another decoder release may read what this one cannot."""
    return f"pillow {PIL.__version__}"


def own_process() -> None:
    """Quieten Pillow in a process that is ours.

    Its own size guard goes, since `Limits.pixels` replaces it, and so do its warnings: they name no file,
    and what matters of them comes back as a reason.
    """
    Image.MAX_IMAGE_PIXELS = None
    warnings.filterwarnings("ignore", module=r"PIL\.")


def read_image(location: str, limits: Limits) -> bytes | Skipped:
    """The bytes of one image at an absolute path or URI, or the reason why they are not to be had."""
    try:
        if scheme_of(location):
            place = Location.parse(location)
            return retry(lambda: _read_remote(place, limits))
        return _read_local(location, limits)
    except (FileNotFoundError, NotADirectoryError):
        return Skipped(Reason.NOT_FOUND, f"no such file: {location}")
    except (OSError, ValueError, pa.ArrowException, UsageError) as exc:  # ValueError: NUL, lone surrogates
        reason = Reason.FORBIDDEN if is_denied(exc) else Reason.UNREADABLE
        return Skipped(reason, f"{location}: {getattr(exc, 'strerror', None) or exc}")


def _read_local(path: str, limits: Limits) -> bytes | Skipped:
    # Without O_NONBLOCK the opening of a named pipe would wait for a writer.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    with open(descriptor, "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            kind = "a folder" if stat.S_ISDIR(status.st_mode) else "not a regular file"
            return Skipped(Reason.UNREADABLE, f"{path}: {kind}")
        if status.st_size > limits.bytes:
            return _file_too_large(path, status.st_size, limits)
        # Never past the size just judged: the file may grow, and some of /proc never end.
        return file.read(status.st_size) or b""


def _read_remote(location: Location, limits: Limits) -> bytes | Skipped:
    with location.filesystem.open_input_file(location.path) as file:
        size = file.size()
        if size > limits.bytes:
            return _file_too_large(str(location), size, limits)
        return file.read()


def _file_too_large(where: str, size: int, limits: Limits) -> Skipped:
    return Skipped(Reason.TOO_LARGE, f"{where}: {size / 1e6:.1f} MB, the limit is {limits.bytes / 1e6:g} MB")


def decode(data: bytes, limits: Limits, long_side: int) -> DecodedImage | Skipped:
    """Decode one image to an upright RGB `DecodedImage`, or the reason why not.

    An image whose longer side exceeds `long_side` pixels is reduced to it; JPEGs are then decoded at a
    smaller scale to begin with (`draft`), never below twice `long_side`. Alpha is laid over white, 16-bit
    values are scaled, of several frames the first is taken. Raises `MemoryError`: that is no fault of the
    image alone.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        original = image.size
        if original[0] * original[1] > limits.pixels:
            return _too_large(original, limits)
        image.draft("RGB", _draft_size(original, long_side))
        image.load()
        orientation = _orientation(image)
        reduced = _reduce(_rgb(image), long_side)
        upright = reduced.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else reduced
        return DecodedImage(np.asarray(upright), max(original) / max(upright.size))
    except Image.DecompressionBombError as exc:
        # Pillow's guard, in a process that is not ours; it says nothing about `limits`.
        return Skipped(Reason.TOO_LARGE, _text(exc), f"Pillow's limit of {Image.MAX_IMAGE_PIXELS} pixels")
    except MemoryError:
        raise
    except UnidentifiedImageError:  # its own message holds a memory address
        what = "not an image, or damaged at its start" if data else "the file is empty"
        return _undecodable(f"{what} (read are {', '.join(FORMATS)})")
    except Exception as exc:  # noqa: BLE001  the seam to Pillow: damaged files raise some twenty types
        return _undecodable(_text(exc))


def too_large_dependence(limits: Limits) -> str:
    """What `too_large` depends on: under another limit the image is tried again."""
    return f"{limits.pixels} pixels"


def _too_large(size: tuple[int, int], limits: Limits) -> Skipped:
    message = f"{size[0]} x {size[1]} pixels, the limit is {limits.pixels / 1e6:g} megapixels"
    return Skipped(Reason.TOO_LARGE, message, too_large_dependence(limits))


def _undecodable(message: str) -> Skipped:
    return Skipped(Reason.UNDECODABLE, message, decoder_set())


def _text(exc: Exception) -> str:
    """One short line."""
    return " ".join(str(exc).split())[:_SHOWN] or type(exc).__name__


def _draft_size(size: tuple[int, int], long_side: int) -> tuple[int, int]:
    """The smallest size, (width, height), that the draft decoder may go down to."""
    share = min(2 * long_side / max(size), 1)
    return max(1, int(size[0] * share)), max(1, int(size[1] * share))


def _orientation(image: Image.Image) -> object:
    """The EXIF orientation, 1 to 8; anything else where there is none or the EXIF block is damaged."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except (OSError, SyntaxError, LookupError, TypeError, ValueError, struct.error):
        return None


def _rgb(image: Image.Image) -> Image.Image:
    """Any mode to RGB."""
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        return _from_high_depth(image)
    if image.mode in ("LA", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _from_high_depth(image: Image.Image) -> Image.Image:
    """Greys of 16 and 32 bits: values above 255 are taken as 16-bit, floats in 0..1 as shares of white."""
    values = np.nan_to_num(np.asarray(image).astype(np.float32))
    peak = values.max(initial=0)
    if image.mode.startswith("I;16") or peak > 255:
        values /= np.float32(257)
    elif image.mode == "F" and peak <= 1:
        values *= np.float32(255)
    return Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8)).convert("RGB")


def _reduce(image: Image.Image, long_side: int) -> Image.Image:
    factor = long_side / max(image.size)
    if factor >= 1:
        return image
    width, height = (max(1, round(side * factor)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BILINEAR, reducing_gap=2.0)
