"""Confidence intervals: a bootstrap over people or images, exact bounds if all of its draws agree."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from batchverify.evaluation.document import Interval
from batchverify.heads.prior import Units
from batchverify.options import FEWEST_DRAWS

THREADS = 2
# The share of draws beyond either end of a 95 % interval.
TAIL = 0.025

Measured = TypeVar("Measured")
Figures = Mapping[str, float]
Span = tuple[float, float]


def bootstrap(
    units: Units, figures: Callable[[np.ndarray], Figures], *, draws: int, seed: int = 0
) -> dict[str, Span]:
    """The 95 % percentile intervals of all figures. figures: computes them from the (N,) weights of one draw.

    The same seed gives the same draws. A draw that lacks one kind of pair has no value, and a figure with fewer than
    `FEWEST_DRAWS` values no interval.
    """
    drawn = each_draw(units, figures, draws=draws, seed=seed)
    spans = {}
    for name in dict.fromkeys(name for each in drawn for name in each):
        known = [each[name] for each in drawn if not np.isnan(each.get(name, np.nan))]
        if len(known) >= FEWEST_DRAWS:
            low, high = np.quantile(known, [TAIL, 1 - TAIL]).tolist()
            spans[name] = (low, high)
    return spans


def each_draw(
    units: Units, measured: Callable[[np.ndarray], Measured], *, draws: int, seed: int = 0
) -> list[Measured]:
    """What a function of the (N,) weights says of each draw; the same seed gives the same draws."""
    # Each draw has its own generator, so the order in which threads end does not matter.
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(lambda number: measured(units.weights((seed, number))), range(draws)))


def span_of(values: np.ndarray) -> Span | None:
    """The 95 % percentile interval of (draws,) values, of which some may be infinite; NaN is a draw without a value.

    None for fewer values than `FEWEST_DRAWS`, and if all of them agree.
    """
    known = np.sort(values[~np.isnan(values)])
    if len(known) < FEWEST_DRAWS or known[0] == known[-1]:
        return None
    if np.isfinite(known[-1]):
        low, high = np.quantile(known, [TAIL, 1 - TAIL]).tolist()
        return low, high
    # Between a number and infinity there is nothing to interpolate.
    last = len(known) - 1
    return float(known[math.floor(last * TAIL)]), float(known[math.ceil(last * (1 - TAIL))])


def with_exact_bounds(
    spans: Mapping[str, Span], trials: Mapping[str, tuple[float, float]]
) -> tuple[dict[str, Span], list[str]]:
    """A bootstrap's intervals, those without width replaced or left out, and the names of those replaced.

    trials: (successes, trials) of figures that are shares. A share of 0 or 1 gets the exact binomial bound, F1
    what follows from the bounds of precision and recall; both assume independent pairs. Other figures (ROC AUC,
    equal error, average precision) get none.
    """
    wide = {name: span for name, span in spans.items() if span[0] < span[1]}
    flat = spans.keys() - wide.keys()
    exact = {name: span for name in sorted(flat) if name in trials and (span := exact_bounds(*trials[name]))}
    if "f1" in flat and {"precision", "recall"} <= exact.keys():
        ends = zip(exact["precision"], exact["recall"], strict=True)
        low, high = (2 * p * r / (p + r) if p + r else 0.0 for p, r in ends)
        exact["f1"] = (low, high)
    return wide | exact, sorted(exact)


def exact_bounds(successes: float, trials: float) -> Span | None:
    """The Clopper-Pearson interval of no or only successes; None for any other number."""
    bound = 1 - TAIL ** (1 / trials) if trials else 1.0
    if not successes:
        return 0.0, bound
    return (1 - bound, 1.0) if successes == trials else None


def exact_span(wrong: float, trials: float, disjoint: int) -> Span | None:
    """The Clopper-Pearson interval of a rate of 0 or 1, each disjoint pair one trial; None for any other rate.

    The bootstrap says nothing of such a rate. Disjoint pairs are independent for people drawn at random, all pairs
    are not: with all of them as trials the interval is too narrow.
    """
    if not trials or 0 < wrong < trials:
        return None
    return exact_bounds(disjoint if wrong else 0, disjoint)


def shown_span(span: Interval | None, form: str) -> str:
    """An interval in brackets, empty if there is none; an end that is None is infinite."""
    if not span:
        return ""
    low, high = ("…" if end is None else format(end, form) for end in span)
    return f"  [{low}, {high}]"
