"""Figures for each value of a column, and the protocol of k folds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from batchverify.evaluation.bootstrap import Span, Units, bootstrap, with_exact_bounds
from batchverify.evaluation.document import Fold, Folds, Spread
from batchverify.evaluation.figures import MeasuredPairs
from batchverify.evaluation.scores import UNKNOWN, Scores
from batchverify.manifest.columns import cell_names

# The rarer values of a column with more are taken together.
MOST_SLICES = 50
OTHERS = "(all others)"
BLANK = "(blank)"
LEVEL = 0.05
RATES = ("far", "frr")
FOLD = "fold"
FIGURES = ("accuracy", "f1", "auc", "equal_error", "far", "frr")


@dataclass(frozen=True)
class Slice:
    """The pairs with one value.

    figures: as of `MeasuredPairs.figures`, NaN without truth. intervals: of `far` and `frr`. exact: which of
    these are exact binomial bounds. marks: `far` or `frr` to `higher` or `lower`.
    """

    name: str
    counts: dict[str, int]
    figures: dict[str, float]
    intervals: dict[str, Span]
    exact: list[str]
    marks: dict[str, str]

    def document(self) -> dict[str, Any]:
        """The row in `metrics.json`."""
        return {
            "value": self.name,
            **self.counts,
            **self.figures,
            "intervals": self.intervals,
            "exact": self.exact,
            "differs": self.marks,
        }


def slice_codes(cells: pa.ChunkedArray) -> tuple[np.ndarray, tuple[str, ...]]:
    """(N,) int32 codes of the slices, and their names: numbers in ascending order, other values by frequency."""
    encoded = cells.combine_chunks()
    if not pa.types.is_dictionary(encoded.type):
        encoded = encoded.dictionary_encode()
    blank = len(encoded.dictionary)
    codes = encoded.indices.fill_null(blank).to_numpy()
    texts = [*(BLANK if _is_blank(value) else str(value) for value in encoded.dictionary.to_pylist()), BLANK]
    names = list(dict.fromkeys(texts))
    by_name = {name: code for code, name in enumerate(names)}
    codes = np.array([by_name[text] for text in texts], np.int32)[codes]
    counts = np.bincount(codes, minlength=len(names))
    order = [code for code in np.argsort(-counts, kind="stable").tolist() if counts[code]]
    shown = _ascending(order[:MOST_SLICES], names)
    renumbered = np.full(len(names), len(shown), np.int32)
    renumbered[shown] = np.arange(len(shown))
    others = [OTHERS] if len(order) > len(shown) else []
    return renumbered[codes], (*(names[code] for code in shown), *others)


def _ascending(codes: list[int], names: Sequence[str]) -> list[int]:
    """The codes in the order of the numbers that they stand for, blank last; unchanged if one is not a number."""
    try:
        return sorted(codes, key=lambda code: math.inf if names[code] == BLANK else float(names[code]))
    except ValueError:
        return codes


def _is_blank(value: Any) -> bool:
    """Whether a cell is empty or NaN, which pandas writes for a blank among numbers."""
    return value in (None, "") or value != value


def measure_slices(
    scores: Scores, cells: pa.ChunkedArray, units: Units | None, *, draws: int, seed: int
) -> list[Slice]:
    """Measure every value of a column with (N,) cells. units: of all N pairs, None for no bootstrap."""
    codes, names = slice_codes(cells)
    rows, pairs = scores.labelled, scores.labelled_pairs()
    rates = _Rates(pairs, codes[rows], len(names))
    drawn = bootstrap(units.subset(rows), rates.measure, draws=draws, seed=seed) if units and draws else None
    marks = rates.marks(drawn)
    return [
        Slice(
            name,
            _counts(scores, codes == code),
            pairs.subset(codes[rows] == code).figures(),
            *rates.intervals(code, drawn or {}),
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


class _Rates:
    """The error rates of slices: their intervals, and whether they differ from those of all other pairs.

    They differ by Fisher's exact test with Holm's correction for the number of slices. The test assumes
    independent pairs, so the bootstrap's interval of the difference, if any, must also exclude 0.
    """

    def __init__(self, pairs: MeasuredPairs, codes: np.ndarray, slices: int) -> None:
        self._codes, self._slices = codes, slices
        scored = ~np.isnan(pairs.probability)
        self._trials = {"far": scored & (pairs.truth == 1), "frr": scored & (pairs.truth == 0)}
        self._wrong = {
            "far": self._trials["far"] & ~pairs.calls,
            "frr": self._trials["frr"] & pairs.calls,
        }

    def intervals(self, code: int, spans: Mapping[str, Span]) -> tuple[dict[str, Span], list[str]]:
        """The intervals of a slice's rates, and which of them are exact binomial bounds."""
        drawn = {rate: spans[name] for rate in RATES if (name := f"{rate}:{code}") in spans}
        inside = self._codes == code
        trials = {
            rate: (float((inside & self._wrong[rate]).sum()), float((inside & self._trials[rate]).sum()))
            for rate in drawn
        }
        return with_exact_bounds(drawn, trials)

    def marks(self, spans: Mapping[str, Span] | None) -> list[dict[str, str]]:
        """For each slice the rates that differ, and whether they are higher or lower.

        spans: of the bootstrap that must agree; None for no bootstrap.
        """
        marks: list[dict[str, str]] = [{} for _ in range(self._slices)]
        observed = self.measure(None)
        for name in self._significant():
            gap = observed[f"{name}:gap"]
            low, high = (gap, gap) if spans is None else spans.get(f"{name}:gap", (0.0, 0.0))
            if gap != 0 and low * high > 0:
                rate, code = name.split(":")
                marks[int(code)][rate] = "higher" if gap > 0 else "lower"
        return marks

    def _significant(self) -> list[str]:
        """The slices' rates, as `RATE:SLICE`, that differ by the corrected test."""
        from scipy.stats import fisher_exact

        p_values: dict[str, float] = {}
        for rate in RATES:
            wrong = np.bincount(self._codes[self._wrong[rate]], minlength=self._slices)
            trials = np.bincount(self._codes[self._trials[rate]], minlength=self._slices)
            for code in np.flatnonzero((trials > 0) & (trials < trials.sum())).tolist():
                inside = [wrong[code], trials[code] - wrong[code]]
                outside = [wrong.sum() - wrong[code], trials.sum() - trials[code] - wrong.sum() + wrong[code]]
                _, p = fisher_exact([inside, outside])
                p_values[f"{rate}:{code}"] = float(p)
        return _holm(p_values)

    def measure(self, weights: np.ndarray | None) -> dict[str, float]:
        """Each slice's rate as `RATE:SLICE`, and the difference from all other pairs as `RATE:SLICE:gap`.

        NaN without pairs.
        """
        measured: dict[str, float] = {}
        for rate in RATES:
            wrong, trials = self._sums(self._wrong[rate], weights), self._sums(self._trials[rate], weights)
            with np.errstate(invalid="ignore", divide="ignore"):
                shares = wrong / trials
                gaps = shares - (wrong.sum() - wrong) / (trials.sum() - trials)
            measured |= {f"{rate}:{code}": share for code, share in enumerate(shares.tolist())}
            measured |= {f"{rate}:{code}:gap": gap for code, gap in enumerate(gaps.tolist())}
        return measured

    def _sums(self, chosen: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
        chosen_weights = None if weights is None else weights[chosen]
        return np.bincount(self._codes[chosen], chosen_weights, self._slices)


def _holm(p_values: dict[str, float]) -> list[str]:
    """The names that pass Holm's step-down test. Source: Holm 1979."""
    passed: list[str] = []
    for name in sorted(p_values, key=lambda name: p_values[name]):
        if p_values[name] > LEVEL / (len(p_values) - len(passed)):
            break
        passed.append(name)
    return passed


def measure_folds(pairs: MeasuredPairs, folds: pa.ChunkedArray) -> list[Fold]:
    """Measure every fold at the threshold of best accuracy on the others; pairs without a fold are left out.

    folds: (N,) of the pairs. Empty for fewer than two folds, or if the pairs outside a fold are all of one kind.
    Source: Huang et al. 2007, Labeled Faces in the Wild, section 5.
    """
    encoded = cell_names(folds).combine_chunks().dictionary_encode()
    names = encoded.dictionary.to_pylist()
    codes = encoded.indices.fill_null(-1).to_numpy()
    if len(names) < 2:
        return []
    measured: list[Fold] = []
    for code in np.argsort(np.array(names)).tolist():
        others = pairs.subset((codes >= 0) & (codes != code))
        if not others.curve.both:
            return []
        threshold = others.curve.best_accuracy()
        inside = replace(pairs.subset(codes == code), threshold=threshold)
        figures = inside.figures()
        figures = {name: figures[name] for name in FIGURES}
        measured.append(
            Fold(name=names[code], pairs=len(inside.scored), threshold=threshold, figures=figures)
        )
    return sorted(measured, key=lambda fold: (len(fold["name"]), fold["name"]))


def summarise_folds(folds: list[Fold]) -> Folds | None:
    """Mean, standard deviation (n - 1) and standard error of the figures over folds; None without folds."""
    if not folds:
        return None
    summary: dict[str, Spread] = {}
    for name in FIGURES:
        values = np.array([fold["figures"][name] for fold in folds])
        known = values[~np.isnan(values)]
        std = float(known.std(ddof=1)) if len(known) > 1 else math.nan
        mean = float(known.mean()) if len(known) else math.nan
        summary[name] = {"mean": mean, "std": std, "error": std / max(len(known), 1) ** 0.5}
    threshold = "best accuracy on the other folds"
    return {"folds": len(folds), "threshold": threshold, "figures": summary, "each": folds}
