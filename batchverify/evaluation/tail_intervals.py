"""How far an extrapolated tail can be trusted: likelihood intervals that allow for people and for other tails.

An interval holds what every tail gives that the scores do not exclude: each pair of shape and scale whose likelihood
is near the highest (profile likelihood: Coles 2001, chapter 2.6 and 4.3.3), of the tail as fitted and of shorter
ones. Pairs that share people are not independent, so the likelihood counts for less (Chandler and Bate 2007,
Inference for clustered data using the independence loglikelihood; variances of pairs that share units: Aronow, Samii
and Assenova 2015).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from batchverify.evaluation.bootstrap import Span
from batchverify.evaluation.pareto_tail import SHAPES, Tail, fit_tail, tail_size
from batchverify.heads.prior import Units

# The 95 % quantile of chi-square with one degree of freedom.
NEAR = 3.841458820694124
# The tail is halved twice, and again as long as so many scores remain.
HALVED, SHORTEST = 2, 50
# Points along the shape and along the ratio of shape to scale, and how many standard deviations the scale reaches.
SHAPES_TRIED, RATIOS_TRIED, REACH = 121, 600, 16.0
# A step of the numerical derivatives.
_STEP = 1e-4

# What is extrapolated from (M,) tails, given as arrays of shares, scales and shapes.
Quantity = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


def level_at(start: float, rate: float) -> Quantity:
    """The score that a share `rate` of all scores exceeds, for tails that begin at `start`."""

    def level(share: np.ndarray, scale: np.ndarray, shape: np.ndarray) -> np.ndarray:
        logs = np.log(share / rate)
        return start + scale * np.where(np.abs(shape) < 1e-9, logs, np.expm1(shape * logs) / _apart(shape))

    return level


def log_rate_at(start: float, level: float) -> Quantity:
    """The logarithm of the share of all scores that exceed `level`; minus infinity beyond a finite end."""

    def log_rate(share: np.ndarray, scale: np.ndarray, shape: np.ndarray) -> np.ndarray:
        beyond = (level - start) / scale
        with np.errstate(divide="ignore", invalid="ignore"):
            curved = -np.log(np.maximum(1 + shape * beyond, 0)) / _apart(shape)
        return np.log(share) + np.where(
            np.abs(shape) < 1e-9, -beyond, np.where(1 + shape * beyond > 0, curved, -np.inf)
        )

    return log_rate


def _apart(shape: np.ndarray) -> np.ndarray:
    """Shapes that can be divided by."""
    return np.where(np.abs(shape) < 1e-9, 1.0, shape)


@dataclass(frozen=True)
class TailLikelihood:
    """The log-likelihood of tails around the likeliest, on a grid of shapes and scales.

    tail: the likeliest. count: scores in it. shape, scale: (M,) the grid. loss: (M,) twice what the log-likelihood
    lacks to the highest one.
    """

    tail: Tail
    count: int
    shape: np.ndarray
    scale: np.ndarray
    loss: np.ndarray

    @classmethod
    def of(cls, excess: np.ndarray, tail: Tail) -> TailLikelihood:
        """From the (K,) excesses over the start of a fitted tail."""
        shapes = np.linspace(*SHAPES, SHAPES_TRIED)
        reach = REACH * math.sqrt(1 / len(excess))
        parts = [_exponential(excess, tail.scale * np.exp(np.linspace(-reach, reach, RATIOS_TRIED)))]
        for side in (shapes[shapes < -1e-9], shapes[shapes > 1e-9]):
            sizes = np.abs(side)
            ratios = np.geomspace(sizes.min() * math.exp(-reach), sizes.max() * math.exp(reach), RATIOS_TRIED)
            parts.append(_curved(excess, side, math.copysign(1, side[0]) * ratios / tail.scale))
        shape, scale, likely = (np.concatenate(each) for each in zip(*parts, strict=True))
        # The highest of the shapes that are allowed; a short tail may prefer another one.
        return cls(tail, len(excess), shape, scale, 2 * (float(likely.max()) - likely))

    def span(self, quantity: Quantity, factor: float) -> Span:
        """The lowest and highest value of a quantity over all tails that are not excluded.

        factor: by how much the variance exceeds that of independent pairs.
        """
        left = NEAR * factor - self.loss
        kept = left >= 0
        # The share in the tail is binomial, and independent of what the tail looks like.
        swing = np.sqrt(left[kept] * (1 - self.tail.share) / self.count)
        ends = [
            quantity(self.tail.share * np.exp(sign * swing), self.scale[kept], self.shape[kept]) for sign in (-1, 1)
        ]
        values = np.concatenate(ends)
        return (float(values.min()), float(values.max())) if len(values) else (math.nan, math.nan)


def _exponential(excess: np.ndarray, scales: np.ndarray) -> tuple[np.ndarray, ...]:
    """Shape 0, (S,) scales, and the log-likelihood of (K,) excesses."""
    return np.zeros(len(scales)), scales, -len(excess) * np.log(scales) - excess.sum() / scales


def _curved(excess: np.ndarray, shapes: np.ndarray, ratios: np.ndarray) -> tuple[np.ndarray, ...]:
    """Shapes, scales and log-likelihoods of all of (S,) shapes with all of (R,) ratios of shape to scale, flat.

    All have one sign. The costly sum of logarithms depends on the ratio alone. Ratios that would exclude one of the
    (K,) excesses are left out.
    """
    ratios = ratios[1 + ratios * excess.max() > 0]
    logs = np.array([np.log1p(ratio * excess).sum() for ratio in ratios])
    shape, ratio = np.repeat(shapes, len(ratios)), np.tile(ratios, len(shapes))
    scale = shape / ratio
    return shape, scale, -len(excess) * np.log(scale) - (1 + 1 / shape) * np.tile(logs, len(shapes))


@dataclass(frozen=True)
class TailIntervals:
    """The intervals of what is extrapolated from N scores: of the tail as fitted and of shorter ones, joined."""

    scores: np.ndarray
    units: Units | None
    tails: tuple[TailLikelihood, ...]

    @classmethod
    def of(cls, scores: np.ndarray, units: Units | None) -> TailIntervals:
        """scores: (N,), higher is rarer. units: of these pairs; None takes them for independent."""
        tails: list[TailLikelihood] = []
        size = tail_size(len(scores))
        while len(tails) <= HALVED or size >= SHORTEST:
            highest = np.partition(scores, -size - 1)[-size - 1 :]
            if len(np.unique(highest)) <= max(size // 2, 2):
                # Equal scores, as of probabilities that were rounded to 0, are no tail.
                break
            tail = fit_tail(scores, size=size)
            excess = scores[scores > tail.start].astype(np.float64) - tail.start
            tails.append(TailLikelihood.of(excess, tail))
            size //= 2
        return cls(scores, units, tuple(tails))

    def of_level(self, rate: float) -> Span:
        """The interval of the score that a share `rate` of all scores exceeds."""
        return self._joined(lambda start: level_at(start, rate))

    def of_rate(self, level: float) -> Span:
        """The interval of the share of all scores that exceed a score beyond every tail's start."""
        low, high = self._joined(lambda start: log_rate_at(start, level))
        return math.exp(low), math.exp(high)

    def _joined(self, quantity_of: Callable[[float], Quantity]) -> Span:
        spans = []
        for likely in self.tails:
            quantity = quantity_of(likely.tail.start)
            spans.append(likely.span(quantity, inflation(self.scores, likely.tail, self.units, quantity)))
        return min(low for low, _ in spans), max(high for _, high in spans)


