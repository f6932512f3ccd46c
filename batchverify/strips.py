"""Convolutions of few channels with their slope and pooling, row by row: what is between them stays in the cache."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from batchverify.grids import peak
from batchverify.machine_code import compiled
from batchverify.tiles import sloped_tile, tile_rows
from batchverify.vectors import LANES

KERNEL = 3


class PooledConvolution:
    """A convolution of 3 x 3 without padding, its bias, PReLU, and maxima of windows two apart.

    weight: (D, C, 3, 3) float32, D a multiple of 16, at most 64. bias, slopes: (D,) float32. window: 2 or 3; the last
    is cut off at the edge, as `max_pool2d(ceil_mode=True)` does.
    """

    def __init__(self, weight: np.ndarray, bias: np.ndarray, slopes: np.ndarray, window: int) -> None:
        outputs, channels = weight.shape[:2]
        self.window, self.outputs = window, outputs
        self._weights = np.ascontiguousarray(weight.transpose(2, 3, 1, 0))  # (3, 3, C, D)
        self._bias, self._slopes = np.ascontiguousarray(bias), np.ascontiguousarray(slopes)
        self._loop = _loop(channels, outputs // LANES, window)

    def __call__(self, values: np.ndarray, areas: np.ndarray | None = None) -> np.ndarray:
        """(B, h, w, C) float32, contiguous, to (B, h', w', D).

        areas: (R, 4) int64 top, left (both even), height, width of parts of the convolution's outputs: each is
        pooled by itself, as if it were alone; what none covers is zero.
        """
        height, width = (length - KERNEL + 1 for length in values.shape[1:3])
        rows, columns = (-(-(length - self.window) // 2) + 1 for length in (height, width))
        shape = len(values), rows, columns, self.outputs
        target = (np.empty if areas is None else np.zeros)(shape, np.float32)
        if areas is None:
            areas = np.array([[0, 0, height, width]])
        span = max(int(areas[:, 3].max()), tile_rows(self.outputs // LANES))
        # Rows of outputs that a row of windows needs, and inputs where there are fewer than a tile takes.
        strip = np.empty(KERNEL * span * self.outputs, np.float32)
        narrow = np.zeros(KERNEL * (span + KERNEL - 1) * values.shape[3], np.float32)
        numbers = self._weights, self._bias, self._slopes
        self._loop(values.reshape(-1), np.array(values.shape), numbers, areas, span, narrow, strip, target)
        return target


@cache
def _row_loop(channels: int, vectors: int) -> Any:
    """The loop over a row of `width` outputs, whose inputs begin at an address and have rows `wide` apart."""
    rows, filters = tile_rows(vectors), vectors * LANES
    shape = (rows, vectors, channels, KERNEL * channels)

    @compiled
    def fill_row(
        values: Any, at: int, wide: int, width: int, numbers: Any, narrow: Any, strip: Any, to: int
    ) -> None:
        weights, bias, slopes = numbers
        source, first, line = values, at, wide
        if width < rows:
            source, first, line = narrow, 0, (rows + KERNEL - 1) * channels
            for v in range(KERNEL):
                for u in range((width + KERNEL - 1) * channels):
                    narrow[v * line + u] = values[at + v * wide + u]
        for start in range(0, width, rows):
            # The last tile begins earlier where it would reach beyond the row.
            x = max(0, min(start, width - rows))
            place = to + x * filters
            sloped_tile(
                shape,
                source,
                first + x * channels,
                line,
                KERNEL,
                weights,
                0,
                bias,
                0,
                strip,
                place,
                filters,
                slopes,
            )

    return fill_row


@cache
def _loop(channels: int, vectors: int, window: int) -> Any:
    """The loop of `PooledConvolution` for a number of channels, of outputs in vectors, and a window."""
    fill_row, filters = _row_loop(channels, vectors), vectors * LANES

    @compiled
    def convolve(
        values: Any, sizes: Any, numbers: Any, areas: Any, span: int, narrow: Any, strip: Any, target: Any
    ) -> None:
        high, wide = sizes[1] * sizes[2] * channels, sizes[2] * channels
        images, down, across, _ = target.shape
        for part in range(images * len(areas)):
            image = part // len(areas)
            area = areas[part - image * len(areas)]
            top, left, height, width = area[0], area[1], area[2], area[3]
            done, end = top, top + height - 1
            for y in range((height - window + 1) // 2 + 1):
                first = top + 2 * y
                second, third = min(first + 1, end), min(first + window - 1, end)
                for row in range(done, third + 1):
                    at = image * high + row * wide + left * channels
                    fill_row(values, at, wide, width, numbers, narrow, strip, row % KERNEL * span * filters)
                done = third + 1
                one, two = first % KERNEL * span * filters, second % KERNEL * span * filters
                three = third % KERNEL * span * filters
                to = ((image * down + top // 2 + y) * across + left // 2) * filters
                for x in range((width - window + 1) // 2 + 1):
                    near, far = (
                        min(2 * x + 1, width - 1) * filters,
                        min(2 * x + window - 1, width - 1) * filters,
                    )
                    place = to + x * filters
                    peak(window, strip, one, two, three, 2 * x * filters, near, far, target, place, filters)

    return convolve


def maxima(values: np.ndarray, window: int) -> np.ndarray:
    """`max_pool2d(window, 2, ceil_mode=True)` of (B, h, w, C), C a multiple of 16: (B, h', w', C).

    float32, or the bits of bfloat16 as int16. Of a number and NaN the number may be taken.
    """
    values = np.ascontiguousarray(values)
    images, height, width, channels = values.shape
    rows, columns = (-(-(length - window) // 2) + 1 for length in (height, width))
    target = np.empty((images, rows, columns, channels), values.dtype)
    _maxima(window)(values, target)
    return target


@cache
def _maxima(window: int) -> Any:
    @compiled
    def pool(values: Any, target: Any) -> None:
        _, height, width, channels = values.shape
        images, rows, columns, _ = target.shape
        for image in range(images):
            for y in range(rows):
                second, third = min(2 * y + 1, height - 1), min(2 * y + window - 1, height - 1)
                first, row = image * height * width * channels, width * channels
                one, two, three = first + 2 * y * row, first + second * row, first + third * row
                for x in range(columns):
                    middle, right = min(2 * x + 1, width - 1), min(2 * x + window - 1, width - 1)
                    to = ((image * rows + y) * columns + x) * channels
                    peak(
                        window,
                        values,
                        one,
                        two,
                        three,
                        2 * x * channels,
                        middle * channels,
                        right * channels,
                        target,
                        to,
                        channels,
                    )

    return pool
