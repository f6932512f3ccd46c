"""Base rates: the share of same pairs that probabilities assume, exchanged for another, or estimated from scores.

A base rate, or prior, is the share of the pairs that show one person. A head's probabilities hold where it equals
that of the pairs on which the head was calibrated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from batchverify.errors import UsageError

# Of heads whose metadata state none: they were calibrated on balanced pairs.
BALANCED = 0.5
# Log-odds are clipped to these and counted in steps of this width, which changes no ratio by more than 0.5 %.
FARTHEST, STEP = 30.0, 0.01
# The EM algorithm ends at a change below the first, or after so many steps.
_CHANGE, _STEPS = 1e-9, 5000
DRAWS = 200
# The share of draws beyond either end of a 95 % interval.
_TAIL = 0.025


@dataclass(frozen=True)
class BaseRate:
    """Probabilities of a head, calibrated where `fitted` of the pairs are same, for pairs of which `share` are.

    kept: thresholds of the head; what lies below such a threshold still does once both have been shifted.
    """

    share: float
    fitted: float = BALANCED
    kept: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        kept = sorted({threshold for threshold in self.kept if threshold <= 1})
        moved = [self.threshold(threshold) for threshold in kept]
        if len(set(moved)) < len(kept):
            raise UsageError(
                f"--prior {self.share:g}: too near to 0 or 1: as float32 numbers, two thresholds of the head would be"
                " the same"
            )

    def threshold(self, threshold: float) -> float:
        """A threshold of the head, shifted as the probabilities are and rounded to float32 as they are.

        One above 1, which no probability reaches, stays.
        """
        if threshold > 1:
            return threshold
        shifted = np.float32(shift(np.array(threshold, np.float32), self.share, self.fitted))
        # One above 0 stays above 0, so that something can lie below.
        return float(max(shifted, np.nextafter(np.float32(0), np.float32(1)))) if threshold > 0 else 0.0

    def __call__(self, probability: np.ndarray) -> np.ndarray:
        """(N,) float32 probabilities of different people, shifted: (N,) float32."""
        shifted = shift(probability, self.share, self.fitted).astype(np.float32)
        for threshold in self.kept:
            limit = np.float32(self.threshold(threshold))
            # Rounding must not carry a probability over a threshold.
            below = probability < np.float32(threshold)
            shifted[below & (shifted >= limit)] = np.nextafter(limit, np.float32(-1))
            shifted[~below & (shifted < limit)] = limit
        return shifted


def shift(probability: np.ndarray, prior: float, fitted: float = BALANCED) -> np.ndarray:
    """P(different) where `prior` of the pairs are same, from P(different) where `fitted` are: (N,) float64.

    Bayes' rule: the odds of different people are multiplied by (1 - prior) / prior * fitted / (1 - fitted). Source:
    Saerens, Latinne and Decaestecker 2002, Adjusting the outputs of a classifier to new a priori probabilities,
    equation 2.4. Raises `UsageError` for a share that does not lie between 0 and 1.
    """
    for share in (prior, fitted):
        if not 0 < share < 1:
            raise UsageError(f"a share of same pairs must lie between 0 and 1, got {share!r}")
    values = np.asarray(probability, np.float64)
    different, same = values * ((1 - prior) / (1 - fitted)), (1 - values) * (prior / fitted)
    return np.asarray(different / (different + same))


def log_odds(probability: np.ndarray, farthest: float = FARTHEST) -> np.ndarray:
    """log(p / (1 - p)) of (N,) probabilities in float64, clipped to ±`farthest`."""
    values = np.asarray(probability, np.float64)
    with np.errstate(divide="ignore"):
        return np.clip(np.log(values) - np.log1p(-values), -farthest, farthest)


def steps_of(probability: np.ndarray) -> np.ndarray:
    """(N,) int64, the step of `STEP` log-odds in which each probability lies, from 0."""
    return np.rint((log_odds(probability) + FARTHEST) / STEP).astype(np.int64)


def step_probabilities() -> np.ndarray:
    """P(different) at the middle of every step: (M,) float64."""
    return np.asarray(1 / (1 + np.exp(FARTHEST - STEP * np.arange(round(2 * FARTHEST / STEP) + 1))))


def most_likely_share(probability: np.ndarray, weights: np.ndarray, fitted: float = BALANCED) -> float:
    """The share of same pairs that makes (N,) calibrated probabilities with (N,) weights most likely.

    The EM algorithm of Saerens, Latinne and Decaestecker 2002, equation 2.8: the share is the mean probability of
    same under the share of the step before. NaN without weight. It does not know the labels, but it believes that
    the scores of same pairs, and those of different ones, are distributed as they were at calibration.
    """
    known = weights > 0
    different, same, weights = probability[known], 1 - probability[known], weights[known]
    total = float(weights.sum())
    if not total:
        return math.nan
    different, same = different / (1 - fitted), same / fitted
    share = fitted
    for _ in range(_STEPS):
        likely = share * same
        new = float(weights @ (likely / (likely + (1 - share) * different))) / total
        if abs(new - share) < _CHANGE:
            return new
        share = new
    return share


@dataclass(frozen=True)
class Units:
    """What N pairs have in common, which a bootstrap draws.

    kind: `identities`, `images` or `pairs`. a, b: (N,) from 0 to `count` - 1, the unit of each side.
    """

    kind: str
    a: np.ndarray
    b: np.ndarray
    count: int

    @classmethod
    def of(cls, kind: str, a: np.ndarray, b: np.ndarray) -> Units:
        """Units by any numbers."""
        units, codes = np.unique(np.concatenate([a, b]), return_inverse=True)
        return cls(kind, codes[: len(a)], codes[len(a) :], len(units))

    def subset(self, rows: np.ndarray) -> Units:
        """The same units, for some of the pairs."""
        return Units(self.kind, self.a[rows], self.b[rows], self.count)

    def weights(self, seed: Sequence[int]) -> np.ndarray:
        """(N,) int32, the weight of each pair in one draw of `count` units with replacement.

        It is the product of the counts of both sides. A pair of one unit has that unit's count, not its square: for
        simulated people whose rates differ, 95 % intervals held the truth 92 to 94.5 % of the time with the count,
        99.5 % with the square, 65 % wider. Source: Owen 2007, The pigeonhole bootstrap.
        """
        drawn = np.random.default_rng(seed).integers(0, self.count, self.count)
        counts = np.bincount(drawn, minlength=self.count).astype(np.int32)
        return np.asarray(counts[self.a] * np.where(self.a == self.b, np.int32(1), counts[self.b]))


@dataclass(frozen=True)
class Estimate:
    """An estimated share of same pairs with its 95 % interval, for run records. pairs: that it was estimated from."""

    share: float
    interval: list[float]
    pairs: int
    unit: str
    units: int


def estimate(
    probability: np.ndarray,
    fitted: float = BALANCED,
    units: Units | None = None,
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> Estimate:
    """The share of same pairs among (N,) calibrated probabilities without labels, by `most_likely_share`.

    units: what pairs have in common; each pair by itself if None. The interval is that of a bootstrap over them. It
    knows of chance alone, not of scores that are distributed otherwise than at calibration. Raises `UsageError`
    without pairs.
    """
    if not len(probability):
        raise UsageError("no pair has a score, so the share of same pairs cannot be estimated")
    if units is None:
        rows = np.arange(len(probability))
        units = Units("pairs", rows, rows, len(rows))
    steps, middles = steps_of(probability), step_probabilities()

    def of(weights: np.ndarray | None) -> float:
        return most_likely_share(middles, np.bincount(steps, weights, len(middles)), fitted)

    drawn = [of(units.weights((seed, number))) for number in range(draws)]
    share = of(None)
    low, high = np.quantile([each for each in drawn if not math.isnan(each)] or [0, 1], [_TAIL, 1 - _TAIL])
    # Draws that agree on none or all same pairs: what so many pairs can exclude.
    most = 1 - _TAIL ** (1 / len(probability))
    low, high = min(float(low), share, 1 - most), max(float(high), share, most)
    return Estimate(share, [low, high], len(probability), units.kind, units.count)


def fitted_share(about: Mapping[str, Any]) -> float:
    """The share of same pairs for which the head with this metadata was calibrated. Raises `ValueError`."""
    calibration = about.get("calibration", {})
    if not isinstance(calibration, Mapping):
        raise ValueError("its calibration is not described")
    share = float(calibration.get("same_share", BALANCED))
    if not 0 < share < 1:
        raise ValueError(f"its calibration is for a share of {share!r} same pairs")
    return share
