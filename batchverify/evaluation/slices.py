"""Figures per value of a column, and the protocol of k folds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa

from batchverify.evaluation.bootstrap import Span, Units, bootstrap, honest
from batchverify.evaluation.figures import NAMES, MeasuredPairs
from batchverify.evaluation.scores import UNKNOWN, Scores
from batchverify.manifest.columns import cell_names

# Of a column with more values the rarer ones are taken together.
MOST_SLICES = 50
OTHERS = "(all others)"
BLANK = "(blank)"
LEVEL = 0.05
RATES = ("far", "frr")
FOLD = "fold"
FIGURES = ("accuracy", "f1", "auc", "equal_error", "far", "frr")


@dataclass(frozen=True)
class Slice:
    """One value's pairs.

    figures: as of `MeasuredPairs.figures`, NaN without truth. intervals: of `far` and `frr`; exact: which of
    them are no bootstrap's but binomial bounds. marks: `far` or `frr` to `higher` or `lower`.
    """

    name: str
    counts: dict[str, int]
    figures: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, Span] = field(default_factory=dict)
    exact: list[str] = field(default_factory=list)
    marks: dict[str, str] = field(default_factory=dict)


def slice_codes(cells: pa.ChunkedArray) -> tuple[np.ndarray, tuple[str, ...]]:
    """(N,) int32 numbers of the slices and their names: numbers ascending, other values by their frequency."""
    encoded = cells.combine_chunks()
    if not pa.types.is_dictionary(encoded.type):
        encoded = encoded.dictionary_encode()
    blank = len(encoded.dictionary)
    codes = encoded.indices.fill_null(blank).to_numpy()
    texts = [*(BLANK if _blank(each) else str(each) for each in encoded.dictionary.to_pylist()), BLANK]
    names = list(dict.fromkeys(texts))
    numbers = {name: number for number, name in enumerate(names)}
    codes = np.array([numbers[text] for text in texts], np.int32)[codes]
    counts = np.bincount(codes, minlength=len(names))
    order = [each for each in np.argsort(-counts, kind="stable").tolist() if counts[each]]
    kept = _ascending(order[:MOST_SLICES], names)
    place = np.full(len(names), len(kept), np.int32)
    place[kept] = np.arange(len(kept))
    shown = [names[each] for each in kept] + ([OTHERS] if len(order) > len(kept) else [])
    return place[codes], tuple(shown)


def _ascending(kept: list[int], names: Sequence[str]) -> list[int]:
    """The same slices by their numbers, blank last; unchanged where one is no number."""
    try:
        return sorted(kept, key=lambda each: math.inf if names[each] == BLANK else float(names[each]))
    except ValueError:
        return kept


def _blank(value: Any) -> bool:
    """Nothing, or NaN, as pandas writes a blank among numbers."""
    return value in (None, "") or value != value


def measure_slices(
    scores: Scores, cells: pa.ChunkedArray, units: Units | None, *, draws: int, seed: int
) -> list[Slice]:
    """Measure every value of a column with (N,) cells; units: of all N pairs, None for no bootstrap."""
    codes, names = slice_codes(cells)
    rows = scores.labelled
    pairs = MeasuredPairs(scores.truth[rows], scores.probability[rows], scores.threshold)
    rates = _Rates(pairs, codes[rows], len(names))
    spans = rates.spans(units.subset(rows), draws, seed) if units and draws else None
    marks = rates.marks(spans)
    return [
        Slice(
            name,
            _counts(scores, codes == code),
            _figures(pairs, codes[rows] == code),
            *rates.intervals(code, spans or {}),
            marks[code],
        )
        for code, name in enumerate(names)
    ]


def _counts(scores: Scores, chosen: np.ndarray) -> dict[str, int]:
    truth, scored = scores.truth[chosen], scores.scored[chosen]
    return {
        "pairs": len(truth),
        "failed": int((~scored).sum()),
        "called_different": int(scores.calls[chosen].sum()),
        "same": int((scored & (truth == 0)).sum()),
        "different": int((scored & (truth == 1)).sum()),
        "unknown": int((truth == UNKNOWN).sum()),
    }


def _figures(pairs: MeasuredPairs, chosen: np.ndarray) -> dict[str, float]:
    if not chosen.any():
        return dict.fromkeys(NAMES, math.nan)
    return MeasuredPairs(pairs.truth[chosen], pairs.probability[chosen], pairs.threshold).figures()


class _Rates:
    """The error rates of slices: their intervals, and whether they differ from those of all other pairs.

    Fisher's exact test with Holm's correction for the number of slices; it takes pairs for independent, so
    the bootstrap's interval of the difference must exclude 0, too, where there is a bootstrap.
    """

    def __init__(self, pairs: MeasuredPairs, codes: np.ndarray, slices: int) -> None:
        self._codes, self._slices = codes, slices
        scored = ~np.isnan(pairs.probability)
        self._trials = {"far": scored & (pairs.truth == 1), "frr": scored & (pairs.truth == 0)}
        self._wrong = {
            "far": self._trials["far"] & ~pairs.calls,
            "frr": self._trials["frr"] & pairs.calls,
        }

    def spans(self, units: Units, draws: int, seed: int) -> Mapping[str, Span]:
        """The bootstrap's intervals of what `_measure` gives. units: of the pairs."""
        return bootstrap(units, self._measure, draws=draws, seed=seed).spans

    def intervals(self, code: int, spans: Mapping[str, Span]) -> tuple[dict[str, Span], list[str]]:
        """The intervals of a slice's rates, and which of them are binomial bounds."""
        drawn = {rate: spans[name] for rate in RATES if (name := f"{rate}:{code}") in spans}
        masks = {rate: (self._wrong[rate], self._trials[rate]) for rate in drawn}
        trials = {
            rate: (float((self._codes[wrong] == code).sum()), float((self._codes[of] == code).sum()))
            for rate, (wrong, of) in masks.items()
        }
        return honest(drawn, trials)

    def marks(self, spans: Mapping[str, Span] | None) -> list[dict[str, str]]:
        """For each slice the rates that differ, and whether they are higher or lower.

        spans: of the bootstrap that must agree; None for no bootstrap.
        """
        found: list[dict[str, str]] = [{} for _ in range(self._slices)]
        observed = self._measure(None)
        for name in self._small():
            gap = observed[f"{name}:gap"]
            low, high = (gap, gap) if spans is None else spans.get(f"{name}:gap", (0.0, 0.0))
            if gap != 0 and low * high > 0:
                rate, code = name.split(":")
                found[int(code)][rate] = "higher" if gap > 0 else "lower"
        return found

    def _small(self) -> list[str]:
        """The slices' rates whose p-value is small after Holm's correction."""
        from scipy.stats import fisher_exact

        values: dict[str, float] = {}
        for rate in RATES:
            wrong = np.bincount(self._codes[self._wrong[rate]], minlength=self._slices)
            trials = np.bincount(self._codes[self._trials[rate]], minlength=self._slices)
            for code in np.flatnonzero((trials > 0) & (trials < trials.sum())).tolist():
                inside = [wrong[code], trials[code] - wrong[code]]
                outside = [wrong.sum() - wrong[code], trials.sum() - trials[code] - wrong.sum() + wrong[code]]
                values[f"{rate}:{code}"] = float(fisher_exact([inside, outside]).pvalue)
        return _holm(values)

    def _measure(self, weights: np.ndarray | None) -> dict[str, float]:
        """Each slice's rate by `RATE:SLICE`, and what it has more than all others by `RATE:SLICE:gap`.

        NaN where there are no pairs.
        """
        found: dict[str, float] = {}
        for rate in RATES:
            wrong, trials = self._sums(self._wrong[rate], weights), self._sums(self._trials[rate], weights)
            with np.errstate(invalid="ignore", divide="ignore"):
                shares = wrong / trials
                gaps = shares - (wrong.sum() - wrong) / (trials.sum() - trials)
            found |= {f"{rate}:{code}": share for code, share in enumerate(shares.tolist())}
            found |= {f"{rate}:{code}:gap": gap for code, gap in enumerate(gaps.tolist())}
        return found

    def _sums(self, chosen: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
        heavy = None if weights is None else weights[chosen]
        return np.bincount(self._codes[chosen], heavy, self._slices)


def _holm(values: dict[str, float]) -> list[str]:
    """The names whose p-values stand Holm's step-down test. Source: Holm 1979."""
    kept = []
    for place, name in enumerate(sorted(values, key=lambda each: values[each])):
        if values[name] > LEVEL / (len(values) - place):
            break
        kept.append(name)
    return kept


def slices_document(slices: Sequence[Slice]) -> list[dict[str, Any]]:
    """As they stand in `metrics.json`."""
    return [
        {
            "value": each.name,
            **each.counts,
            **each.figures,
            "intervals": each.intervals,
            "exact": each.exact,
            "differs": dict(each.marks),
        }
        for each in slices
    ]


@dataclass(frozen=True)
class Fold:
    """One fold: its name, its pairs that were scored, the others' threshold, its figures there."""

    name: str
    pairs: int
    threshold: float
    figures: dict[str, float]


def measure_folds(pairs: MeasuredPairs, folds: pa.ChunkedArray) -> list[Fold]:
    """Measure every fold at the threshold of best accuracy on the others; pairs of no fold take no part.

    folds: (N,) of the pairs. Empty where there are fewer than two folds, or the rest of one lacks a kind of
    pair. Source: Huang et al. 2007, Labeled Faces in the Wild, section 5.
    """
    encoded = cell_names(folds).combine_chunks().dictionary_encode()
    names = encoded.dictionary.to_pylist()
    codes = encoded.indices.fill_null(-1).to_numpy()
    if len(names) < 2:
        return []
    found = []
    for code in np.argsort(np.array(names)).tolist():
        others = _subset(pairs, (codes >= 0) & (codes != code))
        if not others.curve.both:
            return []
        threshold = others.curve.best_accuracy()
        inside = replace(_subset(pairs, codes == code), threshold=threshold)
        figures = inside.figures()
        kept = {name: figures[name] for name in FIGURES}
        found.append(Fold(names[code], len(inside.scored), threshold, kept))
    return sorted(found, key=lambda fold: (len(fold.name), fold.name))


def _subset(pairs: MeasuredPairs, chosen: np.ndarray) -> MeasuredPairs:
    return MeasuredPairs(pairs.truth[chosen], pairs.probability[chosen], pairs.threshold)


def summarise_folds(folds: Sequence[Fold]) -> dict[str, Any] | None:
    """Mean and spread of the figures over folds: `std` of the folds (n - 1), `error` of the mean."""
    if not folds:
        return None
    summary = {}
    for name in FIGURES:
        values = np.array([fold.figures[name] for fold in folds])
        known = values[~np.isnan(values)]
        spread = float(known.std(ddof=1)) if len(known) > 1 else float("nan")
        mean = float(known.mean()) if len(known) else float("nan")
        summary[name] = {"mean": mean, "std": spread, "error": spread / max(len(known), 1) ** 0.5}
    return {"folds": len(folds), "threshold": "best accuracy on the other folds", "figures": summary}
