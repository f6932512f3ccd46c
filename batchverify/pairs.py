"""Doubtful pairs among the rows of a manifest: duplicate, mirrored, self and contradicting ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

BLANK = -1
_Choice = Callable[[np.ndarray], tuple[int, int]]


@dataclass(frozen=True)
class Doubt:
    """How often something occurs; rows: the first cases, as (row, earlier row that it belongs to)."""

    count: int = 0
    rows: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Doubts:
    """duplicates: rows that repeat an earlier row's pair, sides included. mirrored: pairs in both orders.

    selves: rows with one image on both sides. contradicting: pairs with both labels, in whatever order.
    """

    duplicates: Doubt = Doubt()
    mirrored: Doubt = Doubt()
    selves: Doubt = Doubt()
    contradicting: Doubt = Doubt()


class _Groups:
    """Rows brought together by unordered pair, in the manifest's order within each: one stable sort."""

    def __init__(self, a: np.ndarray, b: np.ndarray, most: int) -> None:
        a, b = a.astype(np.int64), b.astype(np.int64)
        key = np.minimum(a, b) << 32 | np.maximum(a, b)
        self.order = np.argsort(key, kind="stable")
        key = key[self.order]
        self.starts = np.flatnonzero(np.r_[True, key[1:] != key[:-1]])
        self.ends = np.r_[self.starts[1:], len(key)]
        self._most = most

    def having(self, flags: np.ndarray) -> np.ndarray:
        """Which groups have a row with the flag. flags: (N,) bool, sorted; returns (G,) bool."""
        return np.logical_or.reduceat(flags, self.starts)

    def cases(self, marked: np.ndarray, values: np.ndarray, choose: _Choice) -> tuple[tuple[int, int], ...]:
        """The first marked groups: two rows each, chosen by their values. values: (N,), sorted."""
        groups = np.flatnonzero(marked)
        groups = groups[np.argsort(self.order[self.starts[groups]])][: self._most]
        found = []
        for members in (slice(self.starts[group], self.ends[group]) for group in groups):
            later, earlier = choose(values[members])
            found.append((int(self.order[members][later]), int(self.order[members][earlier])))
        return tuple(found)


def doubtful_pairs(
    a: np.ndarray, b: np.ndarray, labels: np.ndarray | None = None, *, most: int = 10
) -> Doubts:
    """Find them among N rows.

    a, b: (N,) indices of images, below 2**31. labels: (N,) int8, 0, 1 or `BLANK`. most: cases that are
    listed. Takes about 50 bytes a row.
    """
    if not len(a):
        return Doubts()
    groups = _Groups(a, b, most)
    turned, same = (a > b)[groups.order], (a == b)[groups.order]
    both = groups.having(turned) & groups.having(~turned)
    # A pair's rows that repeat no earlier one are as many as the orders in which it stands there.
    repeated = (groups.ends - groups.starts) - 1 - both
    contradicting = Doubt()
    if labels is not None:
        labels = labels[groups.order]
        torn = groups.having(labels == 0) & groups.having(labels == 1)
        contradicting = Doubt(int(torn.sum()), groups.cases(torn, labels, _unequal))
    return Doubts(
        Doubt(int(repeated.sum()), groups.cases(repeated > 0, turned, _repeated)),
        Doubt(int(both.sum()), groups.cases(both, turned, _unequal)),
        Doubt(int(same.sum()), groups.cases(same[groups.starts], turned, lambda values: (0, 0))),
        contradicting,
    )


def _repeated(values: np.ndarray) -> tuple[int, int]:
    """The positions of the first value that stands there already, and of the one it repeats."""
    at = next(at for at in range(1, len(values)) if values[at] in values[:at])
    return at, int(np.argmax(values == values[at]))


def _unequal(values: np.ndarray) -> tuple[int, int]:
    """The positions of the first value that differs from the first one, blanks aside, and of that one."""
    first = int(np.argmax(values != BLANK))
    return int(np.argmax((values != values[first]) & (values != BLANK))), first
