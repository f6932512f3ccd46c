"""Verification metrics; the positive class is 1, different, and a score is the probability of it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


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
    from sklearn.metrics import accuracy_score, brier_score_loss, f1_score, roc_auc_score

    labels = np.asarray(labels, dtype=np.int64)
    predicted = (probabilities >= threshold).astype(np.int64)
    highest, where = best_f1(labels, probabilities)
    return Metrics(
        pairs=len(labels),
        auc=float(roc_auc_score(labels, probabilities)),
        threshold=float(threshold),
        f1=float(f1_score(labels, predicted)),
        accuracy=float(accuracy_score(labels, predicted)),
        best_f1=highest,
        best_threshold=where,
        brier=float(brier_score_loss(labels, probabilities)),
    )
