"""The loops compiled by numba, which `loops` calls if numba works. `plain_loops` has the same in numpy."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import numpy as np
from numba import config, njit

Array = np.ndarray

# Division by zero is as in numpy, and sums are not reordered: the results have the same bits on every machine.
_SETTINGS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "boundscheck": False}
# As in `plain_loops`. They are not imported, because numba's cache would not notice a change.
_LANES = 32
_EPSILON = np.float32(1e-6)
# How many pairs ahead rows are touched: they are anywhere in memory, and the CPU cannot predict where.
_AHEAD = 2
_CACHE_LINE = 64
# Rows of a crop that are warped together: enough for long loops, few enough for the CPU's cache.
_ROWS = 4
# float16 to float32: bits are moved to their positions in float32, and a multiplication by 2**112 corrects the offset
# of the exponent. Infinities and NaN have the largest exponent in both.
_MOVED = np.int32(-0x70002000)
_LARGEST_HALF = np.int32(0x7C00)
_LARGEST_FLOAT = np.int32(0x7F800000)
_OFFSET = np.float32(2.0**112)

_part = njit(**_SETTINGS)  # a function that becomes part of the loops that call it


def _can_store() -> bool:
    """Whether numba has a folder for its cache. Where there is no home, it would make one called `~` right here."""
    users = os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache"))  # noqa: PTH111
    if os.path.isabs(users):  # noqa: PTH117
        return True
    folders = [getattr(config, "CACHE_DIR", ""), str(Path(__file__).parent / "__pycache__")]
    return any(folder and _is_writable(folder) for folder in folders)


def _is_writable(folder: str) -> bool:
    with contextlib.suppress(OSError):
        Path(folder).mkdir(parents=True, exist_ok=True)
    return Path(folder).is_dir() and os.access(folder, os.W_OK)


_STORES = _can_store()


def _cached(loop: Any) -> Any:
    """Compile at the first call; machine code is stored beside this module or in the user's cache folder."""
    try:
        return njit(cache=_STORES, **_SETTINGS)(loop)
    except (RuntimeError, OSError):
        # Neither folder is writable: every process compiles the loop.
        return njit(**_SETTINGS)(loop)


def compiled_anew(loop: Any) -> Any:
    """The same loop without a cache. A cache that could not be loaded is replaced for the next process."""
    with contextlib.suppress(Exception):
        if not loop.signatures:
            loop.recompile()
    return njit(**_SETTINGS)(loop.py_func)


def try_out(name: str) -> None:
    """Call a loop on next to nothing, of the types that it is used with: it is compiled, or its code is loaded."""
    image, sums = np.zeros((1, 1, 3), np.uint8), np.zeros((2, 2, 4), np.int32)
    rows = np.zeros(0, np.int64)
    arguments: dict[str, tuple[Any, ...]] = {
        "integrate": (image, sums),
        "resample": (
            sums,
            np.zeros((0, 4), np.int64),
            np.zeros((0, 5), np.int64),
            False,
            np.zeros((1, 1, 1, 3), "f4"),
        ),
        "suppress": (np.zeros((0, 4), np.float32), rows, 0.5),
        "warp": (image, np.eye(2, 3), 1.0, image.copy()),
        "distances": (
            np.zeros((0, 32), "i2"),
            np.zeros((0, 32), "i2"),
            rows,
            rows,
            np.zeros(0, "f4"),
            np.zeros(0, "f4"),
        ),
    }
    globals()[name](*arguments[name])


@_cached
def integrate(image: Array, sums: Array) -> None:
    """See `loops.integrate`."""
    height, width, _ = image.shape
    sums[0] = 0
    for y in range(height):
        sums[y + 1, 0] = 0
        red = green = blue = 0
        for x in range(width):
            red += image[y, x, 0]
            green += image[y, x, 1]
            blue += image[y, x, 2]
            sums[y + 1, x + 1, 0] = sums[y, x + 1, 0] + red
            sums[y + 1, x + 1, 1] = sums[y, x + 1, 1] + green
            sums[y + 1, x + 1, 2] = sums[y, x + 1, 2] + blue
            sums[y + 1, x + 1, 3] = 0


@_part
def _divide(start: int, extent: int, low: Array, high: Array) -> None:
    """The cells of adaptive average pooling of `extent` pixels from `start` on, without a division per cell."""
    cells = len(low)
    step, rest = extent // cells, extent % cells
    edge, remainder = start, 0
    for cell in range(cells):
        low[cell] = edge
        edge += step
        remainder += rest
        if remainder >= cells:
            edge += 1
            remainder -= cells
        high[cell] = edge + (remainder > 0)


