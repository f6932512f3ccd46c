"""Changed views of a face, for training: what cameras, crops and compression do to a picture."""

from __future__ import annotations

import hashlib
import io

import numpy as np
from PIL import Image, ImageEnhance

LARGEST_ANGLE = 10.0
SMALLEST_CROP = 0.88
JITTER = 0.25
JPEG_QUALITY = (35, 95)
SALT_SHARE = 0.01
# Faces get a border by reflection, so that rotations and crops bring no black corners in.
BORDER = 32


def augmented(pixels: np.ndarray, key: bytes, view: int) -> np.ndarray:
    """View number `view` (from 1) of a face: (S, S, 3) uint8 RGB in and out.

    Perhaps mirrored; rotated by up to 10 degrees; cropped to 88-100 % of its side; brightness, contrast and
    colour changed by up to a quarter; perhaps compressed as JPEG; perhaps with up to 1 % of white and black
    pixels. The image's key and the view's number alone decide, so that a view can be cached.
    """
    rng = np.random.default_rng(list(hashlib.sha256(key + view.to_bytes(4, "little")).digest()))
    image = _moved(pixels, rng)
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        image = enhance(image).enhance(rng.uniform(1 - JITTER, 1 + JITTER))
    quality, compressed = int(rng.integers(*JPEG_QUALITY)), rng.random() < 0.5
    if compressed:
        image = _compressed(image, quality)
    changed = np.array(image)
    share, salted = rng.uniform(0, SALT_SHARE), rng.random() < 0.3
    if salted:
        spots = rng.random(changed.shape[:2]) < share
        changed[spots] = rng.choice(np.array([0, 255], np.uint8), int(spots.sum()))[:, None]
    return changed


def _moved(pixels: np.ndarray, rng: np.random.Generator) -> Image.Image:
    """Mirroring, rotation and crop in one resampling."""
    if rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    size = pixels.shape[0]
    side = size * rng.uniform(SMALLEST_CROP, 1)
    shift = rng.uniform(-1, 1, 2) * (size - side) / 2
    angle = np.deg2rad(rng.uniform(-LARGEST_ANGLE, LARGEST_ANGLE))
    across, down = side / size * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    middle = BORDER + size / 2 + shift
    # Output pixel to place in the bordered picture, around both their middles.
    offsets = [middle[0] - across.sum() * size / 2, middle[1] - down.sum() * size / 2]
    coefficients = (*across, offsets[0], *down, offsets[1])
    bordered = np.pad(pixels, ((BORDER, BORDER), (BORDER, BORDER), (0, 0)), mode="reflect")
    return Image.fromarray(bordered).transform(
        (size, size), Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR
    )


def _compressed(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")
