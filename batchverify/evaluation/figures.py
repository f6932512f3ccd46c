"""Figures of labelled scores: rates at a threshold, curves, calibration, each in one place."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

RATES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
BINS = 15
NAMES = {
    "auc": "ROC AUC",
    "f1": "F1",
    "precision": "precision",
    "recall": "recall",
    "accuracy": "accuracy",
    "far": "false accept rate",
    "frr": "false reject rate",
    "equal_error": "equal error rate",
    "average_precision": "average precision",
    "log_loss": "log loss",
    "brier": "Brier score",
    "ece": "calibration error",
    "failure_rate": "failure to enrol",
    "far_with_failures": "false accepts of all different pairs",
    "frr_with_failures": "false rejects and failures of all same pairs",
}
# What rounding may add to a share: 0.1 * 30 is above 3.
SLACK = 1 + 1e-12
# A false accept rate is only stated when the different pairs behind it would give so many false accepts.
EXPECTED_FALSE_ACCEPTS = 10


@dataclass(frozen=True)
class MeasuredPairs:
    """N pairs whose truth is known.

    truth: (N,) int8, 0 same or 1 different. probability: (N,) float32 of different, NaN where not scored.
    A pair is called different where its probability is at or above the threshold, as float32.
    """

    truth: np.ndarray
    probability: np.ndarray
    threshold: float

    def __len__(self) -> int:
        return len(self.truth)

    @cached_property
    def scored(self) -> np.ndarray:
        """(S,) int64, the places of the pairs that have a probability."""
        return np.flatnonzero(~np.isnan(self.probability))

    @cached_property
    def failed(self) -> np.ndarray:
        """(N - S,) int64, the places of the others."""
        return np.flatnonzero(np.isnan(self.probability))

    @cached_property
    def ranking(self) -> Ranking:
        """The scored pairs in the order of their probabilities; places are of all pairs."""
        ranking = Ranking.of(self.truth[self.scored], self.probability[self.scored])
        return Ranking(self.scored[ranking.order], ranking.different, ranking.last, ranking.scores)

    @cached_property
    def curve(self) -> Curve:
        """The counts at every threshold, each pair once."""
        return self.ranking.curve()

    @cached_property
    def calls(self) -> np.ndarray:
        """(N,) bool: called different; false where not scored."""
        return self.probability >= np.float32(self.threshold)

    @cached_property
    def _losses(self) -> tuple[np.ndarray, np.ndarray]:
        """Log loss and squared error of each scored pair, (S,) float64, as scikit-learn clips the former."""
        p, y = self.probability[self.scored].astype(np.float64), self.truth[self.scored]
        tiny = np.finfo(np.float64).eps
        right = np.clip(np.where(y == 1, p, 1 - p), tiny, 1 - tiny)
        return -np.log(right), (p - y) ** 2

    @cached_property
    def bins(self) -> np.ndarray:
        """(S,) int64: which of the equal-width bins of probability each scored pair falls into."""
        p = self.probability[self.scored].astype(np.float64)
        return np.minimum((p * BINS).astype(np.int64), BINS - 1)

    @cached_property
    def _gaps(self) -> np.ndarray:
        """(S,) float64: truth less probability."""
        return self.truth[self.scored] - self.probability[self.scored].astype(np.float64)

    def supported(self) -> list[float]:
        """The false accept rates at which the different pairs would give enough false accepts to count."""
        return [rate for rate in RATES if self.curve.totals[1] >= needed_pairs(rate)]

    def figures(self, weights: np.ndarray | None = None) -> dict[str, float]:
        """Every figure by its name in `NAMES`, and `tar@RATE` for the rates supported; NaN where undefined.

        weights: (N,) of the pairs, 1 by default; thresholds of rates are found under the weights, too.
        """
        curve = self.curve if weights is None else self.ranking.curve(weights)
        found = dict.fromkeys(NAMES, math.nan) | self._failures(curve, weights)
        if sum(curve.totals) > 0:
            found |= self._errors(weights)
        found |= self._verdicts(curve)
        if curve.both:
            found["auc"], found["average_precision"] = curve.auc(), curve.average_precision()
            found["equal_error"] = curve.equal_error()[0]
            for rate in self.supported():
                found[rate_name(rate)] = float(curve.same[curve.at_rate(rate)] / curve.totals[0])
        return found

    def rate_trials(self) -> dict[str, tuple[float, float]]:
        """(same pairs accepted, same pairs) at each false accept rate supported, by `tar@RATE`."""
        curve = self.curve
        rates = self.supported() if curve.both else []
        return {rate_name(rate): (float(curve.same[curve.at_rate(rate)]), curve.totals[0]) for rate in rates}

    def counts(self) -> dict[str, int]:
        """Right and wrong verdicts at the threshold, and what could not be scored."""
        curve, at = self.curve, self.ranking.place(self.threshold)
        same, different = curve.totals
        lost = np.bincount(self.truth[self.failed], minlength=2)
        counts = {
            "same": same,
            "different": different,
            "false_accepts": curve.different[at],
            "false_rejects": same - curve.same[at],
            "same_failed": lost[0],
            "different_failed": lost[1],
        }
        return {name: int(count) for name, count in counts.items()}

    def _verdicts(self, curve: Curve) -> dict[str, float]:
        """What follows from the four counts at the threshold."""
        at = self.ranking.place(self.threshold)
        same, different = curve.totals
        accepts, rejects = float(curve.different[at]), same - float(curve.same[at])
        hits = different - accepts
        both = {}
        if same and different:
            # With one kind of pair either says nothing. As scikit-learn has it: where nothing is called
            # different they are 0.
            both["f1"] = _share(2 * hits, 2 * hits + accepts + rejects, 0.0)
            both["precision"] = _share(hits, hits + rejects, 0.0)
        return both | {
            "recall": _share(hits, different),
            "accuracy": _share(hits + same - rejects, same + different),
            "far": _share(accepts, different),
            "frr": _share(rejects, same),
        }

    def _failures(self, curve: Curve, weights: np.ndarray | None) -> dict[str, float]:
        """Failures as a rate of their own, and among the errors: a pair not scored is not accepted."""
        at = self.ranking.place(self.threshold)
        same, different = curve.totals
        heavy = None if weights is None else weights[self.failed]
        lost_same, lost_different = np.bincount(self.truth[self.failed], heavy, 2)
        rejects = same - float(curve.same[at]) + lost_same
        lost = float(lost_same + lost_different)
        return {
            "failure_rate": _share(lost, same + different + lost),
            "far_with_failures": _share(float(curve.different[at]), different + lost_different),
            "frr_with_failures": _share(rejects, same + lost_same),
        }

    def _errors(self, weights: np.ndarray | None) -> dict[str, float]:
        """Log loss, Brier score and calibration error of probabilities."""
        heavy = np.ones(len(self.scored)) if weights is None else weights[self.scored].astype(np.float64)
        total = float(heavy.sum())
        losses, squares = self._losses
        gaps = np.bincount(self.bins, heavy * self._gaps, BINS)
        return {
            "log_loss": float(heavy @ losses) / total,
            "brier": float(heavy @ squares) / total,
            "ece": float(np.abs(gaps).sum()) / total,
        }


def needed_pairs(rate: float) -> int:
    """How many different pairs a false accept rate takes: so many give ten false accepts."""
    return round(EXPECTED_FALSE_ACCEPTS / rate)


def rate_name(rate: float) -> str:
    """The name of the true accept rate at a false accept rate, `tar@1e-3`."""
    return f"tar@1e-{round(-math.log10(rate))}"


def rate_table(pairs: MeasuredPairs, intervals: Mapping[str, tuple[float, float]]) -> list[dict[str, Any]]:
    """A row for each of `RATES`: true accept rate and threshold, or the reason why there are none."""
    curve, rows = pairs.curve, []
    for rate in RATES:
        row: dict[str, Any] = {
            "far": rate,
            "supported": False,
            "reason": _lacking(pairs, rate),
            "pairs": int(curve.totals[1]),
            "needed": needed_pairs(rate),
        }
        row |= {"tar": None, "threshold": None, "interval": None}
        if row["reason"] is None:
            place = curve.at_rate(rate)
            tar = float(curve.same[place] / curve.totals[0])
            row |= {"supported": True, "tar": tar, "threshold": curve.threshold(place)}
            row["interval"] = intervals.get(rate_name(rate))
        rows.append(row)
    return rows


def _lacking(pairs: MeasuredPairs, rate: float) -> str | None:
    """What a true accept rate needs that is not there."""
    counts, needed = pairs.counts(), needed_pairs(rate)
    same, different = ("scored " if counts[f"{kind}_failed"] else "" for kind in ("same", "different"))
    if counts["different"] < needed:
        return f"needs {needed:,} {different}different pairs, here {counts['different']:,}"
    return None if counts["same"] else f"needs {same}same pairs"


def _share(part: float, whole: float, otherwise: float = math.nan) -> float:
    return float(part / whole) if whole else otherwise


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