@_cached
def resample(sums: Array, regions: Array, targets: Array, reciprocal: bool, patches: Array) -> None:
    """See `loops.resample`."""
    edges = np.empty((4, max(patches.shape[1], patches.shape[2])), np.int64)
    for k in range(len(regions)):
        left, top, right, bottom = regions[k]
        n, first, start, rows, columns = targets[k]
        low, high, upper, lower = edges[0, :columns], edges[1, :columns], edges[2, :rows], edges[3, :rows]
        _divide(left, right - left, low, high)
        _divide(top, bottom - top, upper, lower)
        for y in range(rows):
            above, below = sums[upper[y]], sums[lower[y]]
            for x in range(columns):
                x0, x1 = low[x], high[x]
                area = np.float32((lower[y] - upper[y]) * (x1 - x0))
                share = np.float32(1 / np.float64(area))
                for c in range(3):
                    total = np.int32(below[x1, c] - above[x1, c] - below[x0, c] + above[x0, c])
                    mean = np.float32(total) * share if reciprocal else np.float32(total) / area
                    patches[n, first + y, start + x, c] = (mean - np.float32(127.5)) * np.float32(0.0078125)


@_cached
def suppress(boxes: Array, order: Array, threshold: float) -> Array:
    """See `loops.suppress`."""
    kept, count = np.empty(len(order), np.int64), 0
    for index in order:
        x0, y0, x1, y1 = boxes[index]
        area = (x1 - x0) * (y1 - y0)
        remains = True
        for other in kept[:count]:
            across = min(x1, boxes[other, 2]) - max(x0, boxes[other, 0])
            down = min(y1, boxes[other, 3]) - max(y0, boxes[other, 1])
            if across > 0 and down > 0:
                shared = across * down
                other_area = (boxes[other, 2] - boxes[other, 0]) * (boxes[other, 3] - boxes[other, 1])
                if shared / (area + other_area - shared) > threshold:
                    remains = False
                    break
        if remains:
            kept[count] = index
            count += 1
    return kept[:count]


@_cached
def warp(image: Array, affine: Array, reach: float, crop: Array) -> None:
    """See `loops.warp`. Several rows at a time, in simple loops over all their pixels: those become vector code."""
    (height, width, _), (rows, columns, _) = image.shape, crop.shape
    taps, pixels = int(np.ceil(2 * reach)), crop.reshape(-1, 3)
    line = width + 2 * taps
    packed = _packed(image, taps)
    size = _ROWS * columns
    x, y, sum_x, sum_y = np.empty(size), np.empty(size), np.empty(size), np.empty(size)
    across, down = np.empty((taps, size)), np.empty((taps, size))
    left, top = np.empty(size, np.int32), np.empty(size, np.int32)
    totals = np.empty((3, size))
    for first in range(0, rows, _ROWS):
        count = min(_ROWS, rows - first) * columns
        _positions(affine[0], first, columns, x)
        _positions(affine[1], first, columns, y)
        _triangles(x, reach, width, across, sum_x, left)
        _triangles(y, reach, height, down, sum_y, top)
        for k in range(size):
            left[k] += top[k] * np.int32(line)
        _weigh(packed, line, left, across, down, totals)
        for k in range(size):
            sum_x[k] = 1.0 / (sum_x[k] * sum_y[k])
        _store(totals, sum_x, pixels[first * columns : first * columns + count])


@_part
def _packed(image: Array, border: int) -> Array:
    """The pixels of an image with a black border, line after line, red green blue in the bytes of one number each."""
    height, width, _ = image.shape
    packed = np.zeros((height + 2 * border, width + 2 * border), np.uint32)
    for y in range(height):
        source, target = image[y], packed[y + border, border : border + width]
        for x in range(width):
            red, green, blue = np.uint32(source[x, 0]), np.uint32(source[x, 1]), np.uint32(source[x, 2])
            target[x] = red | (green << np.uint32(8)) | (blue << np.uint32(16))
    return packed.reshape(-1)


