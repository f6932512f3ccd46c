"""The upper tail of scores as a generalised Pareto distribution: the fit, and when it must not be extrapolated.

Peaks over threshold: beyond a high threshold, exceedances of almost any distribution follow a generalised Pareto
distribution. Source: Pickands 1975, Statistical inference using extreme order statistics; Coles 2001, An introduction
to statistical modeling of extreme values, chapter 4.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

# Exceedances that a tail needs at least, and the shape within which maximum likelihood behaves regularly
# (Smith 1985: above -0.5) and the tail has a variance (below 0.5).
FEWEST = 100
SHAPES = (-0.5, 0.5)
# A fit whose Anderson-Darling test gives less is bad.
BAD = 0.05
SIMULATED = 200


@dataclass(frozen=True)
class Tail:
    """The fitted upper tail of N scores, higher is rarer.

    start: where the tail begins. share: of scores beyond it. shape, scale: of the generalised Pareto distribution.
    """

    start: float
    share: float
    shape: float
    scale: float

    def level(self, rate: float) -> float:
        """The score that a share `rate` exceeds, for rates at most `share`."""
        log_ratio = math.log(self.share / rate)
        if abs(self.shape) < 1e-9:
            return self.start + self.scale * log_ratio
        return self.start + self.scale * math.expm1(self.shape * log_ratio) / self.shape

    def rate(self, level: float) -> float:
        """The share of scores that exceed a level at or beyond `start`; 0 beyond a finite end."""
        beyond = (level - self.start) / self.scale
        if abs(self.shape) < 1e-9:
            return self.share * math.exp(-beyond)
        inner = 1 + self.shape * beyond
        return self.share * inner ** (-1 / self.shape) if inner > 0 else 0.0


def tail_size(scores: int) -> int:
    """How many of N scores the tail takes: N^(2/3) / log(log(N)).

    Source: Loretan and Phillips 1994, Testing the covariance stationarity of heavy-tailed time series; recommended by
    Scarrott and MacDonald 2012, A review of extreme value threshold estimation and uncertainty quantification.
    """
    return int(scores ** (2 / 3) / math.log(math.log(scores))) if scores > 15 else 0


def fit_tail(scores: np.ndarray, size: int | None = None) -> Tail:
    """Fit the highest of (N,) scores by maximum likelihood. size: how many; `tail_size` by default.

    Raises `ValueError` if no score exceeds the tail's start.
    """
    size = size or tail_size(len(scores))
    start = float(np.partition(scores, -size - 1)[-size - 1])
    excess = scores[scores > start].astype(np.float64) - start
    if not len(excess):
        raise ValueError("no score lies in the tail")
    return Tail(start, len(excess) / len(scores), *_likeliest(excess))


def _likeliest(excess: np.ndarray) -> tuple[float, float]:
    """(shape, scale) by Grimshaw's profile: for a given ratio shape / scale the best shape is a mean of logs.

    Source: Grimshaw 1993, Computing maximum likelihood estimates for the generalized Pareto distribution.
    """
    from scipy.optimize import minimize_scalar

    shares, mean = np.full(len(excess), 1 / len(excess)), float(excess.mean())

    def costs(ratios: np.ndarray) -> np.ndarray:
        shapes = np.log1p(ratios[:, None] * excess) @ shares
        # The exponential distribution is the limit.
        near = np.abs(ratios * mean) <= 1e-9
        scales = np.where(near, mean, shapes / np.where(near, 1, ratios))
        # Shapes below -1 have an unbounded likelihood, which says nothing.
        usable = (scales > 0) & (shapes > -1)
        return np.where(usable, np.log(np.where(usable, scales, 1)) + shapes + 1, np.inf)

    lowest = -(1 - 1e-6) / excess.max()
    edges = np.concatenate([np.linspace(lowest, -1e-6 / mean, 30), np.geomspace(1e-6, 20, 30) / mean])
    best = min(max(int(np.argmin(costs(edges))), 1), len(edges) - 2)
    ratio = minimize_scalar(
        lambda ratio: float(costs(np.array([ratio]))[0]),
        bounds=(edges[best - 1], edges[best + 1]),
        method="bounded",
        options={"xatol": 1e-9 / mean},
    ).x
    shape = float(shares @ np.log1p(ratio * excess))
    return shape, (shape / ratio if abs(ratio * mean) > 1e-9 else mean)


def misfit(scores: np.ndarray, tail: Tail, seed: int = 0) -> float:
    """The p-value of the Anderson-Darling test of the tail, by a parametric bootstrap.

    Source: Choulakian and Stephens 2001, Goodness-of-fit tests for the generalized Pareto distribution.
    """
    excess = np.sort(scores[scores > tail.start].astype(np.float64) - tail.start)
    rng, found = np.random.default_rng(seed), _anderson_darling(excess, tail.shape, tail.scale)
    worse = 0
    for _ in range(SIMULATED):
        drawn = np.sort(_draw(rng, len(excess), tail))
        worse += _anderson_darling(drawn, *_likeliest(drawn)) >= found
    return (worse + 1) / (SIMULATED + 1)


def _draw(rng: np.random.Generator, count: int, tail: Tail) -> np.ndarray:
    logs = rng.exponential(size=count)
    return tail.scale * (logs if abs(tail.shape) < 1e-9 else np.expm1(tail.shape * logs) / tail.shape)


def _anderson_darling(excess: np.ndarray, shape: float, scale: float) -> float:
    """The statistic of (N,) ascending excesses."""
    inner = np.maximum(1 + shape * excess / scale, 1e-300)
    survival = np.exp(-excess / scale) if abs(shape) < 1e-9 else inner ** (-1 / shape)
    survival = np.clip(survival, 1e-15, 1 - 1e-15)
    count = len(excess)
    odd = 2 * np.arange(1, count + 1) - 1
    return float(-count - odd @ (np.log1p(-survival) + np.log(survival[::-1])) / count)


def refusal(scores: np.ndarray) -> str | None:
    """Why the tail of (N,) scores cannot be extrapolated; None if it can."""
    size = tail_size(len(scores))
    if size < FEWEST:
        return f"needs {FEWEST} different pairs in the tail, {size} available"
    tail = fit_tail(scores)
    if int((scores > tail.start).sum()) < size // 2 or len(np.unique(scores[scores > tail.start])) < size // 2:
        return "too many equal scores in the tail"
    if not SHAPES[0] < tail.shape < SHAPES[1]:
        return f"the fitted shape {tail.shape:.2f} is not between {SHAPES[0]} and {SHAPES[1]}"
    chance = misfit(scores, tail)
    return f"the tail does not fit (Anderson-Darling, p = {chance:.3f})" if chance < BAD else None
