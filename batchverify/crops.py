"""From an upright picture to the 160 x 160 face that the backbone sees."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from batchverify.fingerprint import CENTER, FACE_SIZE

Box = tuple[float, float, float, float]


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
