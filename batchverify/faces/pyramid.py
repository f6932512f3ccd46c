"""An image at several scales for the first detection network, and its summed-area table."""

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
# Far below all outputs of the first convolution.
_NEVER = -1e6
# The fourth sum is always zero: pixels of 16 bytes are read faster than pixels of 12.
SUMS = 4


@dataclass(frozen=True)
class Level:
    """A pyramid's image at one scale: its size and its position (even numbers) on the canvas, in pixels."""

    height: int
    width: int
    top: int
    left: int

    @property
    def map_size(self) -> tuple[int, int]:
        """Rows and columns of the network's output: a halving that rounds up, then two convolutions."""
        return -(-(self.height - 2) // 2) - 4, -(-(self.width - 2) // 2) - 4


@dataclass(frozen=True)
class Pyramid:
    """All scales of one image size on one canvas, so that the network runs only once per image.

    levels: the largest first. height, width: of the canvas. regions, targets: of the levels, for `resample`.
    cells: (L, 4) int64 top, left, height, width of each level in the network's output, without the cells that see
    pixels of other levels. scales: (L,) float32.
    """

    levels: tuple[Level, ...]
    height: int
    width: int
    regions: np.ndarray
    targets: np.ndarray
    cells: np.ndarray
    scales: np.ndarray

    def canvas(self, sums: np.ndarray) -> np.ndarray:
        """The canvas, (1, height, width, 3) float32 normalised, from an `integral` table.

        The image is scaled as by torch's `interpolate(mode="area")`.
        """
        canvas = np.zeros((1, self.height, self.width, CHANNELS), np.float32)
        resample(sums, self.regions, self.targets, True, canvas)
        return canvas

    def mask(self) -> np.ndarray:
        """What is added to the output of the first convolution, (1, 1, height - 2, width - 2) float32.

        0 where the output depends on one level only, elsewhere so low that it is never the maximum of a window.
        """
        mask = np.full((1, 1, self.height - 2, self.width - 2), _NEVER, np.float32)
        for level in self.levels:
            bottom, right = level.top + level.height - 2, level.left + level.width - 2
            mask[..., level.top : bottom, level.left : right] = 0
        return mask


@lru_cache(maxsize=256)
def pyramid(height: int, width: int, smallest: int) -> Pyramid | None:
    """The pyramid of images of one size, for faces of at least `smallest` pixels; None for smaller images."""
    scales = []
    scale = CELL / smallest
    while min(height, width) * scale >= CELL:
        scales.append(scale)
        scale *= FACTOR
    if not scales:
        return None
    sizes = [(int(height * scale + 1), int(width * scale + 1)) for scale in scales]
    levels, canvas_height = _placed(sizes)
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


def _placed(sizes: Sequence[tuple[int, int]]) -> tuple[list[Level], int]:
    """Place the levels, the largest first, on shelves as wide as the largest; also returns the canvas's height.

    A shelf is as high as its first level. It is divided into columns, each as wide as its first level, in which
    levels lie below one another.
    """
    levels: list[Level] = []
    columns: list[list[int]] = []  # next top, left, width; bottom of the shelf
    widest, bottom = _even(sizes[0][1]), 0
    for height, width in sizes:
        high, wide = _even(height), _even(width)
        column = next((col for col in columns if wide <= col[2] and col[0] + high <= col[3]), None)
        if column is None:
            column = [bottom, 0, widest, bottom + high]
            bottom += high
            columns.append(column)
        levels.append(Level(height, width, column[0], column[1]))
        if wide < column[2]:
            # The rest beside it becomes a new column.
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
    # Writable: for read-only arrays, which are another type, numba would compile the loop again.
    integrate(np.require(image, requirements=["C", "W"]), sums)
    return sums


def regions(boxes: np.ndarray, height: int, width: int) -> np.ndarray:
    """(K, 4) float32 boxes with MTCNN's one-based corners to (K, 4) int64 left, top, right, bottom, half open.

    They are truncated and clipped to the image as in facenet-pytorch.
    """
    whole = np.trunc(boxes).astype(np.int64)
    whole[:, :2] = np.maximum(whole[:, :2], 1) - 1
    whole[:, 2:] = np.minimum(whole[:, 2:], (width, height))
    return whole
