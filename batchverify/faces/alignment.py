"""Faces turned and scaled so that five points (eyes, nose, corners of the mouth) lie where a network expects them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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


def template_for(template: str | Points, side: int) -> Template:
    """The template of a crop of `side` pixels, by a name in `TEMPLATES` or as five points in pixels of the crop."""
    if isinstance(template, str):
        return TEMPLATES[template].resized(side)
    return Template("", side, template)


def similarities(landmarks: np.ndarray, template: Template) -> np.ndarray:
    """The transforms that bring landmarks nearest to a template: turned, scaled and moved, never mirrored.

    landmarks: (N, 5, 2), x y in pixels of each image, in the template's order. Returns (N, 2, 3) float64, from x y 1
    in the image to x y in the crop. Rows are NaN where the landmarks are not finite, or so close together or so out
    of shape that the crop would be enlarged or reduced more than `MOST_SCALE` times.
    Least squares by Umeyama (1991, "Least-squares estimation of transformation parameters between two point
    patterns"); in a plane the solution is one complex number.
    """
    given = np.asarray(landmarks, np.float64)
    points = given[..., 0] + 1j * given[..., 1]  # (N, 5)
    wanted = np.array([complex(x, y) for x, y in template.points])  # (5,)
    middle, centre = points.mean(axis=1), wanted.mean()
    offsets = points - middle[:, None]
    with np.errstate(all="ignore"):
        factor = (offsets.conj() @ (wanted - centre)) / (abs(offsets) ** 2).sum(axis=1)
        moved = centre - factor * middle
        usable = (abs(factor) <= MOST_SCALE) & (abs(factor) >= 1 / MOST_SCALE) & (abs(moved) < FARTHEST)
    rows = [[factor.real, -factor.imag, moved.real], [factor.imag, factor.real, moved.imag]]
    return np.where(usable[:, None, None], np.array(rows).transpose(2, 0, 1), np.nan)


def align(images: Sequence[np.ndarray], landmarks: np.ndarray, template: Template) -> np.ndarray:
    """One aligned face from each image: (N, side, side, 3) uint8 RGB.

    images: N arrays (H, W, 3) uint8 RGB of any size. landmarks: (N, 5, 2), x y in pixels of its image. Pixels are
    interpolated bilinearly, and averaged where the face shrinks (a triangle as wide as Pillow's `resize` takes); what
    lies outside of the image is black. Raises `UsageError` for landmarks that `similarities` finds unusable.
    """
    transforms = similarities(landmarks, template)
    crops = np.zeros((len(images), template.side, template.side, 3), np.uint8)
    for number, (image, transform, crop) in enumerate(zip(images, transforms, crops, strict=True)):
        if not np.isfinite(transform).all():
            raise UsageError(f"image {number}: the landmarks are not those of a face: {landmarks[number]}")
        _fill(image, np.linalg.inv(np.vstack([transform, [0.0, 0.0, 1.0]]))[:2], crop)
    return crops


def _fill(image: np.ndarray, backwards: np.ndarray, crop: np.ndarray) -> None:
    """Fill a black crop. backwards: (2, 3) float64, from x y 1 in the crop to x y in the image."""
    last = crop.shape[0] - 1
    corners = backwards @ [[0, last, 0, last], [0, 0, last, last], [1, 1, 1, 1]]  # (2, 4)
    # Pixels of the image per pixel of the crop.
    reach = max(float(np.hypot(*backwards[:, 0])), 1.0)
    limits = image.shape[1::-1]
    low = np.clip(np.floor(corners.min(axis=1) - reach), 0, limits).astype(np.int64)
    high = np.clip(np.ceil(corners.max(axis=1) + reach) + 1, low, limits).astype(np.int64)
    region = image[low[1] : high[1], low[0] : high[0]]
    if region.size:
        # A copy: the loop is compiled for writable arrays only.
        warp(region.copy(), backwards - np.array([[0, 0, low[0]], [0, 0, low[1]]]), reach, crop)
