"""Figures that papers on face and speaker recognition quote: d', MCC, HTER, FMR100, ZeroFMR, Cllr.

All functions take weighted counts of same and different pairs, so that the bootstrap can call them.
"""

from __future__ import annotations

import math

import numpy as np

from batchverify.heads import prior

NAMES = {
    "mcc": "Matthews correlation",
    "hter": "half total error rate",
    "fmr100": "FMR100",
    "fmr1000": "FMR1000",
    "zero_fmr": "ZeroFMR",
    "d_prime": "d'",
    "cllr": "Cllr",
    "min_cllr": "minimum Cllr",
}
# The false match rates of the operating points, with the name of the false non-match rate there.
POINTS = {"fmr100": 1e-2, "fmr1000": 1e-3, "zero_fmr": 0.0}
# The log-odds of a float32 probability beyond which it may have been rounded to 0 or 1.
MOST_ODDS = 16.0


def matthews(same: float, different: float, false_accepts: float, false_rejects: float) -> float:
    """Matthews correlation of truth and verdict; 0 if all verdicts are equal, as in scikit-learn.

    Source: Matthews 1975, Comparison of the predicted and observed secondary structure of T4 phage lysozyme.
    """
    hits, rightly_same = different - false_accepts, same - false_rejects
    called, accepted = hits + false_rejects, rightly_same + false_accepts
    size = math.sqrt(called * accepted * same * different)
    return (hits * rightly_same - false_accepts * false_rejects) / size if size else 0.0


def log_odds(probability: np.ndarray) -> np.ndarray:
    """(N,) float64, log p / (1 - p), between -16 and 16."""
    return prior.log_odds(probability, MOST_ODDS)


def decidability(same: np.ndarray, different: np.ndarray, scores: np.ndarray) -> float:
    """d': the distance of the two means in units of the pooled standard deviation.

    scores: (N,). same, different: (N,) weights, 0 for pairs of the other kind. NaN if no score varies.
    Source: Daugman 2000, Biometric decision landscapes.
    """
    (first, spread), (second, other) = (_moments(each, scores) for each in (same, different))
    pooled = math.sqrt((spread + other) / 2)
    return abs(first - second) / pooled if pooled else math.nan


def _moments(weights: np.ndarray, scores: np.ndarray) -> tuple[float, float]:
    """Weighted mean and variance, dividing by the weights' sum."""
    mean = float(weights @ scores / weights.sum())
    return mean, float(weights @ (scores - mean) ** 2 / weights.sum())


def cost_of_log_ratios(losses: np.ndarray, same: np.ndarray, different: np.ndarray) -> float:
    """Cllr in bits, the probability taken as a posterior at even odds; 0 is perfect, no information gives 1.

    losses: (N,) log loss of each pair in nats. same, different: (N,) weights, 0 for pairs of the other kind.
    Source: Brümmer and du Preez 2006, Application-independent evaluation of speaker detection.
    """
    means = [float(weights @ losses / weights.sum()) for weights in (same, different)]
    return sum(means) / 2 / math.log(2)


def minimum_cost(same: np.ndarray, different: np.ndarray) -> float:
    """Cllr after the best rising recalibration, which pool-adjacent-violators finds.

    same, different: (K,) weights at K distinct scores, ascending towards different.
    Source: Brümmer and du Preez 2006, section on optimised calibration.
    """
    # Scores that a draw left out.
    known = same + different > 0
    same, different = same[known], different[known]
    while len(starts := _rising(same, different)) < len(same):
        same, different = (np.add.reduceat(each, starts) for each in (same, different))
    shares = [each / each.sum() for each in (same, different)]
    return sum(_bits(one, other) for one, other in (shares, shares[::-1])) / 2


def _rising(same: np.ndarray, different: np.ndarray) -> np.ndarray:
    """Where blocks start: a score joins the one before if its share of different pairs is not above that one's."""
    # Products, not quotients: exact for whole numbers, and a pure block is no special case.
    rises = different[1:] * same[:-1] > different[:-1] * same[1:]
    return np.flatnonzero(np.append(True, rises))


def _bits(one: np.ndarray, other: np.ndarray) -> float:
    """The mean of log2(1 + other / one) over the weight of `one`."""
    held = one > 0
    return float(one[held] @ np.log2(1 + other[held] / one[held]))
