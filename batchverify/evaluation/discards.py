"""Error versus discard: the error rates that remain once the pairs of worst quality are discarded.

Sources: Grother and Tabassi 2007, Performance of biometric quality measures, section 4; ISO/IEC 29794-1, where the
curve is called the error-versus-discard characteristic.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from batchverify.evaluation.bootstrap import Span, each_draw, span_of
from batchverify.evaluation.document import AtRate, Discards, Wanted
from batchverify.evaluation.figures import RATES as FALSE_MATCH_RATES
from batchverify.evaluation.figures import MeasuredPairs, needed_pairs
from batchverify.evaluation.qualities import Quality
from batchverify.evaluation.scores import Scores
from batchverify.heads.prior import Units

# The shares of the pairs that are discarded.
SHARES = np.arange(51) / 100
# False non-match rates of the table, those below the rate without discards.
WANTED = (0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001)
# No error among 3 / X pairs shows a rate below X with confidence of 95 %. Source: ISO/IEC 19795-1, the rule of 3.
RULE_OF_3 = 3


def measure_discards(
    quality: Quality,
    scores: Scores,
    units: Units | None,
    wanted: Sequence[float],
    *,
    draws: int,
    seed: int = 0,
) -> Discards:
    """The curves over one column, of the labelled and scored pairs that have a quality.

    units: of all N pairs, None for no intervals. wanted: false non-match rates to look for as well.
    """
    sample = DiscardSample.of(quality, scores)
    rows = sample.rows
    drawn = np.zeros((0, 4, len(SHARES)))
    if units is not None and draws and len(rows):
        inside = units.subset(rows)
        drawn = np.stack(each_draw(inside, sample.kept, draws=draws, seed=seed))
    kept = sample.kept()
    fnmr, fmr = rates(kept)
    drawn_fnmr, drawn_fmr = rates(drawn)
    cuts, spans = sample.cuts(), {"fnmr": _spans(drawn_fnmr), "fmr": _spans(drawn_fmr)}
    # In descending order.
    rows_wanted = sorted({*wanted, *(rate for rate in WANTED if rate < fnmr[0])}, reverse=True)
    return {
        "column": quality.name,
        "values": list(quality.columns),
        "bad": "high" if quality.high_is_bad else "low",
        "pairs": len(rows),
        "without": sample.without,
        "shares": SHARES.tolist(),
        "cuts": cuts.tolist(),
        "same": kept[0].tolist(),
        "different": kept[2].tolist(),
        "fnmr": fnmr.tolist(),
        "fmr": fmr.tolist(),
        "intervals": spans,
        "at_fmr": sample.at_rate(),
        "area": float(area(fnmr)),
        "area_over_random": float(over_random(fnmr)),
        "area_interval": span_of(over_random(drawn_fnmr)),
        "wanted": [_find_wanted(each, fnmr, drawn_fnmr, kept[0], cuts) for each in rows_wanted],
    }


@dataclass(frozen=True)
class DiscardSample:
    """M labelled and scored pairs that have a quality.

    rows: (M,) int64, their indices among all N. without: how many others lack a quality. badness: (M,) float64, the
    highest is discarded first. quality: (M,) float64. pairs: their truth and probabilities.
    """

    rows: np.ndarray
    without: int
    badness: np.ndarray
    quality: np.ndarray
    pairs: MeasuredPairs

    @classmethod
    def of(cls, quality: Quality, scores: Scores) -> DiscardSample:
        """The pairs of a run that the curve is made of; a pair without a quality is kept apart, not discarded."""
        labelled = scores.labelled_pairs()
        rows = scores.labelled[labelled.scored]
        has = ~np.isnan(quality.values[rows])
        rows, chosen = rows[has], labelled.scored[has]
        values = quality.values[rows]
        return cls(rows, int((~has).sum()), quality.badness[rows], values, labelled.subset(chosen))

    @cached_property
    def _order(self) -> np.ndarray:
        """(M,) int64: the pairs from the worst to the best."""
        return np.argsort(-self.badness, kind="stable")

    @cached_property
    def _last(self) -> np.ndarray:
        """(K,) int64: the rank of the last pair of each distinct quality."""
        ranked = self.badness[self._order]
        return np.append(np.flatnonzero(ranked[1:] != ranked[:-1]), len(ranked) - 1)[: len(ranked)]

    @cached_property
    def _kinds(self) -> tuple[np.ndarray, ...]:
        """Masks (M,) in the order of discarding: same, same called different, different, different called same."""
        truth, calls = self.pairs.truth[self._order] == 1, self.pairs.calls[self._order]
        return ~truth, ~truth & calls, truth, truth & ~calls

    def kept(self, weights: np.ndarray | None = None) -> np.ndarray:
        """(4, S) float64: the pairs of `_kinds` that remain at each share. weights: (M,), 1 by default.

        Of pairs of equal quality a part is discarded as if drawn at random: kinds go in proportion.
        """
        ranked = np.ones(len(self.rows)) if weights is None else weights[self._order].astype(np.float64)
        every = self._sums(ranked)
        amounts = SHARES * every[-1]
        sums = (self._sums(ranked * kind) for kind in self._kinds)
        return np.stack([each[-1] - np.interp(amounts, every, each) for each in sums])

    def _sums(self, ranked: np.ndarray) -> np.ndarray:
        """(K + 1,) the weight of the worst pairs, at the ends of blocks of equal quality."""
        return np.concatenate([np.zeros(1), np.cumsum(ranked)[self._last]])

    def cuts(self) -> np.ndarray:
        """(S,) float64: the quality at each share: worse pairs are discarded, of equal ones perhaps a part."""
        if not len(self.rows):
            return np.full(len(SHARES), math.nan)
        return self.quality[self._order[np.floor(SHARES * len(self.rows) + 1e-9).astype(np.int64)]]

    def at_rate(self) -> AtRate | None:
        """False non-match rates at the lowest false match rate that half of the different pairs support.

        The threshold of each share is that of the pairs that remain. None if the pairs support no rate.
        """
        different = self.kept()[2].min()
        supported = [rate for rate in FALSE_MATCH_RATES if different >= needed_pairs(rate)]
        if not supported or not self.pairs.curve.both:
            return None
        rate = supported[-1]
        points = [self._at(rate, share) for share in SHARES.tolist()]
        fnmr, threshold = (list(each) for each in zip(*points, strict=True))
        return {"fmr": rate, "fnmr": fnmr, "threshold": threshold}

    def _at(self, rate: float, share: float) -> tuple[float, float]:
        curve = self.pairs.ranking.curve(self.remaining(share))
        if not curve.both:
            return math.nan, math.nan
        index = curve.at_rate(rate)
        return float(curve.false_rejects()[index]), curve.threshold(index)

    def remaining(self, share: float) -> np.ndarray:
        """(M,) float64: 0 for discarded pairs, 1 for others, and of equal pairs at the cut the part that remains."""
        ends = np.append(0, self._last + 1)
        parts = np.clip((ends[1:] - share * len(self.rows)) / np.diff(ends), 0, 1)
        weights = np.empty(len(self.rows))
        weights[self._order] = np.repeat(parts, np.diff(ends))
        return weights


def rates(kept: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(..., S) false non-match and false match rates of (..., 4, S) pairs that remain; NaN without pairs."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return kept[..., 1, :] / kept[..., 0, :], kept[..., 3, :] / kept[..., 2, :]


def area(fnmr: np.ndarray) -> np.ndarray:
    """The area under (..., S) false non-match rates, by trapezoids."""
    return ((fnmr[..., 1:] + fnmr[..., :-1]) / 2 * np.diff(SHARES)).sum(axis=-1)


def over_random(fnmr: np.ndarray) -> np.ndarray:
    """The area over that of a quality that says nothing, whose curve stays where it starts; NaN without errors."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return area(fnmr) / (fnmr[..., 0] * SHARES[-1])