def inflation(scores: np.ndarray, tail: Tail, units: Units | None, quantity: Quantity) -> float:
    """By how much pairs that share units raise the variance of an extrapolated quantity; at least 1.

    scores: (N,). units: of these pairs; None takes them for independent.
    """
    if units is None:
        return 1.0
    point = np.array([tail.share, tail.scale, tail.shape])
    slope = np.array([_slope(quantity, point, which) for which in range(3)])
    if not np.isfinite(slope).all():
        return 1.0
    influence = _gradients(scores, tail) @ (_variance(tail, len(scores)) @ slope)
    return max(1.0, _shared_variance(influence, units) / float(influence @ influence))


def _slope(quantity: Quantity, point: np.ndarray, which: int) -> float:
    """The derivative by the logarithm of the share, that of the scale, or the shape."""
    ends = []
    for sign in (-1, 1):
        moved = point.copy()
        moved[which] = moved[which] + sign * _STEP if which == 2 else moved[which] * math.exp(sign * _STEP)
        ends.append(float(quantity(*(np.array([value]) for value in moved))[0]))
    return (ends[1] - ends[0]) / (2 * _STEP)


def _variance(tail: Tail, count: int) -> np.ndarray:
    """(3, 3) the variance of log share, log scale and shape for independent scores (Smith 1985)."""
    beyond, wider = tail.share * count, max(1 + tail.shape, 0.5)
    variance = np.zeros((3, 3))
    variance[0, 0] = (1 - tail.share) / beyond
    variance[1:, 1:] = wider / beyond * np.array([[2, -1], [-1, wider]])
    return variance


def _gradients(scores: np.ndarray, tail: Tail) -> np.ndarray:
    """(N, 3) the derivatives of each score's log-likelihood by log share, log scale and shape."""
    found = np.zeros((len(scores), 3))
    beyond = scores > tail.start
    found[:, 0] = np.where(beyond, 1.0, -tail.share / (1 - tail.share))
    ratio = (scores[beyond].astype(np.float64) - tail.start) / tail.scale
    shape = tail.shape if abs(tail.shape) > 1e-5 else 1e-5
    inner = np.maximum(1 + shape * ratio, 1e-6)
    found[beyond, 1] = (1 + shape) * ratio / inner - 1
    found[beyond, 2] = np.log(inner) / shape**2 - (1 + 1 / shape) * ratio / inner
    return found


def _shared_variance(influence: np.ndarray, units: Units) -> float:
    """The variance of the sum of (N,) influences, of which those that share a unit are not independent."""
    once = units.a == units.b
    sums = np.bincount(units.a, influence, units.count)
    sums += np.bincount(units.b[~once], influence[~once], units.count)
    low, high = np.minimum(units.a, units.b)[~once], np.maximum(units.a, units.b)[~once]
    # Pairs of the same two units were counted twice.
    _, couple = np.unique(low.astype(np.int64) * units.count + high, return_inverse=True)
    twice = np.bincount(couple, influence[~once]) if len(couple) else np.zeros(0)
    return float(sums @ sums - twice @ twice)
