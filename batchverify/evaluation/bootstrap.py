"""Confidence intervals: a bootstrap over people or images, exact bounds where all of its draws agree."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from batchverify.options import FEWEST_DRAWS

COVERAGE = 0.95
THREADS = 2

Figures = Mapping[str, float]
# What a 95 % interval leaves out at either end.
TAIL = 0.025

Span = tuple[float, float]


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
    units: Units, figures: Callable[[np.ndarray], Figures], *, draws: int, seed: int = 0
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
    # A draw that lacks one kind of pair has no value; fewer than this many values give no interval.
    if len(known) < FEWEST_DRAWS:
        return None
    low, high = np.quantile(known, [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2])
    return float(low), float(high)


def honest(
    spans: Mapping[str, Span], trials: Mapping[str, tuple[float, float]]
) -> tuple[dict[str, Span], list[str]]:
    """The intervals of a bootstrap without those that have no width, and the names of those replaced.

    trials: (successes, trials) of figures that are shares. Of those that are 0 or 1 the exact binomial bound
    stands in; F1's follows from the bounds of precision and recall. All take pairs for independent. Other
    figures (ROC AUC, equal error, average precision) have none.
    """
    kept = {name: span for name, span in spans.items() if span[0] < span[1]}
    flat = spans.keys() - kept.keys()
    found = {name: span for name in sorted(flat) if name in trials and (span := _exact(*trials[name]))}
    if "f1" in flat and {"precision", "recall"} <= found.keys():
        ends = zip(found["precision"], found["recall"], strict=True)
        low, high = (2 * p * r / (p + r) if p + r else 0.0 for p, r in ends)
        found["f1"] = (low, high)
    return kept | found, sorted(found)


def verdict_trials(counts: Mapping[str, int]) -> dict[str, tuple[float, float]]:
    """(successes, trials) of every figure that is a share of `MeasuredPairs.counts`."""
    accepts, rejects = counts["false_accepts"], counts["false_rejects"]
    same, different = counts["same"], counts["different"]
    lost = counts["same_failed"] + counts["different_failed"]
    hits = different - accepts
    return {
        "far": (accepts, different),
        "frr": (rejects, same),
        "recall": (hits, different),
        "precision": (hits, hits + rejects),
        "accuracy": (hits + same - rejects, same + different),
        "failure_rate": (lost, same + different + lost),
        "far_with_failures": (accepts, different + counts["different_failed"]),
        "frr_with_failures": (rejects + counts["same_failed"], same + counts["same_failed"]),
    }


def _exact(seen: float, trials: float) -> Span | None:
    """The Clopper-Pearson interval of none or all of some trials; None of any other number."""
    bound = 1 - TAIL ** (1 / trials) if trials else 1.0
    if not seen:
        return 0.0, bound
    return (1 - bound, 1.0) if seen == trials else None