def _spans(drawn: np.ndarray) -> list[Span | None]:
    return [span_of(values) for values in drawn.T] if len(drawn) else [None] * len(SHARES)


def _find_wanted(rate: float, fnmr: np.ndarray, drawn: np.ndarray, same: np.ndarray, cuts: np.ndarray) -> Wanted:
    """The least share at which the false non-match rate is at most `rate`. same: (S,) same pairs that remain."""
    found: Wanted = {"fnmr": rate, "share": None, "interval": None, "cut": None, "reason": None}
    at = int(np.argmax(fnmr <= rate))
    needed = math.ceil(RULE_OF_3 / rate)
    if np.isnan(fnmr[0]):
        found["reason"] = "needs same pairs"
    elif fnmr[at] > rate or np.isnan(fnmr[at]):
        found["reason"] = f"not reached by discarding {SHARES[-1]:.0%}"
    elif same[at] < needed:
        found["reason"] = f"{needed:,} same pairs must remain, and {math.floor(same[at]):,} do"
    else:
        reached = drawn <= rate
        least = np.where(reached.any(axis=-1), SHARES[reached.argmax(axis=-1)], math.inf)
        found |= {
            "share": float(SHARES[at]),
            "cut": float(cuts[at]) if at else None,
            "interval": span_of(least),
        }
    return found
