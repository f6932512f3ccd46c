"""Loops over pixels and boxes that no library has, compiled by numba when first called."""

from __future__ import annotations

import numpy as np

from batchverify.machine_code import compiled


@compiled
def integrate(image: np.ndarray, sums: np.ndarray) -> None:
    """Fill a summed-area table. image: (H, W, 3) uint8; sums: (H + 1, W + 1, 4) int32, modulo 2**32."""
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


@compiled
def _divide(start: int, extent: int, low: np.ndarray, high: np.ndarray) -> None:
    """Edges of adaptive average pooling of `extent` pixels from `start` on, without a division a cell."""
    cells = len(low)
    step, rest = extent // cells, extent % cells
    at, over = start, 0
    for cell in range(cells):
        low[cell] = at
        at += step
        over += rest
        if over >= cells:
            at += 1
            over -= cells
        high[cell] = at + (over > 0)


@compiled
def resample(
    sums: np.ndarray, regions: np.ndarray, places: np.ndarray, reciprocal: bool, patches: np.ndarray
) -> None:
    """Means of the cells of regions, as `interpolate(mode="area")` cuts them, normalised to -1..1.

    sums: from `integrate`; a cell's own sum must be below 2**31. regions: (K, 4) int64 left, top, right,
    bottom, half open. places: (K, 5) int64 patch, top, left, height, width. reciprocal: multiply sums by one
    over the area, which rounds otherwise than dividing. patches: (N, h, w, 3) float32, filled at the places.
    """
    edges = np.empty((4, max(patches.shape[1], patches.shape[2])), np.int64)
    for k in range(len(regions)):
        left, top, right, bottom = regions[k]
        n, first, start, rows, columns = places[k]
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


@compiled
def slope(values: np.ndarray, slopes: np.ndarray) -> None:
    """PReLU in place. values: (N, C) float32; slopes: (C,)."""
    for n in range(values.shape[0]):
        for c in range(values.shape[1]):
            value = values[n, c]
            values[n, c] = value if value > 0 else value * slopes[c]


@compiled
def candidates(
    answers: np.ndarray, levels: np.ndarray, scales: np.ndarray, least: float, rows: np.ndarray
) -> int:
    """P-Net's cells with a logit of `least` and more: their number, the first rows filled level by level.

    answers: (h, w, 16) float32, logits of no face and of a face in columns 0 and 1, shifts in 2 to 5.
    levels: (L, 4) int64 top, left, height, width, in cells. scales: (L,) float32. rows: (h * w, 11) float32
    box in whole pixels of the picture (x0 y0 x1 y1), the two logits, shifts, level.
    """
    count = 0
    for level in range(len(levels)):
        top, left, height, width = levels[level]
        scale = scales[level]
        for y in range(height):
            for x in range(width):
                cell = answers[top + y, left + x]
                if cell[1] - cell[0] >= least:
                    found = rows[count]
                    found[0] = np.floor(np.float32(2 * x + 1) / scale)
                    found[1] = np.floor(np.float32(2 * y + 1) / scale)
                    found[2] = np.floor(np.float32(2 * x + 12) / scale)
                    found[3] = np.floor(np.float32(2 * y + 12) / scale)
                    # Not by slices: numba compiles their errors for two seconds.
                    for column in range(6):
                        found[4 + column] = cell[column]
                    found[10] = level
                    count += 1
    return count


@compiled
def suppress(boxes: np.ndarray, order: np.ndarray, threshold: float) -> np.ndarray:
    """Indices kept by suppression with intersection over union above a threshold, in the given order.

    boxes: (K, 4) float32 x0 y0 x1 y1. order: (K,) int64, best first.
    """
    kept = np.empty(len(order), np.int64)
    count = 0
    for index in order:
        x0, y0, x1, y1 = boxes[index]
        area = (x1 - x0) * (y1 - y0)
        alone = True
        for other in kept[:count]:
            across = min(x1, boxes[other, 2]) - max(x0, boxes[other, 0])
            down = min(y1, boxes[other, 3]) - max(y0, boxes[other, 1])
            if across > 0 and down > 0:
                shared = across * down
                beside = (boxes[other, 2] - boxes[other, 0]) * (boxes[other, 3] - boxes[other, 1])
                if shared / (area + beside - shared) > threshold:
                    alone = False
                    break
        if alone:
            kept[count] = index
            count += 1
    return kept[:count]


