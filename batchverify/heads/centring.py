"""Embeddings less the mean of many faces, at unit length again: what all faces share tells no two people apart."""

from __future__ import annotations

import numpy as np

# Rows at a time.
_BLOCK = 4096


def mean_vector(vectors: np.ndarray) -> np.ndarray:
    """The mean (F,) float32 of (M, F) rows, but for those of zeros, which are of images without a face."""
    filled = vectors[vectors.any(axis=1)]
    return filled.mean(axis=0, dtype=np.float64).astype(np.float32)


def centred(vectors: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """(M, F) float16 or float32 rows less `centre` (F,) float32, at unit length, in their dtype; rows of zeros stay.

    The bits of a row do not depend on other rows.
    """
    result = np.zeros(vectors.shape, vectors.dtype)
    for start in range(0, len(vectors), _BLOCK):
        rows = slice(start, start + _BLOCK)
        moved = vectors[rows].astype(np.float32)
        empty = ~moved.any(axis=1)
        moved -= centre
        lengths = np.sqrt((moved * moved).sum(axis=1, keepdims=True))
        np.divide(moved, lengths, out=moved, where=lengths > 0)
        moved[empty] = 0
        result[rows] = moved
    return result
