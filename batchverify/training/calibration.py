"""Calibration and thresholds from the scores of held-out pairs."""

from __future__ import annotations

from typing import Any

import numpy as np

from batchverify.evaluation.figures import EXPECTED_FALSE_ACCEPTS
from batchverify.training.linear import minimise

RATES = (1e-1, 1e-2, 1e-3, 1e-4)
RIDGE = 1e-9


def rate_thresholds(different: np.ndarray) -> list[dict[str, Any]]:
    """For a head's metadata, thresholds for all rates that the (N,) probabilities of different pairs support.

    Below such a `threshold` at most a share `far` of the `pairs` score.
    """
    scores = np.sort(different)
    count = len(scores)
    supported = [rate for rate in RATES if rate * count >= EXPECTED_FALSE_ACCEPTS]
    return [{"far": rate, "threshold": float(scores[int(rate * count)]), "pairs": count} for rate in supported]


def platt_scaling(scores: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Slope and offset that make sigmoid(slope * score + offset) the probability of label 1.

    scores: (N,) float. labels: (N,) 0 and 1, both present. Source: Platt 1999, with its softened targets, so that
    the slope is finite even if a threshold separates the labels.
    """
    scores = scores.astype(np.float64)
    # The standard deviation of equal scores need not be zero, but a rounding error.
    mean, spread = float(scores.mean()), float(scores.std()) if np.ptp(scores) else 1.0
    columns = np.stack([np.ones(len(scores)), (scores - mean) / spread], axis=1)
    offset, slope = _fit(columns, labels)
    return slope / spread, offset - slope * mean / spread


def temperature_scaling(scores: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Slope and offset 0: one over the temperature of Guo et al. 2017. Arguments as for `platt_scaling`."""
    spread = float(np.abs(scores).mean()) or 1.0
    (slope,) = _fit(scores.astype(np.float64)[:, None] / spread, labels)
    return slope / spread, 0.0


METHODS = {
    "platt": platt_scaling,
    "temperature": temperature_scaling,
    "none": lambda *_: (1.0, 0.0),
}


def _fit(columns: np.ndarray, labels: np.ndarray) -> list[float]:
    """Coefficients of a logistic regression of softened (N,) labels on (N, D) columns."""
    different = int((labels == 1).sum())
    same = len(labels) - different
    targets = np.where(labels == 1, (different + 1) / (different + 2), 1 / (same + 2))

    def loss(coefficients: np.ndarray) -> float:
        logits = columns @ coefficients
        return float((np.logaddexp(0, logits) - targets * logits).sum())

    def derivatives(coefficients: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        p = sigmoid(columns @ coefficients)
        hessian = (columns.T * (p * (1 - p))) @ columns + RIDGE * np.eye(len(coefficients))
        return columns.T @ (p - targets), hessian

    return minimise(loss, derivatives, np.zeros(columns.shape[1])).tolist()


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)) without overflow, in float64."""
    return np.exp(-np.logaddexp(0, -np.asarray(logits, np.float64)))


def f1_threshold(probabilities: np.ndarray) -> float:
    """The threshold of the highest expected F1 of (N,) calibrated probabilities, N > 0: half that F1.

    Source: Lipton et al. 2014, Optimal thresholding of classifiers to maximize F1, theorem 1. It depends on all
    pairs, unlike the maximum of the measured F1 curve, which depends on a few pairs near the threshold (fitted to
    2,200 pairs of LFW, F1 on its test pairs is .9910-.9930 with this threshold and .9896-.9910 with the maximum).
    """
    ranked = np.sort(np.asarray(probabilities, np.float64))[::-1]
    expected = 2 * np.cumsum(ranked) / (np.arange(1, len(ranked) + 1) + ranked.sum())
    return float(expected.max() / 2)
