"""Faces from pictures: the box of a detector, fixed crops, and augmented views for training."""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageEnhance

from batchverify.fingerprint import CENTER, FACE_SIZE

Box = tuple[float, float, float, float]
LARGEST_ANGLE = 10.0
SMALLEST_CROP = 0.88
JITTER = 0.25
JPEG_QUALITY = (35, 95)
SALT_SHARE = 0.01
# Faces get a border by reflection, so that rotations and crops bring no black corners in.
BORDER = 32


@dataclass(frozen=True)
class Face:
    """One cropped face.

    pixels: (160, 160, 3) uint8 RGB. box: x0 y0 x1 y1 in pixels of the picture (the detector's, without its
    margin, or the fixed crop's). confidence: the detector's, NaN without one. faces: how many were found.
    """

    pixels: np.ndarray
    box: Box
    confidence: float = float("nan")
    faces: int = 0

    def scaled(self, scale: float) -> Face:
        """The same face with its box in pixels of a picture `scale` times as large."""
        x0, y0, x1, y1 = self.box
        return replace(self, box=(x0 * scale, y0 * scale, x1 * scale, y1 * scale))


def fixed_face(picture: np.ndarray, crop: str) -> Face:
    """The crop that needs no detector: `center` or `none`."""
    return center_face(picture) if crop == "center" else whole_face(picture)


def center_face(picture: np.ndarray) -> Face:
    """The fixed crop of an (H, W, 3) uint8 RGB picture, stretched to the square."""
    height, width = picture.shape[:2]
    box = (
        round(CENTER[0] * width),
        round(CENTER[1] * height),
        max(round(CENTER[2] * width), 1),
        max(round(CENTER[3] * height), 1),
    )
    return Face(_stretch(picture, box), box)


def whole_face(picture: np.ndarray) -> Face:
    """The whole (H, W, 3) uint8 RGB picture, stretched to the square."""
    height, width = picture.shape[:2]
    return Face(_stretch(picture, (0, 0, width, height)), (0, 0, width, height))


def box_face(picture: np.ndarray, box: Box, margin: int, confidence: float, faces: int) -> Face | None:
    """The detector's `box` grown by `margin` of the 160 pixels, cut at the picture's edges and stretched.

    The arithmetic of `facenet_pytorch.extract_face`. None when nothing of the box lies in the picture.
    """
    height, width = picture.shape[:2]
    across = margin * (box[2] - box[0]) / (FACE_SIZE - margin) / 2
    down = margin * (box[3] - box[1]) / (FACE_SIZE - margin) / 2
    grown = (
        int(max(box[0] - across, 0)),
        int(max(box[1] - down, 0)),
        int(min(box[2] + across, width)),
        int(min(box[3] + down, height)),
    )
    if grown[2] <= grown[0] or grown[3] <= grown[1]:
        return None
    return Face(_stretch(picture, grown), box, confidence, faces)


def _stretch(picture: np.ndarray, box: tuple[int, int, int, int]) -> np.ndarray:
    """The box of a picture as (160, 160, 3) uint8."""
    region = Image.fromarray(np.ascontiguousarray(picture[box[1] : box[3], box[0] : box[2]]))
    return np.asarray(region.resize((FACE_SIZE, FACE_SIZE), Image.Resampling.BILINEAR))


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
