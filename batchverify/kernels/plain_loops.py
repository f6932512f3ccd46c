"""The loops in numpy, which `loops` calls if numba is absent, fails or is switched off.

Each returns the same bits as its namesake in `numba_loops`, but takes 10 to 100 times as long.
"""

from __future__ import annotations

import numpy as np

# Partial sums of a pair, so that the order of additions is the same on every machine.
LANES = 32
# Keeps the distance finite where both values are zero.
EPSILON = 1e-6
# Pairs whose float32 rows are in memory at a time, some megabytes.
_PAIRS = 256


def integrate(image: np.ndarray, sums: np.ndarray) -> None:
    """See `loops.integrate`."""
    sums[0] = 0
    sums[1:, 0] = 0
    sums[1:, 1:, 3] = 0
    inner = sums[1:, 1:, :3]
    np.cumsum(np.cumsum(image, axis=1, dtype=np.int32), axis=0, out=inner)


def _edges(start: int, stop: int, cells: int) -> tuple[np.ndarray, np.ndarray]:
    """The first pixel of each cell of adaptive average pooling, and the pixel after its last one."""
    bounds = np.arange(cells + 1) * (stop - start)
    return start + bounds[:-1] // cells, start - (-bounds[1:] // cells)


def resample(
    sums: np.ndarray, regions: np.ndarray, targets: np.ndarray, reciprocal: bool, patches: np.ndarray
) -> None:
    """See `loops.resample`."""
    for region, target in zip(regions.tolist(), targets.tolist(), strict=True):
        left, top, right, bottom = region
        n, first, start, rows, columns = target
        low, high = _edges(left, right, columns)
        upper, lower = _edges(top, bottom, rows)
        above, below = sums[upper, :, :3], sums[lower, :, :3]
        total = (below[:, high] - above[:, high] - below[:, low] + above[:, low]).astype(np.float32)
        area = ((lower - upper)[:, None] * (high - low)).astype(np.float32)[:, :, None]
        mean = total * (1 / area.astype(np.float64)).astype(np.float32) if reciprocal else total / area
        patch = patches[n, first : first + rows, start : start + columns]
        patch[..., :3] = (mean - np.float32(127.5)) * np.float32(0.0078125)


def suppress(boxes: np.ndarray, order: np.ndarray, threshold: float) -> np.ndarray:
    """See `loops.suppress`."""
    x0, y0, x1, y1 = boxes.T
    area = (x1 - x0) * (y1 - y0)
    kept = []
    while len(order):
        best, rest = order[0], order[1:]
        kept.append(best)
        across = np.minimum(x1[best], x1[rest]) - np.maximum(x0[best], x0[rest])
        down = np.minimum(y1[best], y1[rest]) - np.maximum(y0[best], y0[rest])
        overlaps = (across > 0) & (down > 0)
        shared = np.where(overlaps, across * down, np.float32(0))
        union = np.where(overlaps, area[rest] + area[best] - shared, np.float32(1))
        order = rest[~((shared / union).astype(np.float64) > threshold)]
    return np.array(kept, np.int64)


def warp(image: np.ndarray, affine: np.ndarray, reach: float, crop: np.ndarray) -> None:
    """See `loops.warp`."""
    height, width = image.shape[:2]
    row, column = np.indices(crop.shape[:2]).astype(np.float64)
    x, y = (line[0] * column + line[1] * row + line[2] for line in affine)
    left, across, sum_x = _triangle(x, reach)
    top, down, sum_y = _triangle(y, reach)
    total = np.zeros(crop.shape, np.float64)
    for j, weight_y in enumerate(down):
        line = np.zeros(crop.shape, np.float64)
        for i, weight_x in enumerate(across):
            inside = (left + i >= 0) & (left + i < width) & (top + j >= 0) & (top + j < height)
            pixels = image[np.where(inside, top + j, 0), np.where(inside, left + i, 0)]
            line += np.where(inside, weight_x, 0.0)[..., None] * pixels
        total += weight_y[..., None] * line
    crop[:] = total * (1.0 / (sum_x * sum_y))[..., None] + 0.5


def _triangle(centre: np.ndarray, reach: float) -> tuple[np.ndarray, list[np.ndarray], np.ndarray]:
    """The first pixel that a triangle about each centre reaches, the weights from it on, and their sum."""
    first = np.floor(centre - reach) + 1.0
    taps, slope = int(np.ceil(2 * reach)), 1.0 / reach
    weights = [np.maximum(1.0 - abs(first + i - centre) * slope, 0.0) for i in range(taps)]
    return first.astype(np.int64), weights, sum(weights[1:], weights[0])


def distances(
    first: np.ndarray, second: np.ndarray, a: np.ndarray, b: np.ndarray, chi: np.ndarray, dots: np.ndarray
) -> None:
    """See `loops.distances`. first, second: the bits of the numbers. chi, dots: (N,) float32, filled."""
    dtype = np.float16 if first.itemsize == 2 else np.float32
    for start in range(0, len(a), _PAIRS):
        block = slice(start, start + _PAIRS)
        x, y = (
            matrix[rows[block]].view(dtype).astype(np.float32).reshape(-1, matrix.shape[1] // LANES, LANES)
            for matrix, rows in ((first, a), (second, b))
        )
        with np.errstate(invalid="ignore", over="ignore"):
            difference = x - y
            chi[block] = _summed(difference * difference / (abs(x) + abs(y) + np.float32(EPSILON)))
            dots[block] = _summed(x * y)


def _summed(terms: np.ndarray) -> np.ndarray:
    """(N, blocks, lanes) float32 to (N,): block by block, then lane by lane. numpy's `sum` has another order."""
    lanes = np.zeros((len(terms), LANES), np.float32)
    for block in range(terms.shape[1]):
        lanes += terms[:, block]
    total = np.zeros(len(terms), np.float32)
    for lane in range(LANES):
        total += lanes[:, lane]
    return total
