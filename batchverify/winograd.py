"""Convolutions of 3 x 3 with fewer multiplications: Winograd's minimal filtering, compiled for the CPU at hand."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import chain
from typing import Any

import numpy as np

from batchverify.grids import finished_grid, grid, move
from batchverify.machine_code import compiled
from batchverify.tiles import tile, tile_rows
from batchverify.vectors import LANES

KERNEL = 3
NOTHING = np.zeros(LANES, np.float32)

Matrix = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Filtering:
    """How a line of inputs is filtered by three weights: outputs = O ((K weights) * (I inputs)).

    In an image the same along both sides. stride: inputs from one output to the next.
    """

    stride: int
    inputs: Matrix
    kernel: Matrix
    outputs: Matrix

    @property
    def size(self) -> int:
        """Outputs of a tile."""
        return len(self.outputs)

    @property
    def side(self) -> int:
        """Inputs, and products, of a tile."""
        return len(self.inputs)


# Channels from which on layers in bfloat16 are filtered by threes: InceptionResnetV1's vectors are then as far from
# float32's as with plain convolutions; by twos alone they are nearer, by threes alone further.
DEEP = 80

# Lavin and Gray 2015, arXiv 1509.09308, with the points 0, 1, -1 and infinity: 4 multiplications an output, where the
# plain convolution takes 9. It costs no precision beside rounding inputs and weights to bfloat16.
TWO = Filtering(
    1,
    ((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1)),
    ((1, 0, 0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0, 0, 1)),
    ((1, 1, 1, 0), (0, 1, -1, -1)),
)
# With the point 2, too: 2.8 multiplications an output. In bfloat16 its error is three times that of the plain one.
THREE = Filtering(
    1,
    ((2, -1, -2, 1, 0), (0, -2, -1, 1, 0), (0, 2, -3, 1, 0), (0, -1, 0, 1, 0), (0, 2, -1, -2, 1)),
    ((1 / 2, 0, 0), (-1 / 2, -1 / 2, -1 / 2), (-1 / 6, 1 / 6, -1 / 6), (1 / 6, 1 / 3, 2 / 3), (0, 0, 1)),
    ((1, 1, 1, 1, 0), (0, 1, -1, 2, 0), (0, 1, 1, 4, 1)),
)
# Every other output: the first and third weight filter the even inputs, the second the odd ones. 6.25 for 9.
APART = Filtering(
    2,
    ((1, 0, -1, 0, 0), (0, 0, 1, 0, 0), (0, 0, -1, 0, 1), (0, 1, 0, 0, 0), (0, 0, 0, 1, 0)),
    ((1, 0, 0), (1, 0, 1), (0, 0, 1), (0, 1, 0), (0, 1, 0)),
    ((1, 1, 0, 1, 0), (0, 1, 1, 0, 1)),
)


class WinogradConvolution:
    """A convolution of 3 x 3, its bias, and a slope for what is negative (0 is ReLU, 1 leaves it).

    weight: (D, C, 3, 3) float32, C and D multiples of 16. bias, slopes: (D,) float32. stride: 1 or 2. padding: zeros
    around the image. pairs: inputs, outputs and products in bfloat16, sums in float32; for CPUs where
    `tiles.multiplies_bfloat16()`.
    """

    def __init__(
        self,
        weight: np.ndarray,
        bias: np.ndarray,
        slopes: np.ndarray,
        *,
        stride: int = 1,
        padding: int = 0,
        pairs: bool = False,
    ) -> None:
        self.padding, self.outputs = padding, len(weight)
        small = pairs and weight.shape[1] < DEEP
        self._filtering = {1: TWO if small else THREE, 2: APART}[stride]
        self._weights = transformed(weight, self._filtering, pairs)
        self._bias, self._slopes = np.ascontiguousarray(bias), np.ascontiguousarray(slopes)
        self._loop = _loop(self._filtering, pairs)

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """(B, h, w, C) to (B, h', w', D): float32, or the bits of bfloat16 as int16; contiguous."""
        images, height, width, channels = values.shape
        side, block, stride = self._filtering.side, _block(), self._filtering.stride
        down, across = ((length + 2 * self.padding - KERNEL) // stride + 1 for length in (height, width))
        target = np.empty((images, down, across, self.outputs), values.dtype)
        # What is left over in the last block are old numbers.
        spread = np.zeros((side * side, channels // LANES, block, LANES), values.dtype)
        # Of one tile of products, LANES outputs wide: they stay in the first cache.
        products = np.empty((side * side, tile_rows(), LANES), np.float32)
        # A tile of inputs or outputs, and an empty pixel.
        edge = np.zeros(side * side * channels + channels, values.dtype)
        # Of each tile: its first output, and how many rows and columns of it there are.
        places = np.empty((block, 3), np.int64)
        numbers = self._weights, self._bias, self._slopes, NOTHING
        shapes = np.array([*values.shape, *target.shape[1:], self.padding])
        factors = spread.view(self._weights.dtype).reshape(-1)
        scratch = spread.reshape(-1), factors, products.reshape(-1), edge, places
        self._loop(values.reshape(-1), shapes, numbers, scratch, target.reshape(-1))
        return target


def _block() -> int:
    """Tiles whose inputs are in the cache together."""
    return tile_rows() * -(-24 // tile_rows())


def transformed(weight: np.ndarray, filtering: Filtering, pairs: bool) -> np.ndarray:
    """(D, C, 3, 3) to the kernels' transforms, (D / 16, P, C, 16) float32, P positions of an input tile.

    pairs: (D / 16, P, C / 2, 16) int32, two channels beside one another as bfloat16.
    """
    outputs, channels = weight.shape[:2]
    kernel = np.array(filtering.kernel)
    # (P, 9) by (D / 16, 9, C * 16)
    lines = weight.reshape(outputs // LANES, LANES, channels, -1).transpose(0, 3, 2, 1).astype(np.float64)
    found = np.kron(kernel, kernel) @ lines.reshape(outputs // LANES, KERNEL * KERNEL, -1)
    panels = found.reshape(outputs // LANES, -1, channels, LANES).astype(np.float32)
    if not pairs:
        return panels.reshape(-1)
    halves = bfloat16(panels).reshape(*panels.shape[:2], channels // 2, 2, LANES)
    return np.ascontiguousarray(halves.swapaxes(3, 4)).reshape(-1).view(np.int32)


def bfloat16(values: np.ndarray) -> np.ndarray:
    """The bits, int16, of the nearest bfloat16; of two the even one."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16).view(np.int16)