@_part
def _positions(factors: Array, first: int, columns: int, centres: Array) -> None:
    """Fill one coordinate in the image of each pixel of some rows of the crop, from row `first` on."""
    for row in range(len(centres) // columns):
        part, moved = centres[row * columns : (row + 1) * columns], factors[1] * (first + row)
        for column in range(columns):
            part[column] = factors[0] * column + moved + factors[2]


@_part
def _triangles(centres: Array, reach: float, limit: int, weights: Array, sums: Array, indices: Array) -> None:
    """Fill the weights of the pixels that a triangle about each centre reaches, their sums, and the first pixels.

    Indices count from the start of a border as wide as the triangle and end with the `limit` pixels after it.
    """
    taps, slope = len(weights), 1.0 / reach
    firsts = np.empty(len(centres))
    for k in range(len(centres)):
        firsts[k] = np.floor(centres[k] - reach) + 1.0
    for k in range(len(centres)):
        indices[k] = np.int32(min(max(firsts[k], -float(taps)), float(limit)) + float(taps))
    sums[:] = 0.0
    for i in range(taps):
        line = weights[i]
        for k in range(len(centres)):
            line[k] = max(1.0 - abs(firsts[k] + i - centres[k]) * slope, 0.0)
        for k in range(len(centres)):
            sums[k] += line[k]


@_part
def _weigh(packed: Array, line: int, starts: Array, across: Array, down: Array, totals: Array) -> None:
    """Fill (3, N) weighted sums of the pixels from each start on."""
    parts, pixels = np.empty_like(totals), np.empty(len(starts), np.uint32)
    totals[:] = 0.0
    for j in range(len(down)):
        parts[:] = 0.0
        for i in range(len(across)):
            weights, offset = across[i], np.int32(j * line + i)
            for k in range(len(starts)):
                pixels[k] = packed[np.uint32(starts[k] + offset)]  # unsigned: numba tests no sign
            for channel in range(3):
                part, shift = parts[channel], np.uint32(8 * channel)
                for k in range(len(starts)):
                    part[k] += weights[k] * np.float64(np.int32((pixels[k] >> shift) & np.uint32(255)))
        weights = down[j]
        for channel in range(3):
            part, total = parts[channel], totals[channel]
            for k in range(len(starts)):
                total[k] += weights[k] * part[k]


@_part
def _store(totals: Array, shares: Array, pixels: Array) -> None:
    for channel in range(3):
        total = totals[channel]
        for k in range(len(pixels)):
            pixels[k, channel] = np.uint8(np.int32(total[k] * shares[k] + 0.5))


@_part
def _moved(bits: Any) -> Any:
    """The bits of a float32 that is 2**-112 times the float16 of the given bits; infinities and NaN are kept."""
    exponent = _LARGEST_FLOAT if (bits & _LARGEST_HALF) == _LARGEST_HALF else np.int32(0)
    return ((bits << np.int32(13)) & _MOVED) | exponent


@_cached
def distances(first: Array, second: Array, a: Array, b: Array, chi: Array, dots: Array) -> None:
    """See `loops.distances`."""
    distance, product = np.empty(_LANES, np.float32), np.empty(_LANES, np.float32)
    left_bits, right_bits = np.empty(_LANES, np.int32), np.empty(_LANES, np.int32)
    left, right = left_bits.view(np.float32), right_bits.view(np.float32)
    width, last, line = first.shape[1], len(a) - 1, _CACHE_LINE // first.itemsize
    halves = first.itemsize == 2
    scale = _OFFSET if halves else np.float32(1)
    touched = np.empty((2, width // line + 1), first.dtype)
    for pair in range(len(a)):
        next_a, next_b = first[a[min(pair + _AHEAD, last)]], second[b[min(pair + _AHEAD, last)]]
        for number in range(width // line):
            touched[0, number], touched[1, number] = next_a[number * line], next_b[number * line]
        row_a, row_b = first[a[pair]], second[b[pair]]
        distance[:] = 0
        product[:] = 0
        for block in range(width // _LANES):
            # Slices show the compiler that indices are in range, so that it uses vector instructions.
            xs = row_a[block * _LANES : (block + 1) * _LANES]
            ys = row_b[block * _LANES : (block + 1) * _LANES]
            for lane in range(_LANES):
                p, q = np.int32(xs[lane]), np.int32(ys[lane])
                left_bits[lane] = _moved(p) if halves else p
                right_bits[lane] = _moved(q) if halves else q
            for lane in range(_LANES):
                x, y = left[lane] * scale, right[lane] * scale
                difference = x - y
                product[lane] += x * y
                distance[lane] += difference * difference / (abs(x) + abs(y) + _EPSILON)
        chi_square, dot = np.float32(0), np.float32(0)
        for lane in range(_LANES):
            chi_square += distance[lane]
            dot += product[lane]
        chi[pair], dots[pair] = chi_square, dot
