"""Encoded bytes to upright uint8 RGB, within limits, whatever the colour mode."""

from __future__ import annotations

import io

import numpy as np
import PIL
from PIL import Image, ImageOps

from batchverify.records import Limits, Picture, Reason, Skipped

# Formats that Pillow decodes by itself; EPS and friends would start other programs.
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "AVIF", "BMP", "GIF", "TIFF", "PPM", "JPEG2000")


def decoder_set() -> str:
    """What `undecodable` depends on: another decoder release may read what this one cannot."""
    return f"pillow {PIL.__version__}"


def own_process() -> None:
    """Switch Pillow's own size guard off in a process that is ours: `Limits.pixels` replaces it."""
    Image.MAX_IMAGE_PIXELS = None


def decode(data: bytes, limits: Limits, long_side: int) -> Picture | Skipped:
    """Decode one image to an upright RGB `Picture`, or the reason why not.

    An image whose longer side exceeds `long_side` pixels is reduced to it; JPEGs are then decoded at a
    smaller scale to begin with (`draft`), never below twice `long_side`. Alpha is laid over white, 16-bit
    values are scaled, of several frames the first is taken.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        original = image.size
        if original[0] * original[1] > limits.pixels:
            return _too_large(f"{original[0]} x {original[1]} pixels", limits)
        image.draft("RGB", (2 * long_side, 2 * long_side))
        image.load()
        reduced = _reduce(_rgb(ImageOps.exif_transpose(image)), long_side)
        return Picture(np.asarray(reduced), max(original) / max(reduced.size))
    except Image.DecompressionBombError as exc:
        return _too_large(str(exc), limits)
    except MemoryError:
        raise
    except Exception as exc:  # noqa: BLE001  the seam to Pillow: damaged files raise some twenty types
        message = str(exc).replace(repr(exc.args[-1]), "") if "BytesIO" in str(exc) else str(exc)
        return Skipped(Reason.UNDECODABLE, message.strip() or type(exc).__name__, decoder_set())


def too_large_dependence(limits: Limits) -> str:
    """What `too_large` depends on: under another limit the image is tried again."""
    return f"{limits.pixels} pixels"


def _too_large(what: str, limits: Limits) -> Skipped:
    message = f"{what}, the limit is {limits.pixels / 1e6:g} megapixels"
    return Skipped(Reason.TOO_LARGE, message, too_large_dependence(limits))


def _rgb(image: Image.Image) -> Image.Image:
    """Any mode to RGB."""
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        return _from_high_depth(image)
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _from_high_depth(image: Image.Image) -> Image.Image:
    """16-bit and 32-bit greys: values above 255 are taken as 16-bit."""
    values = np.asarray(image).astype(np.float32)
    if image.mode.startswith("I;16") or values.max(initial=0) > 255:
        values = values / 257
    return Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8)).convert("RGB")


def _reduce(image: Image.Image, long_side: int) -> Image.Image:
    factor = long_side / max(image.size)
    if factor >= 1:
        return image
    size = tuple(max(1, round(side * factor)) for side in image.size)
    return image.resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0)
