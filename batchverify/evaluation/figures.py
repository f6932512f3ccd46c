"""Metrics of labelled scores: curves over all thresholds, rates at one of them, calibration."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from batchverify.evaluation import field_figures
from batchverify.evaluation.document import Counts, Interval, Rate
from batchverify.heads.prior import BALANCED, shift

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
    "failure_rate": "failure rate",
    "far_with_failures": "false accept rate with failures",
    "frr_with_failures": "false reject rate with failures",
} | field_figures.NAMES
# Allowance for rounding: as floats, 0.1 * 30 is above 3.
SLACK = 1 + 1e-12
# A true accept rate is stated only if the different pairs would give this many false accepts.
EXPECTED_FALSE_ACCEPTS = 10


@dataclass(frozen=True)
class Tally:
    """Numbers or weights of labelled pairs: scored ones by truth, wrong verdicts, failed ones by truth."""

    same: float
    different: float
    false_accepts: float
    false_rejects: float
    same_failed: float
    different_failed: float

    def trials(self) -> dict[str, tuple[float, float]]:
        """(part, whole) of every figure that is a share of pairs. A failed pair is not accepted."""
        accepts, rejects = self.false_accepts, self.false_rejects
        hits, scored = self.different - accepts, self.same + self.different
        failed = self.same_failed + self.different_failed
        return {
            "far": (accepts, self.different),
            "frr": (rejects, self.same),
            "recall": (hits, self.different),
            "precision": (hits, hits + rejects),
            "accuracy": (hits + self.same - rejects, scored),
            "failure_rate": (failed, scored + failed),
            "far_with_failures": (accepts, self.different + self.different_failed),
            "frr_with_failures": (rejects + self.same_failed, self.same + self.same_failed),
        }


@dataclass(frozen=True)
class MeasuredPairs:
    """N labelled pairs.

    truth: (N,) integers, 0 same or 1 different. probability: (N,) float32 or float64, of different; NaN if not
    scored. A pair is called different if its probability is at or above the threshold, compared in its dtype.
    calibrated: False if these are other scores between 0 and 1; figures of probabilities are then NaN. assumed: the
    share of same pairs for which the probabilities are; likelihood ratios are what is left without it.
    """

    truth: np.ndarray
    probability: np.ndarray
    threshold: float
    calibrated: bool = True
    assumed: float = BALANCED

    def __len__(self) -> int:
        return len(self.truth)

    def subset(self, rows: np.ndarray) -> MeasuredPairs:
        """Some of the pairs. rows: (M,) indices or (N,) bool."""
        return replace(self, truth=self.truth[rows], probability=self.probability[rows])

    @cached_property
    def scored(self) -> np.ndarray:
        """(S,) int64, the indices of the pairs that have a probability."""
        return np.flatnonzero(~np.isnan(self.probability))

    @cached_property
    def failed(self) -> np.ndarray:
        """(N - S,) int64, the indices of the other pairs."""
        return np.flatnonzero(np.isnan(self.probability))

    @cached_property
    def ranking(self) -> Ranking:
        """The scored pairs in the order of their probabilities; `order` holds indices of all pairs."""
        ranking = Ranking.of(self.truth[self.scored], self.probability[self.scored])
        return Ranking(self.scored[ranking.order], ranking.different, ranking.last, ranking.scores)

    @cached_property
    def curve(self) -> Curve:
        """The counts at every threshold, unweighted."""
        return self.ranking.curve()

    @cached_property
    def calls(self) -> np.ndarray:
        """(N,) bool: called different; False if not scored."""
        return self.probability >= self.probability.dtype.type(self.threshold)

    @cached_property
    def bins(self) -> np.ndarray:
        """(S,) int64, the equal-width bin of each scored pair's probability."""
        return _bins(self.probability[self.scored], BINS)

    @cached_property
    def _losses(self) -> np.ndarray:
        """(S,) float64, the log loss of each scored pair."""
        return _log_losses(self.truth[self.scored], self.probability[self.scored])

    @cached_property
    def _spread_scores(self) -> np.ndarray:
        """(S,) float64, the log-odds of each scored pair; its score if that is no probability."""
        if not self.calibrated:
            return self.probability[self.scored].astype(np.float64)
        return field_figures.log_odds(self._at_even_odds)

    @cached_property
    def _at_even_odds(self) -> np.ndarray:
        """(S,) the probability of each scored pair if as many pairs were same as different."""
        known = self.probability[self.scored]
        return known if self.assumed == BALANCED else shift(known, BALANCED, self.assumed)

    @cached_property
    def _ratio_losses(self) -> np.ndarray:
        """(S,) float64, the log loss of each scored pair at even odds."""
        return _log_losses(self.truth[self.scored], self._at_even_odds)

    @cached_property
    def _residuals(self) -> np.ndarray:
        """(S,) float64, truth less probability of each scored pair."""
        return self.truth[self.scored] - self.probability[self.scored].astype(np.float64)

    def supported(self) -> list[float]:
        """The false accept rates at which the different pairs would give enough false accepts."""
        return [rate for rate in RATES if self.curve.totals[1] >= needed_pairs(rate)]

    def figures(self, weights: np.ndarray | None = None) -> dict[str, float]:
        """Every figure of `NAMES`, and `tar@RATE` for the supported rates; NaN if undefined.

        weights: (N,) of the pairs, 1 by default. The thresholds of the rates follow the weights, too, but that of
        ZeroFMR.
        """
        curve = self.curve if weights is None else self.ranking.curve(weights)
        trials = self.tally(curve, weights).trials()
        figures = dict.fromkeys(NAMES, math.nan) | {name: _share(*trial) for name, trial in trials.items()}
        if sum(curve.totals) > 0 and self.calibrated:
            figures |= self._errors(weights)
        if not curve.both:
            return figures | {"precision": math.nan}
        # 0 if no pair is called different, as in scikit-learn.
        figures["precision"] = _share(*trials["precision"], 0.0)
        (hits, different), (_, called) = trials["recall"], trials["precision"]
        figures["f1"] = 2 * hits / (different + called)
        figures["auc"], figures["average_precision"] = curve.auc(), curve.average_precision()
        figures["equal_error"] = curve.equal_error()[0]
        for rate in self.supported():
            figures[rate_name(rate)] = float(curve.same[curve.at_rate(rate)] / curve.totals[0])
        return figures | self._field_figures(curve, weights)

    def rate_trials(self) -> dict[str, tuple[float, float]]:
        """(accepted same pairs, all) at each supported rate, by `tar@RATE`; (rejected ones, all) at the points."""
        curve = self.curve
        if not curve.both:
            return {}
        same = curve.totals[0]
        accepted = {rate_name(rate): (float(curve.same[curve.at_rate(rate)]), same) for rate in self.supported()}
        return accepted | {name: (rejected, same) for name, rejected in self._points(curve).items()}

    def tally(self, curve: Curve | None = None, weights: np.ndarray | None = None) -> Tally:
        """Scored pairs, wrong verdicts at the threshold, and failed pairs. curve: that of the weights."""
        curve = curve or self.curve
        index, (same, different) = self.ranking.index(self.threshold), curve.totals
        failed_weights = None if weights is None else weights[self.failed]
        same_failed, different_failed = np.bincount(self.truth[self.failed], failed_weights, 2).tolist()
        accepts, rejects = float(curve.different[index]), same - float(curve.same[index])
        return Tally(same, different, accepts, rejects, same_failed, different_failed)

    def counts(self) -> Counts:
        """The tally as whole numbers."""
        return {name: int(count) for name, count in vars(self.tally()).items()}

    def _points(self, curve: Curve) -> dict[str, float]:
        """The rejected same pairs at each operating point that the different pairs support."""
        points = field_figures.POINTS.items()
        known = [(name, rate) for name, rate in points if not rate or rate in self.supported()]
        # The lowest score of different pairs is of this sample alone: a draw that lacks it says nothing about it.
        places = {name: (curve if rate else self.curve).at_rate(rate) for name, rate in known}
        return {name: curve.totals[0] - float(curve.same[place]) for name, place in places.items()}

    def _field_figures(self, curve: Curve, weights: np.ndarray | None) -> dict[str, float]:
        """The figures of `field_figures`; needs weight on pairs of both kinds."""
        tally = self.tally(curve, weights)
        verdicts = (tally.same, tally.different, tally.false_accepts, tally.false_rejects)
        heavy = np.ones(len(self.scored)) if weights is None else weights[self.scored].astype(np.float64)
        different = heavy * (self.truth[self.scored] == 1)
        same = heavy - different
        return {
            "mcc": field_figures.matthews(*verdicts),
            "hter": (tally.false_accepts / tally.different + tally.false_rejects / tally.same) / 2,
            "d_prime": field_figures.decidability(same, different, self._spread_scores),
            "cllr": field_figures.cost_of_log_ratios(self._ratio_losses, same, different)
            if self.calibrated
            else math.nan,
            "min_cllr": field_figures.minimum_cost(np.diff(curve.same), np.diff(curve.different)),
            **{name: rejected / tally.same for name, rejected in self._points(curve).items()},
        }

    def _errors(self, weights: np.ndarray | None) -> dict[str, float]:
        """Log loss, Brier score and calibration error."""
        heavy = np.ones(len(self.scored)) if weights is None else weights[self.scored].astype(np.float64)
        total, residuals = float(heavy.sum()), heavy * self._residuals
        return {
            "log_loss": float(heavy @ self._losses) / total,
            "brier": float(residuals @ self._residuals) / total,
            "ece": _binned_gap(self.bins, residuals) / total,
        }


