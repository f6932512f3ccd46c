"""Pictures at several scales for the first detection network, and regions of them at one size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

FACTOR = 0.709
CELL = 12
STRIDE = 2
# A fourth channel, always zero: pixels of 16 bytes are gathered ten times as fast as those of 12.
CHANNELS = 4
LEFT_OUT = float("-inf")


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

    levels: from the largest. height, width: of the canvas. rows, columns: by level, the edges of each
    pixel's region in the picture, (low, high). shares: by level, (h, w, 4) float32, one over the region's area.
    owner: (h, w) int8 of the network's answer, the level whose pixels alone a cell has seen, or -1.
    """

    levels: tuple[Level, ...]
    height: int
    width: int
    rows: tuple[tuple[np.ndarray, np.ndarray], ...]
    columns: tuple[tuple[np.ndarray, np.ndarray], ...]
    shares: tuple[torch.Tensor, ...]
    owner: torch.Tensor

    def canvas(self, sums: np.ndarray) -> torch.Tensor:
        """The scaled pictures, (1, 4, h, w) float32 normalised, channels last, from an `integral` table.

        Each is that of `interpolate(mode="area")`.
        """
        canvas = torch.zeros(self.height, self.width, CHANNELS)
        for level, rows, columns, shares in zip(
            self.levels, self.rows, self.columns, self.shares, strict=True
        ):
            lines = sums.take(rows[1], axis=0)
            lines -= sums.take(rows[0], axis=0)
            total = lines.take(columns[1], axis=1)
            total -= lines.take(columns[0], axis=1)
            place = canvas[level.top : level.top + level.height, level.left : level.left + level.width]
            torch.mul(torch.from_numpy(total), shares, out=place)
        return normalised(canvas[None])

    def leave_out_edges(self, values: torch.Tensor) -> None:
        """Before the halving: where it would look beyond a level, it must not see what stands beside it.

        values: (1, C, h, w), the first convolution's answer; changed in place.
        """
        for level in self.levels:
            bottom, right = level.top + level.height - 2, level.left + level.width - 2
            if level.height % 2:
                values[:, :, bottom : bottom + 1, level.left : right + 1] = LEFT_OUT
            if level.width % 2:
                values[:, :, level.top : bottom + 1, right : right + 1] = LEFT_OUT


def normalised(pixels: torch.Tensor) -> torch.Tensor:
    """(B, H, W, 4) float32 in 0..255, changed in place, to the networks' (B, 4, H, W) in -1..1."""
    return pixels.sub_(127.5).mul_(0.0078125).permute(0, 3, 1, 2)


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
    edges = [(_edges(height, level.height), _edges(width, level.width)) for level in levels]
    shares = [
        torch.from_numpy(1.0 / ((bottom - top)[:, None] * (right - left)[None, :]))
        for (top, bottom), (left, right) in edges
    ]
    owner = torch.full(
        ((canvas_height - 2 + 1) // 2 - 4, (canvas_width - 2 + 1) // 2 - 4), -1, dtype=torch.int8
    )
    for number, level in enumerate(levels):
        rows, columns = level.map_size
        top, left = level.top // STRIDE, level.left // STRIDE
        owner[top : top + rows, left : left + columns] = number
    return Pyramid(
        tuple(levels),
        canvas_height,
        canvas_width,
        tuple(rows for rows, _ in edges),
        tuple(columns for _, columns in edges),
        tuple(each[..., None].float().repeat(1, 1, CHANNELS) for each in shares),
        owner,
    )


def _placed(scales: Sequence[float], sizes: Sequence[tuple[int, int]]) -> tuple[list[Level], int]:
    """Levels on shelves as wide as the largest, each on the first with room, at even places."""
    levels: list[Level] = []
    shelves: list[list[int]] = []  # top, height, used width
    for scale, (height, width) in zip(scales, sizes, strict=True):
        even_height, even_width = height + height % 2, width + width % 2
        for shelf in shelves:
            if shelf[2] + width <= sizes[0][1] and even_height <= shelf[1]:
                break
        else:
            top = shelves[-1][0] + shelves[-1][1] if shelves else 0
            shelf = [top, even_height, 0]
            shelves.append(shelf)
        levels.append(Level(scale, height, width, shelf[0], shelf[2]))
        shelf[2] += even_width
    return levels, shelves[-1][0] + shelves[-1][1]


def integral(image: np.ndarray) -> np.ndarray:
    """Summed-area table of an (H, W, 3) uint8 image: (H + 1, W + 1, 4) int32 or int64.

    Its first row and column are zero, and so is the fourth channel.
    """
    height, width = image.shape[:2]
    kind = np.int32 if height * width * 255 < 2**31 else np.int64
    sums = np.zeros((height + 1, width + 1, CHANNELS), kind)
    np.cumsum(image, axis=0, out=sums[1:, 1:, :3], dtype=kind)
    np.cumsum(sums[1:, 1:], axis=1, out=sums[1:, 1:])
    return sums


def area_patches(sums: np.ndarray, boxes: np.ndarray, size: int) -> torch.Tensor:
    """Resample K regions at once by area: (K, size, size, 4) float32 means.

    `boxes` (K, 4) float32 are MTCNN's one-based corners; as in facenet-pytorch they are truncated and
    clipped to the image. Equal to `interpolate(mode="area")` of each region, by four look-ups a pixel.
    """
    height, width = sums.shape[0] - 1, sums.shape[1] - 1
    whole = np.trunc(boxes).astype(np.int64)
    top, bottom = np.maximum(whole[:, 1], 1) - 1, np.minimum(whole[:, 3], height)
    left, right = np.maximum(whole[:, 0], 1) - 1, np.minimum(whole[:, 2], width)
    y0, y1 = _bins(top, bottom, size)
    x0, x1 = _bins(left, right, size)
    pixels = sums.reshape(-1, CHANNELS)
    low, high = (y0 * (width + 1))[:, :, None], (y1 * (width + 1))[:, :, None]
    first, last = x0[:, None, :], x1[:, None, :]
    total = pixels.take(high + last, axis=0)
    total -= pixels.take(low + last, axis=0)
    total -= pixels.take(high + first, axis=0)
    total += pixels.take(low + first, axis=0)
    areas = ((y1 - y0)[:, :, None] * (x1 - x0)[:, None, :]).astype(np.float32)
    return torch.from_numpy(total).float().div_(torch.from_numpy(areas)[..., None])


def _edges(length: int, cells: int) -> tuple[np.ndarray, np.ndarray]:
    """Edges of adaptive average pooling from `length` pixels to `cells`."""
    low, high = _bins(np.zeros(1, np.int64), np.full(1, length), cells)
    return low[0], high[0]


def _bins(low: np.ndarray, high: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Edges (K, size) of adaptive average pooling from [low, high) to `size` cells."""
    extent = (high - low)[:, None]
    cell = np.arange(size)[None, :]
    return low[:, None] + cell * extent // size, low[:, None] - (-(cell + 1) * extent // size)
