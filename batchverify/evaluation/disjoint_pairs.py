"""Pairs of which no two share a person: as many independent trials as pairs hold for certain."""

from __future__ import annotations

import numpy as np

from batchverify.evaluation.bootstrap import TAIL, Span


def count_disjoint(
    a: np.ndarray, b: np.ndarray, kinds: np.ndarray, count: int, *, seed: int = 0
) -> np.ndarray:
    """(count,) int64: of each kind, a number of pairs of which no two share a unit, at least half the highest.

    a, b: (N,) units of both sides. kinds: (N,) int64 below `count`. In a random order, each pair is taken whose
    units are still free.
    """
    order = np.random.default_rng(seed).permutation(len(kinds))
    kinds, most = kinds[order], int(max(a.max(initial=0), b.max(initial=0))) + 1
    keys = np.stack([kinds * most + a[order], kinds * most + b[order]], axis=1)
    _, inverse = np.unique(keys, return_inverse=True)
    ends = inverse.reshape(keys.shape)
    found, taken = np.zeros(count, np.int64), np.zeros(inverse.size, np.bool_)
    while len(kinds):
        leads = _leads(ends, len(taken))
        found += np.bincount(kinds[leads], minlength=count)
        taken[ends[leads]] = True
        left = ~taken[ends].any(axis=1)
        ends, kinds = ends[left], kinds[left]
    return found


def _leads(ends: np.ndarray, units: int) -> np.ndarray:
    """(N,) bool: pairs whose units no earlier pair has. ends: (N, 2) units."""
    rows = np.arange(len(ends))
    first = np.full(units, -1, np.int64)
    # Of several values for one place the last one stays.
    first[ends[::-1].ravel()] = np.repeat(rows[::-1], 2)
    return (first[ends] == rows[:, None]).all(axis=1)


def exact_span(wrong: float, trials: float, disjoint: int) -> Span | None:
    """The Clopper-Pearson interval of a rate of 0 or 1, each disjoint pair one trial; None for any other rate.

    The bootstrap says nothing of such a rate. Disjoint pairs are independent for people drawn at random, all pairs
    are not: with all of them as trials the interval is too narrow.
    """
    if not trials or 0 < wrong < trials:
        return None
    bound = 1 - TAIL ** (1 / disjoint)
    return (0.0, bound) if not wrong else (1 - bound, 1.0)