def needed_pairs(rate: float) -> int:
    """The different pairs that a false accept rate needs, for ten expected false accepts."""
    return round(EXPECTED_FALSE_ACCEPTS / rate)


def rate_name(rate: float) -> str:
    """The name of the true accept rate at a false accept rate, `tar@1e-3`."""
    return f"tar@1e-{round(-math.log10(rate))}"


def rate_table(pairs: MeasuredPairs, intervals: Mapping[str, Interval]) -> list[Rate]:
    """A row for each of `RATES`: true accept rate and threshold, or the reason why there are none."""
    curve, counts, rows = pairs.curve, pairs.counts(), []
    for rate in RATES:
        reason = _missing_pairs(counts, rate)
        index = curve.at_rate(rate) if reason is None else None
        row: Rate = {
            "far": rate,
            "supported": reason is None,
            "reason": reason,
            "pairs": counts["different"],
            "needed": needed_pairs(rate),
            "tar": float(curve.same[index] / curve.totals[0]) if index is not None else None,
            "threshold": curve.threshold(index) if index is not None else None,
            "interval": intervals.get(rate_name(rate)),
        }
        rows.append(row)
    return rows


def _missing_pairs(counts: Counts, rate: float) -> str | None:
    """The pairs that a true accept rate needs and that are missing."""
    needed = needed_pairs(rate)
    if counts["different"] < needed:
        scored = "scored " if counts["different_failed"] else ""
        return f"needs {needed:,} {scored}different pairs, {counts['different']:,} available"
    scored = "scored " if counts["same_failed"] else ""
    return None if counts["same"] else f"needs {scored}same pairs"


