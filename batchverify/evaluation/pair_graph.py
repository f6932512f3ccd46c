"""The pairs as a graph of images: what all other labels and scores of a table say about each label.

Pairs labelled same are chained to groups, which should each be one person. Where a group falls into two parts, all
pairs across are of one kind: their labels and scores are added up, and each label is judged by the sum. A pair
labelled different inside a group contradicts the chain between its images; it is set against the weakest link alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from batchverify.evaluation.forest import NO_EDGE, Forest

# A score moves the log-odds by at most this share of the trust in a label, so that none outweighs a label by itself.
# Chosen on FIW train pairs: from .6 to .9 it matters little, above hard pairs come before wrong labels.
SURE = 0.75
# Of a pair that contradicts itself: more than all else together.
CERTAIN = 50.0
# An image is suspect as a whole if it is in so many distinct pairs labelled same and the scores dispute most of them.
FEWEST_PAIRS = 3
UNNAMED = -1


@dataclass(frozen=True)
class Edges:
    """E distinct pairs: the same two images with one label count once, in either order.

    a, b: (E,) images, a <= b. labels: (E,) 0 or 1. weights: (E,) log-odds that the label is right, by its own score.
    disputed: (E,) bool, the score prefers the other label. row: (E,) the first row of each. of_row: (N,) the edge of
    each row.
    """

    a: np.ndarray
    b: np.ndarray
    labels: np.ndarray
    weights: np.ndarray
    disputed: np.ndarray
    row: np.ndarray
    of_row: np.ndarray

    @classmethod
    def of(
        cls,
        a: np.ndarray,
        b: np.ndarray,
        labels: np.ndarray,
        different: np.ndarray,
        trust: float,
        images: int,
    ) -> Edges:
        """From N rows. different: (N,) log-odds of two people by the scores. trust: log-odds of a right label."""
        low, high = np.minimum(a, b).astype(np.int64), np.maximum(a, b).astype(np.int64)
        keys = (low * images + high) * 2 + labels
        _, row, of_row = np.unique(keys, return_index=True, return_inverse=True)
        score = np.bincount(of_row, different) / np.bincount(of_row)
        support = np.where(labels[row] == 1, score, -score)
        weights = trust + np.clip(support, -SURE * trust, SURE * trust)
        return cls(low[row], high[row], labels[row], weights, support < 0, row, of_row)

    def same(self, images: int) -> tuple[np.ndarray, np.ndarray]:
        """(V,) in how many pairs labelled same each image is, and in how many of these the scores dispute that."""
        chosen = (self.labels == 0) & (self.a != self.b)
        pairs, disputed = (
            np.bincount(self.a[each], minlength=images) + np.bincount(self.b[each], minlength=images)
            for each in (chosen, chosen & self.disputed)
        )
        return pairs, disputed

    def odd(self, images: int) -> np.ndarray:
        """(V,) bool, images that are suspect as a whole: perhaps of another person than all their labels say."""
        pairs, disputed = self.same(images)
        return (pairs >= FEWEST_PAIRS) & (2 * disputed > pairs)


@dataclass(frozen=True)
class PairGraph:
    """The groups of images that pairs labelled same chain together, and what speaks against each label.

    links: (V + 1,) for each link of the forest the log-odds that its two sides are one person. chained: the edges
    labelled same, by the forest's numbers. contradictions: the edges labelled different inside a group. blamed: the
    link that each of these is set against. weakest: (E,) the weakest link between the images of an edge, -1 for none.
    against: (E,) the log-odds that the label is wrong, by everything in the table.
    """

    edges: Edges
    forest: Forest
    links: np.ndarray
    chained: np.ndarray
    contradictions: np.ndarray
    blamed: np.ndarray
    weakest: np.ndarray
    against: np.ndarray

    @classmethod
    def of(cls, edges: Edges, images: int, names: np.ndarray, trust: float) -> PairGraph:
        """names: (V,) int64, a number for each named image, `UNNAMED` for the others."""
        proper = edges.a != edges.b
        chained = np.flatnonzero(proper & (edges.labels == 0))
        ends, weights = (edges.a[chained], edges.b[chained]), edges.weights[chained]
        forest = Forest.of(*ends, weights, images, first=names != UNNAMED)
        links = _cuts(edges, forest, chained, edges.odd(images))
        within = forest.tree[edges.a] == forest.tree[edges.b]
        contradictions = np.flatnonzero(proper & within & (edges.labels == 1))
        blamed = forest.climb(links, edges.a[contradictions], edges.b[contradictions])[1]
        charged = links.copy()
        np.subtract.at(charged, blamed, edges.weights[contradictions])
        np.subtract.at(charged, _between_names(forest, links, names), trust)
        same, weakest = _judge(edges, forest, charged, within)
        against = np.where(edges.labels == 1, same, -same)
        return cls(edges, forest, charged, chained, contradictions, blamed, weakest, against)

    def chain(self, edge: int) -> np.ndarray:
        """The edges labelled same that join the two images of an edge; empty if it is itself the link."""
        a, b = int(self.edges.a[edge]), int(self.edges.b[edge])
        if self.forest.tree[a] != self.forest.tree[b]:
            return np.zeros(0, np.int64)
        numbers = self.chained[self.forest.edge[self.forest.path(a, b)]]
        return numbers[numbers != edge]

    @cached_property
    def _by_blame(self) -> np.ndarray:
        return np.argsort(self.blamed, kind="stable")

    def accusers(self, edge: int) -> np.ndarray:
        """The edges labelled different that are set against the weakest link between the images of an edge."""
        link = self.weakest[edge]
        ends = (np.searchsorted(self.blamed, link, side, sorter=self._by_blame) for side in ("left", "right"))
        return self.contradictions[self._by_blame[slice(*ends)]]


def _judge(edges: Edges, forest: Forest, links: np.ndarray, within: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(E,) the log-odds that both images are one person, and the weakest link. within: (E,) both in one group."""
    same, weakest = np.empty(len(edges.a)), np.full(len(edges.a), NO_EDGE, np.int64)
    inside, across = np.flatnonzero(within), np.flatnonzero(~within)
    same[inside], weakest[inside], _ = forest.climb(links, edges.a[inside], edges.b[inside])
    same[edges.a == edges.b] = CERTAIN
    groups = np.sort(forest.tree[np.stack([edges.a[across], edges.b[across]])].astype(np.int64), axis=0)
    _, pair = np.unique(groups[0] * len(links) + groups[1], return_inverse=True)
    same[across] = -np.bincount(pair, edges.weights[across])[pair]
    return same, weakest


def _cuts(edges: Edges, forest: Forest, chained: np.ndarray, odd: np.ndarray) -> np.ndarray:
    """(V + 1,) for each link the sum of the weights of all edges labelled same that join its two sides.

    Disputed labels of an odd image do not support each other: one wrong picture explains them all.
    """
    has = forest.edge != NO_EDGE
    own = np.zeros(len(forest.edge))
    own[has] = edges.weights[chained[forest.edge[has]]]
    is_link = np.zeros(len(chained), np.bool_)
    is_link[forest.edge[has]] = True
    dependent = edges.disputed & (odd[edges.a] | odd[edges.b])
    others = chained[~is_link & ~dependent[chained]]
    return own + forest.crossing(edges.a[others], edges.b[others], edges.weights[others])


def _between_names(forest: Forest, links: np.ndarray, names: np.ndarray) -> np.ndarray:
    """The weakest link of each chain from a named image up to the next, where the two names differ."""
    named = np.append(names != UNNAMED, True)
    above = forest.parent
    while not named[above].all():
        above = np.where(named[above], above, above[above])
    lower = np.flatnonzero(named[:-1] & (above[:-1] != len(names)))
    lower = lower[names[lower] != names[above[lower]]]
    return forest.climb(links, lower, above[lower])[1]
