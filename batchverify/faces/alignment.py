"""Faces turned and scaled so that five points (eyes, nose, corners of the mouth) lie where a network expects them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from batchverify.errors import UsageError
from batchverify.fingerprint import Points
from batchverify.kernels.loops import warp

# Faces larger than so many times the crop, or as much smaller, are no faces but points that nearly coincide.
MOST_SCALE = 200.0
# Pixels: beyond this, positions lose their fractions.
FARTHEST = 1e9


@dataclass(frozen=True)
class Template:
    """Where the five points lie in an aligned face.

    name: empty if it has none. side: of the square crop, in pixels. points: x y of the left and right eye (as seen in
    the image), the nose, and the left and right corner of the mouth, in pixels of the crop, where whole numbers are
    the centres of pixels.
    """

    name: str
    side: int
    points: Points

    def resized(self, side: int) -> Template:
        """The same part of a face in a crop of another size."""
        scale = side / self.side
        return Template(self.name, side, tuple((x * scale, y * scale) for x, y in self.points))


_ARCFACE: Points = (
    (38.2946, 51.6963),
    (73.5318, 51.5014),
    (56.0252, 71.7366),
    (41.5493, 92.3655),
    (70.7299, 92.2041),
)
_REID_0095: Points = (
    (0.31556875, 0.46157411),
    (0.68262292, 0.46157411),
    (0.50026249, 0.64050535),
    (0.34947188, 0.82469196),
    (0.65343645, 0.82469196),
)
# Where they lie on average, made symmetric, in the crops `detect` of 120 faces of LFW View 1 train.
_VGGFACE2: Points = ((53.2, 66.9), (105.8, 66.9), (79.5, 90.5), (56.3, 108.1), (102.7, 108.1))
# A name stands for its points in caches: other points need another name.
TEMPLATES = {
    template.name: template
    for template in (
        Template("vggface2", 160, _VGGFACE2),
        # InsightFace (Guo and Deng), `arcface_dst`; with crops of 128 pixels it adds 8 to x.
        Template("arcface", 112, _ARCFACE),
        Template("arcface-128", 128, tuple((x + 8, y) for x, y in _ARCFACE)),
        # Open Model Zoo, face-reidentification-retail-0095.
        Template("reid-0095", 128, tuple((x * 128, y * 128) for x, y in _REID_0095)),
    )
}


@lru_cache(maxsize=16)
def template_for(template: str | Points, side: int) -> Template:
    """The template of a crop of `side` pixels, by a name in `TEMPLATES` or as five points in pixels of the crop."""
    if isinstance(template, str):
        return TEMPLATES[template].resized(side)
    return Template("", side, template)


def similarity(landmarks: np.ndarray, template: Template) -> tuple[complex, complex] | None:
    """The transform that brings landmarks nearest to a template: turned, scaled and moved, never mirrored.

    landmarks: (5, 2), x y in pixels of the image, in the template's order. Returns a factor and a shift: with x + iy
    for a position, that in the crop is the factor times that in the image, plus the shift. None where the landmarks
    are not finite, or so close together or so out of shape that the crop would be enlarged or reduced more than
    `MOST_SCALE` times.
    Least squares by Umeyama (1991, "Least-squares estimation of transformation parameters between two point
    patterns"); in a plane the solution is one complex number.
    """
    # Numbers of Python: 6 µs; for so few points numpy took 26.
    points = [complex(x, y) for x, y in landmarks.tolist()]
    if not all(abs(point.real) < FARTHEST and abs(point.imag) < FARTHEST for point in points):
        return None
    wanted = [complex(x, y) for x, y in template.points]
    middle, centre = sum(points) / len(points), sum(wanted) / len(wanted)
    offsets = [point - middle for point in points]
    spread = sum(offset.real**2 + offset.imag**2 for offset in offsets)
    if not spread:
        return None
    products = (offset.conjugate() * (goal - centre) for offset, goal in zip(offsets, wanted, strict=True))
    factor = sum(products) / spread
    shift = centre - factor * middle
    is_usable = 1 / MOST_SCALE <= abs(factor) <= MOST_SCALE and abs(shift) < FARTHEST
    return (factor, shift) if is_usable else None


def align(images: Sequence[np.ndarray], landmarks: np.ndarray, template: Template) -> np.ndarray:
    """One aligned face from each image: (N, side, side, 3) uint8 RGB.

    images: N arrays (H, W, 3) uint8 RGB of any size. landmarks: (N, 5, 2), x y in pixels of its image. Pixels are
    interpolated bilinearly, and averaged where the face shrinks (a triangle as wide as Pillow's `resize` takes); what
    lies outside of the image is black. Raises `UsageError` for landmarks that `similarity` finds unusable.
    """
    crops = np.zeros((len(images), template.side, template.side, 3), np.uint8)
    for number, (image, points, crop) in enumerate(zip(images, landmarks, crops, strict=True)):
        transform = similarity(points, template)
        if transform is None:
            raise UsageError(f"image {number}: the landmarks are not those of a face: {points}")
        _fill(image, *transform, crop)
    return crops


def _fill(image: np.ndarray, factor: complex, shift: complex, crop: np.ndarray) -> None:
    """Fill a black crop. factor, shift: from the image to the crop, see `similarity`."""
    last = crop.shape[0] - 1
    back, origin = 1 / factor, -shift / factor
    corners = [origin + back * corner for corner in (0, last, last * 1j, last * (1 + 1j))]
    # Pixels of the image per pixel of the crop.
    reach = max(abs(back), 1.0)
    left, right = _reached([corner.real for corner in corners], reach, image.shape[1])
    top, bottom = _reached([corner.imag for corner in corners], reach, image.shape[0])
    region = image[top:bottom, left:right]
    if region.size:
        affine = [[back.real, -back.imag, origin.real - left], [back.imag, back.real, origin.imag - top]]
        # A copy: the loop is compiled for writable arrays only.
        warp(region.copy(), np.array(affine), reach, crop)


def _reached(corners: Sequence[float], reach: float, size: int) -> tuple[int, int]:
    """The first pixel of an image that a crop needs along one axis, and the one after the last."""
    first = min(max(math.floor(min(corners) - reach), 0), size)
    return first, min(max(math.ceil(max(corners) + reach) + 1, first), size)