@compiled
def pack(wide: np.ndarray, packed: np.ndarray) -> None:
    """Leave out every fourth byte. wide: (4 * N,) uint32, little-endian R G B X; packed: (3 * N,) uint32."""
    for group in range(len(wide) // 4):
        first, second = wide[4 * group], wide[4 * group + 1]
        third, fourth = wide[4 * group + 2], wide[4 * group + 3]
        packed[3 * group] = (first & np.uint32(0xFFFFFF)) | (second << np.uint32(24))
        packed[3 * group + 1] = ((second >> np.uint32(8)) & np.uint32(0xFFFF)) | (third << np.uint32(16))
        packed[3 * group + 2] = ((third >> np.uint32(16)) & np.uint32(0xFF)) | (fourth << np.uint32(8))


@compiled
def _tent(extent: int, firsts: np.ndarray, counts: np.ndarray, weights: np.ndarray) -> None:
    """What each of S places takes of `extent` pixels, in 2**-22, as Pillow has it for BILINEAR.

    firsts, counts: (S,) uint64, the pixels of a place; weights: (S, T) int32, zero beyond them.
    """
    scale = extent / len(firsts)
    reach = max(scale, 1.0)
    for place in range(len(firsts)):
        centre = (place + 0.5) * scale
        first, last = max(int(centre - reach + 0.5), 0), min(int(centre + reach + 0.5), extent)
        total = 0.0
        for pixel in range(first, last):
            total += max(0.0, 1.0 - abs((pixel - centre + 0.5) * (1.0 / reach)))
        for pixel in range(first, last):
            share = max(0.0, 1.0 - abs((pixel - centre + 0.5) * (1.0 / reach))) / total
            weights[place, pixel - first] = int(0.5 + share * (1 << 22))
        firsts[place], counts[place] = first, last - first


@compiled
def _mix_two(image: np.ndarray, firsts: np.ndarray, weights: np.ndarray, rows: np.ndarray) -> None:
    """`stretch_rows` to more pixels than there are: two a place at most."""
    half, ones, twos = np.int32(1 << 21), weights[:, 0].copy(), weights[:, 1].copy()
    seconds = np.minimum(firsts + np.uint64(1), np.uint64(image.shape[1] - 1))
    red, green, blue = np.uint64(0), np.uint64(1), np.uint64(2)
    for row in range(len(image)):
        y = np.uint64(row)
        for column in range(len(firsts)):
            x = np.uint64(column)
            at, then, one, two = firsts[x], seconds[x], ones[x], twos[x]
            r = np.int32(image[y, at, red]) * one + np.int32(image[y, then, red]) * two
            g = np.int32(image[y, at, green]) * one + np.int32(image[y, then, green]) * two
            b = np.int32(image[y, at, blue]) * one + np.int32(image[y, then, blue]) * two
            rows[y, x, red] = (r + half) >> 22
            rows[y, x, green] = (g + half) >> 22
            rows[y, x, blue] = (b + half) >> 22


@compiled
def stretch_rows(image: np.ndarray, rows: np.ndarray) -> None:
    """Resample every row. image: (H, W, 3) uint8, any strides; rows: (H, S, 3) uint8."""
    side = rows.shape[1]
    width = image.shape[1]
    firsts, counts = np.empty(side, np.uint64), np.empty(side, np.uint64)
    weights = np.zeros((side, 2 * int(np.ceil(max(width / side, 1.0))) + 1), np.int32)
    _tent(width, firsts, counts, weights)
    if width <= side:
        _mix_two(image, firsts, weights, rows)
        return
    # Unsigned numbers: numba would look for negative ones at every access.
    red, green, blue = np.uint64(0), np.uint64(1), np.uint64(2)
    for row in range(len(image)):
        y = np.uint64(row)
        for column in range(side):
            x = np.uint64(column)
            r = g = b = np.int32(1 << 21)
            for tap in range(counts[x]):
                at, weight = firsts[x] + tap, weights[x, tap]
                r += np.int32(image[y, at, red]) * weight
                g += np.int32(image[y, at, green]) * weight
                b += np.int32(image[y, at, blue]) * weight
            rows[y, x, red], rows[y, x, green], rows[y, x, blue] = r >> 22, g >> 22, b >> 22


@compiled
def stretch_columns(image: np.ndarray, columns: np.ndarray) -> None:
    """Resample every column. image: (H, N) uint8, contiguous rows; columns: (S, N) uint8."""
    side, width = columns.shape
    height = len(image)
    firsts, counts = np.empty(side, np.uint64), np.empty(side, np.uint64)
    weights = np.zeros((side, 2 * int(np.ceil(max(height / side, 1.0))) + 1), np.int32)
    _tent(height, firsts, counts, weights)
    sums = np.empty(width, np.int32)
    for row in range(side):
        y = np.uint64(row)
        sums[:] = 1 << 21
        for tap in range(counts[y]):
            pixels, weight = image[firsts[y] + tap], weights[y, tap]
            for x in range(width):
                sums[x] += np.int32(pixels[x]) * weight
        for x in range(width):
            columns[y, x] = np.uint8(sums[x] >> 22)
