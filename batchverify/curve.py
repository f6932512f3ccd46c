"""Counts of accepted pairs at every threshold, from pairs in the order of their scores, perhaps weighted."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# What rounding may add to a share: 0.1 * 30 is above 3.
SLACK = 1 + 1e-12


@dataclass(frozen=True)
class Ranking:
    """N labelled pairs in ascending order of their scores.

    order: (N,) int64, the pairs' places before. different: (N,) bool, in that order. last: (K,) int64, the
    place of the last pair of each distinct score. scores: (K,) float32 or float64, ascending.
    """

    order: np.ndarray
    different: np.ndarray
    last: np.ndarray
    scores: np.ndarray

    @classmethod
    def of(cls, truth: np.ndarray, scores: np.ndarray) -> Ranking:
        """Rank (N,) truths, 0 same or 1 different, by (N,) scores."""
        order = np.argsort(scores, kind="stable")
        ranked = scores[order]
        changes = np.flatnonzero(ranked[1:] != ranked[:-1])
        last = np.append(changes, len(ranked) - 1) if len(ranked) else changes
        return cls(order, truth[order] == 1, last, ranked[last])

    def curve(self, weights: np.ndarray | None = None) -> Curve:
        """The counts at every threshold. weights: (N,) by the pairs' places before the ranking; 1 by default."""
        if weights is None:
            below = np.arange(1, len(self.order) + 1, dtype=np.float64)
            false = np.cumsum(self.different, dtype=np.float64)
        else:
            ranked = weights[self.order]
            below = np.cumsum(ranked, dtype=np.float64)
            false = np.cumsum(ranked * self.different, dtype=np.float64)
        false = _from_zero(false[self.last])
        return Curve(self.scores, _from_zero(below[self.last]) - false, false)

    def place(self, threshold: float) -> int:
        """Where in a curve's arrays a threshold stands; compared in the scores' own precision."""
        return int(np.searchsorted(self.scores, self.scores.dtype.type(threshold), side="left"))


def _from_zero(counts: np.ndarray) -> np.ndarray:
    return np.concatenate([np.zeros(1), counts])


@dataclass(frozen=True)
class Curve:
    """What each threshold accepts, that is scores below it.

    scores: (K,) the thresholds, ascending; one more, above all scores, follows. same, different: (K + 1,)
    float64, accepted weight by the truth. A different pair accepted is a false accept.
    """

    scores: np.ndarray
    same: np.ndarray
    different: np.ndarray

    @property
    def totals(self) -> tuple[float, float]:
        """The weight of all same and of all different pairs."""
        return float(self.same[-1]), float(self.different[-1])

    @property
    def both(self) -> bool:
        """Whether there are pairs of both kinds."""
        return min(self.totals) > 0

    def false_accepts(self) -> np.ndarray:
        """(K + 1,) false accept rates."""
        return self.different / self.different[-1]

    def false_rejects(self) -> np.ndarray:
        """(K + 1,) false reject rates."""
        return (self.same[-1] - self.same) / self.same[-1]

    def threshold(self, place: int) -> float:
        """The threshold at a place; above all scores it is the next number."""
        if place < len(self.scores):
            return float(self.scores[place])
        return float(np.nextafter(self.scores[-1], self.scores.dtype.type(np.inf)))

    def auc(self) -> float:
        """Area under the ROC curve: the share of (same, different) couples in the right order, ties half."""
        same, different = self.totals
        means = (self.same[1:] + self.same[:-1]) / 2
        return float(np.diff(self.different) @ means / (same * different))

    def average_precision(self) -> float:
        """The mean precision over the different pairs found, from the highest score down; no interpolation."""
        same, different = self.totals
        found = different - self.different[:-1]
        rejected = found + same - self.same[:-1]
        precision = np.divide(found, rejected, out=np.zeros_like(found), where=rejected > 0)
        return float(np.diff(self.different) @ precision / different)

    def equal_error(self) -> tuple[float, float]:
        """(rate, threshold) where both error rates are nearest, of several the highest; the rate is their mean."""
        accepts, rejects = self.false_accepts(), self.false_rejects()
        gaps = np.abs(accepts - rejects)
        best = len(gaps) - 1 - int(np.argmin(gaps[::-1]))
        # Above all scores is 1, as `metrics.equal_error` has it.
        threshold = float(self.scores[best]) if best < len(self.scores) else 1.0
        return float(accepts[best] + rejects[best]) / 2, threshold

    def at_rate(self, rate: float) -> int:
        """The place of the highest threshold whose false accept rate is at most `rate`."""
        return int(np.searchsorted(self.different, rate * self.different[-1] * SLACK, side="right")) - 1

    def best_accuracy(self) -> float:
        """The threshold of the highest accuracy, in the middle of the gap where it may lie."""
        right = self.same + (self.different[-1] - self.different)
        best = int(np.argmax(right))
        if best == 0:
            return float(self.scores[0])
        if best == len(self.scores):
            return self.threshold(best)
        below, above = self.scores[best - 1], self.scores[best]
        middle = (below + above) / 2
        # Between neighbouring floats there is no middle: it rounds to one of them.
        return float(middle if middle > below else above)
