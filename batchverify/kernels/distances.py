"""Chi-square distance and dot product of pairs of rows of a matrix, which are not copied."""

from __future__ import annotations

import numpy as np

from batchverify.kernels import loops

EPSILON = loops.EPSILON


def distances(
    first: np.ndarray, second: np.ndarray, a: np.ndarray, b: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Chi-square distance and dot product of rows `a` of `first` and `b` of `second`: (N,) float32 each.

    first, second: (M, F) and (K, F) float16 or float32. a, b: (N,) integers. The distance is the sum of
    (x - y)² / (|x| + |y|). The bits are the same on every machine, for both dtypes and for (b, a).
    Raises `ValueError` for other shapes and `IndexError` for rows that do not exist, which the loop does not check.
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
    loops.distances(_bits(first), _bits(second), a, b, chi, dots)
    return chi, dots


def _bits(rows: np.ndarray) -> np.ndarray:
    """(M, F) float16 or float32 to (M, F') int16 or int32 of the same bits, F' a multiple of the lanes."""
    missing = -rows.shape[1] % loops.LANES
    padded = np.pad(rows, ((0, 0), (0, missing))) if missing else np.ascontiguousarray(rows)
    return padded.view(np.int16 if rows.dtype == np.float16 else np.int32)
