"""Chi-square distance and cosine of pairs of rows, straight from the matrix that holds them."""

from __future__ import annotations

import numpy as np

from batchverify.instructions import fetch, wide
from batchverify.machine_code import compiled

EPSILON = 1e-6
# Sums that run side by side, in one order on every machine.
_LANES = 32
# Pairs ahead whose rows are fetched: they lie anywhere, and the CPU foresees nothing.
_AHEAD = 2
_CACHE_LINE = 64


def distances(
    first: np.ndarray, second: np.ndarray, a: np.ndarray, b: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Chi-square distance and dot product of rows `a` of `first` and `b` of `second`: (N,) float32 each.

    first, second: (M, F) and (K, F) float16 or float32; a, b: (N,) whole numbers. The distance is the sum over
    (x - y)² / (|x| + |y|). The same bits on every machine, for both number types and for (b, a).
    Raises `ValueError` for other shapes, `IndexError` for rows that are not there: the loop itself would read
    whatever lies beyond.
    """
    a, b = (np.ascontiguousarray(rows).astype(np.int64, casting="same_kind", copy=False) for rows in (a, b))
    if len(a) != len(b) or first.shape[1] != second.shape[1]:
        raise ValueError(f"rows {len(a)} and {len(b)} of matrices {first.shape} and {second.shape}")
    for matrix, rows in ((first, a), (second, b)):
        if len(rows) and not 0 <= rows.min() <= rows.max() < len(matrix):
            raise IndexError(f"rows {rows.min()} to {rows.max()} of {len(matrix)}")
    if not first.dtype == second.dtype == np.float16:
        first, second = first.astype(np.float32, copy=False), second.astype(np.float32, copy=False)
    chi, dots = np.empty(len(a), np.float32), np.empty(len(a), np.float32)
    matrices = _readable(first), _readable(second)
    _distances(*matrices, a, b, chi, dots)
    return chi, dots


def _readable(rows: np.ndarray) -> np.ndarray:
    """(M, F) to (M, F'), F' a multiple of the lanes, float16 as its bits: numba has no such numbers."""
    missing = -rows.shape[1] % _LANES
    padded = np.pad(rows, ((0, 0), (0, missing))) if missing else np.ascontiguousarray(rows)
    return padded.view(np.int16) if rows.dtype == np.float16 else padded


@compiled
def _distances(
    first: np.ndarray, second: np.ndarray, a: np.ndarray, b: np.ndarray, chi: np.ndarray, dots: np.ndarray
) -> None:
    """first, second: (M, F), (K, F) float32 or the bits of float16; F a multiple of the lanes."""
    distance, product = np.empty(_LANES, np.float32), np.empty(_LANES, np.float32)
    epsilon, last, width = np.float32(EPSILON), len(a) - 1, first.shape[1]
    line = _CACHE_LINE // first.itemsize
    for pair in range(len(a)):
        soon = min(pair + _AHEAD, last)
        for at in range(0, width, line):
            fetch(first[a[soon]], at)
            fetch(second[b[soon]], at)
        left, right = first[a[pair]], second[b[pair]]
        distance[:] = 0
        product[:] = 0
        for block in range(width // _LANES):
            # Slices: so the compiler sees that nothing lies outside and takes many at once.
            xs = left[block * _LANES : (block + 1) * _LANES]
            ys = right[block * _LANES : (block + 1) * _LANES]
            for lane in range(_LANES):
                x, y = wide(xs[lane]), wide(ys[lane])
                difference = x - y
                product[lane] += x * y
                distance[lane] += difference * difference / (abs(x) + abs(y) + epsilon)
        chi_square, dot = np.float32(0), np.float32(0)
        for lane in range(_LANES):
            chi_square += distance[lane]
            dot += product[lane]
        chi[pair], dots[pair] = chi_square, dot
