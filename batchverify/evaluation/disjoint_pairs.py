"""Pairs of which no two share a person: as many independent trials as pairs hold for certain."""

from __future__ import annotations

import numpy as np

from batchverify.evaluation.bootstrap import Span, exact_bounds
from batchverify.heads.bounds import disjoint_pairs


def count_disjoint(a: np.ndarray, b: np.ndarray, kinds: np.ndarray, count: int, *, seed: int = 0) -> np.ndarray:
    """(count,) int64: of each kind, a number of pairs of which no two share a unit, at least half the highest.

    a, b: (N,) units of both sides. kinds: (N,) int64 below `count`.
    """
    most = int(max(a.max(initial=0), b.max(initial=0))) + 1
    chosen = disjoint_pairs(kinds * most + a, kinds * most + b, seed)
    return np.bincount(kinds[chosen], minlength=count)


def exact_span(wrong: float, trials: float, disjoint: int) -> Span | None:
    """The Clopper-Pearson interval of a rate of 0 or 1, each disjoint pair one trial; None for any other rate.

    The bootstrap says nothing of such a rate. Disjoint pairs are independent for people drawn at random, all pairs
    are not: with all of them as trials the interval is too narrow.
    """
    if not trials or 0 < wrong < trials:
        return None
    return exact_bounds(disjoint if wrong else 0, disjoint)
