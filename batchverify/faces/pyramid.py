"""Pictures at several scales for the first detection network, and regions of them at one size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from batchverify.kernels.loops import integrate, resample

FACTOR = 0.709
CELL = 12
STRIDE = 2
CHANNELS = 3
# Below anything that the first convolution gives.
_NEVER = -1e6
# A fourth sum, always zero: pixels of 16 bytes are looked up faster than those of 12.
SUMS = 4


@dataclass(frozen=True)
class Level:
    """One scale of a pyramid: its size and its place (even) on the canvas, in pixels."""

    scale: float
    height: int
    width: int
    top: int
    left: int

    @property
    def map_size(self) -> tuple[int, int]:
        """Rows and columns of the network's answer: two convolutions after a halving that rounds up."""
        return -(-(self.height - 2) // 2) - 4, -(-(self.width - 2) // 2) - 4


@dataclass(frozen=True)
class Pyramid:
    """All scales of one picture size on one canvas, so that the network runs once a picture.

    levels: from the largest. height, width: of the canvas. regions, places: of the levels, as `resample`
    takes them. cells: (L, 4) int64 top, left, height, width of the levels in the network's answer: the cells that
    have seen pixels of their level alone. scales: (L,) float32.
    """

    levels: tuple[Level, ...]
    height: int
    width: int
    regions: np.ndarray
    places: np.ndarray
    cells: np.ndarray
    scales: np.ndarray

    def canvas(self, sums: np.ndarray) -> np.ndarray:
        """The scaled pictures, (1, height, width, 3) float32 normalised, from an `integral` table.

        Each is that of `interpolate(mode="area")`.
        """
        canvas = np.zeros((1, self.height, self.width, CHANNELS), np.float32)
        resample(sums, self.regions, self.places, True, canvas)
        return canvas

    def mask(self) -> np.ndarray:
        """What to add to the first convolution's answer, (1, 1, height - 2, width - 2) float32.

        0 where it has seen pixels of one level alone; elsewhere so little that no maximum is taken from there.
        """
        mask = np.full((1, 1, self.height - 2, self.width - 2), _NEVER, np.float32)
        for each in self.levels:
            mask[..., each.top : each.top + each.height - 2, each.left : each.left + each.width - 2] = 0
        return mask


@lru_cache(maxsize=256)
def pyramid(height: int, width: int, smallest: int) -> Pyramid | None:
    """The pyramid of pictures of one size, for faces of `smallest` pixels and more; None below one cell."""
    scales = []
    scale = CELL / smallest
    while min(height, width) * scale >= CELL:
        scales.append(scale)
        scale *= FACTOR
    if not scales:
        return None
    sizes = [(int(height * each + 1), int(width * each + 1)) for each in scales]
    levels, canvas_height = _placed(scales, sizes)
    canvas_width = max(level.left + level.width for level in levels)
    return Pyramid(
        tuple(levels),
        canvas_height,
        canvas_width,
        np.array([[0, 0, width, height]] * len(levels)),
        np.array([[0, level.top, level.left, level.height, level.width] for level in levels]),
        np.array([[level.top // STRIDE, level.left // STRIDE, *level.map_size] for level in levels]),
        np.array(scales, np.float32),
    )


def _placed(scales: Sequence[float], sizes: Sequence[tuple[int, int]]) -> tuple[list[Level], int]:
    """Levels, the largest first, at even places on shelves as wide as the largest; the canvas's height.

    A shelf is as high as its first level. Its columns are as wide as their first; levels stand on one another.
    """
    levels: list[Level] = []
    columns: list[list[int]] = []  # top, left, width; bottom of the shelf
    widest, bottom = _even(sizes[0][1]), 0
    for scale, (height, width) in zip(scales, sizes, strict=True):
        high, wide = _even(height), _even(width)
        column = next((each for each in columns if wide <= each[2] and each[0] + high <= each[3]), None)
        if column is None:
            column = [bottom, 0, widest, bottom + high]
            bottom += high
            columns.append(column)
        levels.append(Level(scale, height, width, column[0], column[1]))
        if wide < column[2]:
            # What is left beside it is a column of its own.
            columns.append([column[0], column[1] + wide, column[2] - wide, column[3]])
            column[2] = wide
        column[0] += high
    return levels, bottom


def _even(length: int) -> int:
    return length + length % 2


def integral(image: np.ndarray) -> np.ndarray:
    """Summed-area table of an (H, W, 3) uint8 image: (H + 1, W + 1, 4) int32, modulo 2**32.

    Its first row and column are zero, and so is the fourth channel.
    """
    sums = np.empty((image.shape[0] + 1, image.shape[1] + 1, SUMS), np.int32)
    # Compiled once: numba takes arrays that may not be written for another type.
    integrate(np.require(image, requirements=["C", "W"]), sums)
    return sums


def regions(boxes: np.ndarray, height: int, width: int) -> np.ndarray:
    """(K, 4) float32 boxes, MTCNN's one-based corners, to (K, 4) int64 left, top, right, bottom, half open.

    As in facenet-pytorch they are truncated and clipped to the image.
    """
    whole = np.trunc(boxes).astype(np.int64)
    whole[:, :2] = np.maximum(whole[:, :2], 1) - 1
    whole[:, 2:] = np.minimum(whole[:, 2:], (width, height))
    return whole
