"""What the images around both sides of a pair say: their vectors, compared across.

The images that pairs labelled same join to one side should show its person, so all couples of these and those of the
other side should be alike if the two are one person. The pair's own label is left out, so that a wrong one does not
vouch for itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from batchverify.evaluation.pair_graph import Edges

# Edges whose vectors are in memory at once.
BITE = 50_000
# Images that all others are compared with, to see how much an image looks like anyone.
COHORT = 1000
# Of each image's cosines with these, the mean between the two quantiles: strangers that look alike, not the person.
ALIKE = (0.9, 0.99)


@dataclass(frozen=True)
class Surroundings:
    """Of E edges, in the order of `Edges`.

    cosine: (E,) of the two images. mean: (E,) of the cosines of all couples across, the two images included.
    couples: (E,) how many these are. shared: (E,) images that pairs labelled same join to both. alike: (E,) how much
    both images look like strangers, the sum of two mean cosines.
    """

    cosine: np.ndarray
    mean: np.ndarray
    couples: np.ndarray
    shared: np.ndarray
    alike: np.ndarray

    @classmethod
    def of(cls, edges: Edges, vectors: np.ndarray, bite: int = BITE) -> Surroundings:
        """vectors: (V, D) float32 unit vectors of the images. bite: edges whose vectors are in memory at once."""
        from scipy.sparse import csr_matrix

        same = (edges.labels == 0) & (edges.a != edges.b)
        ends = np.concatenate([edges.a[same], edges.b[same]]), np.concatenate([edges.b[same], edges.a[same]])
        shape = (len(vectors), len(vectors))
        joined = csr_matrix((np.ones(len(ends[0]), np.float32), ends), shape)
        around, degree = vectors + joined @ vectors, np.asarray(joined.sum(axis=1)).ravel()
        parts = [
            _compared(edges.a[start : start + bite], edges.b[start : start + bite], vectors, joined, around, degree)
            for start in range(0, len(edges.a), bite)
        ]
        cosine, mean, couples, shared = (np.concatenate(each) for each in zip(*parts, strict=True))
        level = _likeness_to_strangers(vectors)
        return cls(cosine, mean, couples, shared, level[edges.a] + level[edges.b])

    def columns(self) -> tuple[np.ndarray, ...]:
        """(E,) features for a regression."""
        size = np.log(np.maximum(self.couples, 1))
        compared = (self.cosine, self.mean, self.mean * size, size)
        return (*compared, self.shared > 0, self.alike, self.alike * size)


def _compared(
    a: np.ndarray, b: np.ndarray, vectors: np.ndarray, joined: Any, around: np.ndarray, degree: np.ndarray
) -> tuple[np.ndarray, ...]:
    """Cosine, mean across, couples and shared images of some edges. joined: (V, V), 1 for images labelled same."""
    linked = np.asarray(joined[a, b]).ravel()
    one, other = vectors[a], vectors[b]
    # A sum of cosines is a product of sums. Neither side holds the other image by this very label.
    left, right = around[a] - linked[:, None] * other, around[b] - linked[:, None] * one
    shared = np.asarray(joined[a].multiply(joined[b]).sum(axis=1)).ravel()
    # An image on both sides is no couple with itself, nor is one that is both ends of the pair.
    alone = shared + (a == b)
    couples = (1 + degree[a] - linked) * (1 + degree[b] - linked) - alone
    sums = np.einsum("ij,ij->i", left, right) - alone
    cosine = np.einsum("ij,ij->i", one, other)
    return cosine, np.where(couples > 0, sums / np.maximum(couples, 1), cosine), couples, shared


def _likeness_to_strangers(vectors: np.ndarray, seed: int = 0) -> np.ndarray:
    """(V,) the mean of each image's higher cosines with some others."""
    rng = np.random.default_rng(seed)
    cohort = vectors[rng.choice(len(vectors), min(COHORT, len(vectors)), replace=False)]
    low, high = (int(len(cohort) * each) for each in ALIKE)
    high = max(high, low + 1)
    levels = np.empty(len(vectors))
    for start in range(0, len(vectors), COHORT):
        cosines = np.sort(vectors[start : start + COHORT] @ cohort.T, axis=1)
        levels[start : start + COHORT] = cosines[:, low:high].mean(axis=1)
    return levels