def _share(part: float, whole: float, otherwise: float = math.nan) -> float:
    return float(part / whole) if whole else otherwise


@dataclass(frozen=True)
class Ranking:
    """N labelled pairs in ascending order of their scores.

    order: (N,) int64, the pairs' indices before the ranking. different: (N,) bool, in that order. last: (K,)
    int64, the rank of the last pair of each distinct score. scores: (K,) float32 or float64, ascending.
    """

    order: np.ndarray
    different: np.ndarray
    last: np.ndarray
    scores: np.ndarray

    @classmethod
    def of(cls, truth: np.ndarray, scores: np.ndarray) -> Ranking:
        """Rank (N,) labels, 0 same or 1 different, by (N,) scores."""
        order = np.argsort(scores, kind="stable")
        ranked = scores[order]
        changes = np.flatnonzero(ranked[1:] != ranked[:-1])
        last = np.append(changes, len(ranked) - 1) if len(ranked) else changes
        return cls(order, truth[order] == 1, last, ranked[last])

    def curve(self, weights: np.ndarray | None = None) -> Curve:
        """The counts at every threshold. weights: (N,) in the pairs' order before the ranking; 1 by default."""
        ranked = np.ones(len(self.order)) if weights is None else weights[self.order]
        below = np.cumsum(ranked, dtype=np.float64)
        false = np.cumsum(ranked * self.different, dtype=np.float64)
        false = _from_zero(false[self.last])
        return Curve(self.scores, _from_zero(below[self.last]) - false, false)

    def index(self, threshold: float) -> int:
        """The index of a threshold in a curve's arrays, compared in the dtype of the scores."""
        return int(np.searchsorted(self.scores, self.scores.dtype.type(threshold), side="left"))


def _from_zero(counts: np.ndarray) -> np.ndarray:
    return np.concatenate([np.zeros(1), counts])


