"""Bootstrap over whom or what the pairs share: draws of identities or images, weights of pairs, intervals."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

DRAWS = 200
COVERAGE = 0.95
# Draws that lack one kind of pair say nothing; of fewer than so many others no interval is made.
FEWEST = 40
THREADS = 2

Figures = Mapping[str, float]


@dataclass(frozen=True)
class Units:
    """What is drawn. kind: `identities`, `images` or `pairs`. a, b: (N,) int32, the unit of each side of N pairs."""

    kind: str
    a: np.ndarray
    b: np.ndarray
    count: int

    def subset(self, rows: np.ndarray) -> Units:
        """The same units, of some of the pairs."""
        return Units(self.kind, self.a[rows], self.b[rows], self.count)

    def weights(self, seed: Sequence[int]) -> np.ndarray:
        """(N,) int32: how often each pair stands in one draw of units, with replacement.

        A pair weighs the product of its sides' counts. Two sides of one identity are drawn at once and not
        twice: such a pair weighs the count itself (on drawn people whose rates differ, intervals of 95 % held the
        truth 92 to 94.5 % of the time with it, 99.5 % with its square, 65 % wider). Source: Owen 2007, The
        pigeonhole bootstrap.
        """
        drawn = np.random.default_rng(seed).integers(0, self.count, self.count)
        counts = np.bincount(drawn, minlength=self.count).astype(np.int32)
        first = counts[self.a]
        return first * np.where(self.a == self.b, np.int32(1), counts[self.b])


@dataclass(frozen=True)
class Intervals:
    """95 % intervals by figure; draws: how many were made; unit, units: what was drawn, and of how many."""

    spans: Mapping[str, tuple[float, float]]
    draws: int
    unit: str
    units: int


def bootstrap(
    units: Units, figures: Callable[[np.ndarray], Figures], *, draws: int = DRAWS, seed: int = 0
) -> Intervals:
    """The percentile intervals of all figures. figures: from the (N,) weights of one draw.

    The same seed gives the same draws, so differences of two runs on the same pairs are paired.
    """
    found = list(_draw(units, figures, draws, seed))
    names = dict.fromkeys(name for each in found for name in each)
    spans = {name: span for name in names if (span := _span([each.get(name, np.nan) for each in found]))}
    return Intervals(spans, draws, units.kind, units.count)


def _draw(units: Units, figures: Callable[[np.ndarray], Figures], draws: int, seed: int) -> Iterator[Figures]:
    # Each draw has a generator of its own: the order in which threads end changes nothing.
    with ThreadPoolExecutor(THREADS) as pool:
        yield from pool.map(lambda number: figures(units.weights((seed, number))), range(draws))


def _span(values: Sequence[float]) -> tuple[float, float] | None:
    known = np.array([value for value in values if not np.isnan(value)])
    if len(known) < FEWEST:
        return None
    low, high = np.quantile(known, [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2])
    return float(low), float(high)
