"""Labelled pairs with their scores and a threshold, and every figure of them, perhaps weighted."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from batchverify.curve import Curve, Ranking
from batchverify.metrics import EXPECTED_FALSE_ACCEPTS

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