@cache
def _loop(filtering: Filtering, pairs: bool) -> Any:
    """The loop of `WinogradConvolution`.

    Images, weights and scratch are flat, and there are no slices: what numba compiles for those takes seconds.
    """
    rows, block, size, positions = tile_rows(), _block(), filtering.size, filtering.side**2
    spread_tiles, finish_tiles = _spreading(filtering), _finishing(filtering)
    depth = LANES // 2 if pairs else LANES
    shape, jump = (rows, 1, depth, depth), block * depth

    @compiled
    def convolve(values: Any, shapes: Any, numbers: Any, scratch: Any, target: Any) -> None:
        images, channels, down, across, filters = shapes[0], shapes[3], shapes[4], shapes[5], shapes[6]
        weights, bias, slopes, nothing = numbers
        spread, factors, products, edge, places = scratch
        tiles = images * -(-down // size) * -(-across // size)
        bands, panels = channels // LANES, filters // LANES
        for start in range(0, tiles, block):
            count = min(block, tiles - start)
            spread_tiles(values, shapes, start, count, edge, spread, places)
            for panel in range(panels):
                for t in range(0, count, rows):
                    for position in range(positions):
                        kernel = (panel * positions + position) * bands * depth * LANES
                        at = (position * bands * block + t) * depth
                        to = position * rows * LANES
                        tile(
                            shape, factors, at, jump, bands, weights, kernel, nothing, 0, products, to, LANES
                        )
                    end = min(t + rows, count)
                    finish_tiles(
                        products, t, end, places, across, filters, panel * LANES, bias, slopes, edge, target
                    )

    return convolve


@cache
def _spreading(filtering: Filtering) -> Any:
    """The transform of a block of tiles of inputs.

    In bands of LANES channels: their distances are the same for any number of channels.
    """
    size, side, band = filtering.size, filtering.side, _block() * LANES
    matrix, hop = (side, *chain(*filtering.inputs)), size * filtering.stride

    @compiled
    def spread_tiles(
        values: Any, shapes: Any, start: int, count: int, edge: Any, spread: Any, places: Any
    ) -> None:
        height, width, channels, padding = shapes[1], shapes[2], shapes[3], shapes[7]
        down, across = shapes[4], shapes[5]
        high, wide = -(-down // size), -(-across // size)
        beside, empty = channels // LANES * band, len(edge) - channels
        for t in range(count):
            image = (start + t) // (high * wide)
            place = start + t - image * high * wide
            row, column = place // wide, place % wide
            y, x = row * size, column * size
            places[t, 0] = (image * down + y) * across + x
            places[t, 1], places[t, 2] = min(size, down - y), min(size, across - x)
            y, x = row * hop - padding, column * hop - padding
            source, at, line = values, ((image * height + y) * width + x) * channels, width * channels
            if y < 0 or x < 0 or y + side > height or x + side > width:
                for v in range(side):
                    for u in range(side):
                        inside = 0 <= y + v < height and 0 <= x + u < width
                        pixels, there = (values, at + v * line + u * channels) if inside else (edge, empty)
                        move(pixels, there, edge, (v * side + u) * channels, channels)
                source, at, line = edge, 0, side * channels
            grid(matrix, source, at, line, channels, spread, t * LANES, side * beside, beside, band, channels)

    return spread_tiles


@cache
def _finishing(filtering: Filtering) -> Any:
    """The transform of a block of tiles of products to outputs, with bias and slope."""
    size, side, rows = filtering.size, filtering.side, tile_rows()
    matrix = (side, *chain(*filtering.outputs))

    @compiled
    def finish_tiles(
        products: Any,
        start: int,
        end: int,
        places: Any,
        across: int,
        filters: int,
        begin: int,
        bias: Any,
        slopes: Any,
        edge: Any,
        target: Any,
    ) -> None:
        beside, line = rows * LANES, across * filters
        for t in range(start, end):
            first, high, wide = places[t, 0] * filters + begin, places[t, 1], places[t, 2]
            whole = high == size and wide == size
            aim, to, under, far = (target, first, line, filters) if whole else (edge, 0, size * LANES, LANES)
            at = (t - start) * LANES
            finished_grid(
                matrix,
                products,
                at,
                side * beside,
                beside,
                aim,
                to,
                under,
                far,
                bias,
                slopes,
                begin,
            )
            if not whole:
                for v in range(high):
                    for u in range(wide):
                        move(edge, (v * size + u) * LANES, target, first + v * line + u * filters, LANES)

    return finish_tiles
