"""Faces cropped from images, by a detector's box or a fixed one, and augmented views of them for training."""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter

from batchverify.errors import UsageError
from batchverify.faces.alignment import Template, align, template_for
from batchverify.faces.detection import Detections
from batchverify.fingerprint import CENTER, FACE_SIZE, EmbeddingSettings

Box = tuple[float, float, float, float]
LARGEST_ANGLE = 10.0
SMALLEST_CROP = 0.88
JITTER = 0.25
JPEG_QUALITY = (35, 95)
SALT_SHARE = 0.01
# Share of blurred views, and the standard deviation of the blur in sides of the face: up to 2 of 160 pixels.
BLURRED_SHARE = 0.3
BLUR = (0.003, 0.0125)
# Faces get a reflected border, so that rotations and crops do not bring in black corners.
BORDER = 32


@dataclass(frozen=True)
class Face:
    """One cropped face.

    pixels: (S, S, 3) uint8 RGB. box: x0 y0 x1 y1 in pixels of the image, the detector's (without margin) or the
    fixed crop's. confidence: of the detector, NaN without one. faces: how many were found. landmarks: (5, 2) x y in
    pixels of the image, None without any. rotation: see `Detections`; the pixels are upright.
    """

    pixels: np.ndarray
    box: Box
    confidence: float = float("nan")
    faces: int = 0
    landmarks: np.ndarray | None = None
    rotation: int = 0

    def scaled(self, scale: float) -> Face:
        """The same face with its box and landmarks in pixels of an image `scale` times as large."""
        x0, y0, x1, y1 = self.box
        landmarks = None if self.landmarks is None else self.landmarks * scale
        return replace(self, box=(x0 * scale, y0 * scale, x1 * scale, y1 * scale), landmarks=landmarks)


def detected_face(
    image: np.ndarray,
    detections: Detections,
    index: int,
    scale: float,
    settings: EmbeddingSettings,
    size: int = FACE_SIZE,
) -> Face | None:
    """One of the faces that a detector found, upright and `size` pixels high and wide; None if it cannot be cut out.

    image: (H, W, 3) uint8 RGB, `scale` times as large as the one that the detector saw.
    """
    x0, y0, x1, y1 = (float(value) * scale for value in detections.boxes[index])
    box, score, count = (x0, y0, x1, y1), float(detections.scores[index]), len(detections)
    landmarks = None if detections.landmarks is None else detections.landmarks[index] * scale
    if settings.crop == "align":
        pixels = _aligned(image, landmarks, template_for(settings.template, size))
    else:
        pixels = box_pixels(image, box, settings.margin, size)
        pixels = None if pixels is None else np.rot90(pixels, detections.rotation // 90)
    return None if pixels is None else Face(pixels, box, score, count, landmarks, detections.rotation)


def _aligned(image: np.ndarray, landmarks: np.ndarray | None, template: Template) -> np.ndarray | None:
    """The aligned face; None if the landmarks are not those of a face."""
    if landmarks is None:
        return None
    try:
        return align([image], landmarks[None], template)[0]
    except UsageError:
        return None


def fixed_face(image: np.ndarray, crop: str, size: int = FACE_SIZE) -> Face:
    """A crop that needs no detector, stretched to a square: `center` (by the fractions `CENTER`) or `none` (all)."""
    height, width = image.shape[:2]
    left, top, right, bottom = CENTER if crop == "center" else (0, 0, 1, 1)
    box = (round(left * width), round(top * height), max(round(right * width), 1), max(round(bottom * height), 1))
    return Face(_stretch(image, box, size), box)


def box_pixels(image: np.ndarray, box: Box, margin: int, size: int = FACE_SIZE) -> np.ndarray | None:
    """The detector's `box`, enlarged by `margin` of 160 pixels, clipped to the image and stretched to `size`.

    The arithmetic is that of `facenet_pytorch.extract_face`. None if the box lies outside of the image.
    """
    height, width = image.shape[:2]
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
    return _stretch(image, grown, size)


def _stretch(image: np.ndarray, box: tuple[int, int, int, int], size: int) -> np.ndarray:
    """The box of an image as (size, size, 3) uint8."""
    region = Image.fromarray(np.ascontiguousarray(image[box[1] : box[3], box[0] : box[2]]))
    return np.asarray(region.resize((size, size), Image.Resampling.BILINEAR))


def augmented(pixels: np.ndarray, key: bytes, view: int, *, blur: bool = False) -> np.ndarray:
    """An augmented view, number `view` (from 1), of a face: (S, S, 3) uint8 RGB in and out.

    It may be mirrored, is rotated by up to 10 degrees and cropped to 88-100 % of its side. Brightness, contrast and
    colour change by up to a quarter. It may be compressed as JPEG and have up to 1 % of white and black pixels. With
    `blur`, about a third is blurred before that, and the others are the same as without. The result depends only on
    the image's key and the number, so that it can be cached.
    """
    rng = _generator(key, view)
    image = _moved(pixels, rng)
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        image = enhance(image).enhance(rng.uniform(1 - JITTER, 1 + JITTER))
    if blur:
        image = _blurred(image, _generator(key, view, b"blur"))
    quality, compressed = int(rng.integers(*JPEG_QUALITY)), rng.random() < 0.5
    if compressed:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=quality)
        image = Image.open(buffer).convert("RGB")
    augmented_pixels = np.array(image)
    share, salted = rng.uniform(0, SALT_SHARE), rng.random() < 0.3
    if salted:
        spots = rng.random(augmented_pixels.shape[:2]) < share
        augmented_pixels[spots] = rng.choice(np.array([0, 255], np.uint8), int(spots.sum()))[:, None]
    return augmented_pixels


def _generator(key: bytes, view: int, purpose: bytes = b"") -> np.random.Generator:
    return np.random.default_rng(list(hashlib.sha256(key + view.to_bytes(4, "little") + purpose).digest()))


def _blurred(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A part of the images, with a Gaussian blur; the others as they are."""
    radius = rng.uniform(*BLUR) * image.width
    return image.filter(ImageFilter.GaussianBlur(radius)) if rng.random() < BLURRED_SHARE else image


def _moved(pixels: np.ndarray, rng: np.random.Generator) -> Image.Image:
    """Mirror, rotate and crop with one resampling."""
    if rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    size = pixels.shape[0]
    side = size * rng.uniform(SMALLEST_CROP, 1)
    shift = rng.uniform(-1, 1, 2) * (size - side) / 2
    angle = np.deg2rad(rng.uniform(-LARGEST_ANGLE, LARGEST_ANGLE))
    across, down = side / size * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    middle = BORDER + size / 2 + shift
    # Maps output pixels to positions in the bordered image, relative to the middles of both.
    offsets = [middle[0] - across.sum() * size / 2, middle[1] - down.sum() * size / 2]
    coefficients = (*across, offsets[0], *down, offsets[1])
    bordered = np.pad(pixels, ((BORDER, BORDER), (BORDER, BORDER), (0, 0)), mode="reflect")
    return Image.fromarray(bordered).transform(
        (size, size), Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR
    )