@dataclass(frozen=True)
class Curve:
    """The pairs that each threshold accepts, which are those with scores below it.

    scores: (K,) the thresholds, ascending; one more, above all scores, follows. same, different: (K + 1,)
    float64, the accepted weight by truth. An accepted different pair is a false accept.
    """

    scores: np.ndarray
    same: np.ndarray
    different: np.ndarray

    @classmethod
    def of(cls, truth: np.ndarray, scores: np.ndarray) -> Curve:
        """The curve of (N,) labels, 0 same or 1 different, and (N,) scores; each pair counts once."""
        return Ranking.of(truth, scores).curve()

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

    def threshold(self, index: int) -> float:
        """The threshold at an index; the last one is the next float above all scores."""
        if index < len(self.scores):
            return float(self.scores[index])
        return float(np.nextafter(self.scores[-1], self.scores.dtype.type(np.inf)))

    def auc(self) -> float:
        """Area under the ROC curve: the share of (same, different) couples in the right order; ties count half."""
        same, different = self.totals
        means = (self.same[1:] + self.same[:-1]) / 2
        return float(np.diff(self.different) @ means / (same * different))

    def average_precision(self) -> float:
        """The mean precision over the different pairs, from the highest score down; no interpolation."""
        same, different = self.totals
        hits = different - self.different[:-1]
        called = hits + same - self.same[:-1]
        precision = np.divide(hits, called, out=np.zeros_like(hits), where=called > 0)
        return float(np.diff(self.different) @ precision / different)

    def equal_error(self) -> tuple[float, float]:
        """(rate, threshold): the mean of the two error rates where they are nearest; the highest such threshold."""
        accepts, rejects = self.false_accepts(), self.false_rejects()
        gaps = np.abs(accepts - rejects)
        best = len(gaps) - 1 - int(np.argmin(gaps[::-1]))
        # Above all scores the threshold is 1.
        threshold = float(self.scores[best]) if best < len(self.scores) else 1.0
        return float(accepts[best] + rejects[best]) / 2, threshold

    def at_rate(self, rate: float) -> int:
        """The index of the highest threshold whose false accept rate is at most `rate`."""
        return int(np.searchsorted(self.different, rate * self.different[-1] * SLACK, side="right")) - 1

    def best_accuracy(self) -> float:
        """The lowest threshold of the highest accuracy, halfway between two scores."""
        right = self.same + (self.different[-1] - self.different)
        best = int(np.argmax(right))
        if best == len(self.scores):
            return self.threshold(best)
        return _halfway(self.scores[max(best - 1, 0)], self.scores[best])

    def best_f1(self) -> tuple[float, float]:
        """(F1, threshold): the highest F1 and its highest threshold, halfway between two scores.

        Needs at least one different pair. `scores >= threshold` has exactly this F1.
        """
        hits = self.different[-1] - self.different[:-1]
        called = hits + self.same[-1] - self.same[:-1]
        f1 = 2 * hits / (called + self.different[-1])
        best = len(f1) - 1 - int(np.argmax(f1[::-1]))
        below = self.scores[best - 1] if best else self.scores.dtype.type(0)
        return float(f1[best]), _halfway(below, self.scores[best])


def _halfway(below: np.floating, above: np.floating) -> float:
    """The middle between two scores; the upper one if rounding leaves nothing between them."""
    # NumPy 1 divides in float64.
    middle = below.dtype.type((below + above) / 2)
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


def measure(labels: np.ndarray, probabilities: np.ndarray, threshold: float) -> Metrics:
    """All metrics of (N,) labels, both classes present, and (N,) probabilities at a threshold."""
    pairs = MeasuredPairs(np.asarray(labels, np.int64), probabilities, threshold)
    figures, (best_f1, best_threshold) = pairs.figures(), pairs.curve.best_f1()
    return Metrics(
        pairs=len(pairs),
        threshold=float(threshold),
        best_f1=best_f1,
        best_threshold=best_threshold,
        **{name: figures[name] for name in ("auc", "f1", "accuracy", "brier", "ece")},
    )


def calibration_error(labels: np.ndarray, probabilities: np.ndarray, bins: int = BINS) -> float:
    """Expected calibration error of (N,) labels and probabilities over equal-width bins.

    The mean over all pairs of |share that is different - mean probability| of the pair's bin.
    Source: Guo et al. 2017, On calibration of modern neural networks, equation 3.
    """
    residuals = labels - np.asarray(probabilities, np.float64)
    return _binned_gap(_bins(probabilities, bins), residuals) / len(labels)


def balanced_log_loss(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Binary cross-entropy of (N,) labels and probabilities, in nats a pair.

    Both labels have the same weight, whatever their numbers of pairs.
    """
    losses = _log_losses(labels, probabilities)
    return float(np.mean([losses[labels == label].mean() for label in np.unique(labels)]))


def _log_losses(labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """(N,) float64, the log loss of each pair, clipped as scikit-learn does."""
    p, tiny = np.asarray(probabilities, np.float64), np.finfo(np.float64).eps
    return -np.log(np.clip(np.where(labels == 1, p, 1 - p), tiny, 1 - tiny))


def _bins(probabilities: np.ndarray, bins: int) -> np.ndarray:
    """(N,) int64, the equal-width bin of each probability; the last one includes 1."""
    return np.minimum((np.asarray(probabilities, np.float64) * bins).astype(np.int64), bins - 1)


def _binned_gap(bins: np.ndarray, residuals: np.ndarray) -> float:
    """The sum over bins of the size of the bin's summed residuals."""
    return float(np.abs(np.bincount(bins, residuals)).sum())
