"""Verification metrics; the positive class is 1, different, and a score is the probability of it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# A false accept rate is only stated when the different pairs behind it would give so many false accepts.
EXPECTED_FALSE_ACCEPTS = 10


@dataclass(frozen=True)
class Metrics:
    """How well probabilities tell different pairs from same ones, at one threshold and over all."""

    pairs: int
    auc: float
    threshold: float
    f1: float
    accuracy: float
    best_f1: float
    best_threshold: float
    brier: float
    ece: float


def best_f1(labels: np.ndarray, probabilities: np.ndarray) -> tuple[float, float]:
    """The highest F1 any threshold gives, and such a threshold, in the middle of the gap where it may lie.

    labels: (N,) 0 or 1. probabilities: (N,), N > 0. `probabilities >= threshold` has exactly this F1.
    """
    order = np.argsort(-probabilities, kind="stable")
    scores, truth = probabilities[order], labels[order]
    hits = np.cumsum(truth)
    f1 = 2 * hits / (np.arange(1, len(truth) + 1) + truth.sum())
    # A threshold can only lie between two distinct scores.
    f1[:-1][scores[:-1] == scores[1:]] = -1
    best = int(np.argmax(f1))
    above = scores[best]
    below = scores[best + 1] if best + 1 < len(scores) else above.dtype.type(0)
    middle = (above + below) / 2
    # Between neighbouring floats there is no middle: it rounds to one of them.
    return float(f1[best]), float(middle if middle > below else above)


def measure(labels: np.ndarray, probabilities: np.ndarray, threshold: float) -> Metrics:
    """All metrics of (N,) labels, both classes present, and (N,) probabilities at a threshold."""
    from sklearn.metrics import accuracy_score, brier_score_loss, f1_score

    labels = np.asarray(labels, dtype=np.int64)
    predicted = (probabilities >= threshold).astype(np.int64)
    highest, where = best_f1(labels, probabilities)
    return Metrics(
        pairs=len(labels),
        auc=roc_auc(labels, probabilities),
        threshold=float(threshold),
        f1=float(f1_score(labels, predicted)),
        accuracy=float(accuracy_score(labels, predicted)),
        best_f1=highest,
        best_threshold=where,
        brier=float(brier_score_loss(labels, probabilities)),
        ece=calibration_error(labels, probabilities),
    )


def calibration_error(labels: np.ndarray, probabilities: np.ndarray, bins: int = 15) -> float:
    """Expected calibration error of (N,) labels and probabilities over equal-width bins.

    The mean over all pairs of |share that is different - mean probability| of the pair's bin.
    Source: Guo et al. 2017, On calibration of modern neural networks, equation 3.
    """
    place = np.minimum((np.asarray(probabilities, np.float64) * bins).astype(np.int64), bins - 1)
    gaps = np.bincount(place, labels, bins) - np.bincount(place, probabilities, bins)
    return float(np.abs(gaps).sum() / len(labels))


def roc_auc(labels: np.ndarray, scores: np.ndarray) -> float:
    """Area under the ROC curve of (N,) labels, both classes present, and (N,) scores."""
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(labels, scores))


def log_loss(labels: np.ndarray, probabilities: np.ndarray, *, balanced: bool = False) -> float:
    """Binary cross-entropy of (N,) labels and probabilities, in nats a pair.

    balanced: both labels weigh alike, however many pairs they have.
    """
    from sklearn.metrics import log_loss as reference
    from sklearn.utils.class_weight import compute_sample_weight

    weights = compute_sample_weight("balanced", labels) if balanced else None
    return float(reference(labels, probabilities, labels=[0, 1], sample_weight=weights))


def equal_error(labels: np.ndarray, probabilities: np.ndarray) -> tuple[float, float]:
    """(rate, threshold) where false accept and false reject rate are nearest; the rate is their mean.

    labels: (N,) 0 or 1, both present. A false accept is a different pair below the threshold, a false
    reject a same pair at or above it.
    """
    from sklearn.metrics import roc_curve

    false_rejects, true_rejects, thresholds = roc_curve(labels, probabilities, drop_intermediate=False)
    gaps = np.abs(false_rejects - (1 - true_rejects))
    best = int(np.argmin(gaps))
    rate = float(false_rejects[best] + 1 - true_rejects[best]) / 2
    # Its first threshold is infinite: above every score.
    return rate, float(min(thresholds[best], 1.0))
