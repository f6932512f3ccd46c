"""Figures for each value of a column, and the protocol of k folds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa

from batchverify.evaluation.bootstrap import bootstrap, with_exact_bounds
from batchverify.evaluation.document import Fold, Folds, Spread
from batchverify.evaluation.figures import MeasuredPairs
from batchverify.evaluation.scores import UNKNOWN, Scores
from batchverify.heads.prior import Units
from batchverify.manifest.columns import cell_names

# The rarer values of a column with more are taken together.
MOST_SLICES = 50
OTHERS = "(all others)"
BLANK = "(blank)"
LEVEL = 0.05
RATES = ("far", "frr")
FOLD = "fold"
FIGURES = ("accuracy", "f1", "auc", "equal_error", "far", "frr")


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
) -> list[dict[str, Any]]:
    """Measure every value of a column with (N,) cells: its row in `metrics.json`, figures NaN without truth.

    units: of all N pairs, None for no bootstrap. `intervals` are of `far` and `frr`; `exact` says which of these are
    exact binomial bounds, `differs` which rates are higher or lower than those of all other pairs.
    """
    codes, names = slice_codes(cells)
    rows, pairs = scores.labelled, scores.labelled_pairs()
    labelled = codes[rows]
    rates = _Rates(pairs, labelled, len(names))
    drawn = bootstrap(units.subset(rows), rates.measure, draws=draws, seed=seed) if units and draws else None
    slices: list[dict[str, Any]] = []
    trials = []
    for code, name in enumerate(names):
        inside = pairs.subset(labelled == code)
        trials.append(inside.tally().trials())
        spans = {rate: drawn[each] for rate in RATES if drawn and (each := f"{rate}:{code}") in drawn}
        intervals, exact = with_exact_bounds(spans, trials[-1])
        row = {"value": name, **_counts(scores, codes == code), **inside.figures()}
        slices.append({**row, "intervals": intervals, "exact": exact, "differs": {}})
    observed = rates.measure(None)
    for rate, code in _significant(trials):
        # The test assumes independent pairs, so the bootstrap's interval, if any, must also exclude 0.
        name = f"{rate}:{code}:gap"
        gap = observed[name]
        low, high = (gap, gap) if drawn is None else drawn.get(name, (0.0, 0.0))
        if gap != 0 and low * high > 0:
            slices[code]["differs"][rate] = "higher" if gap > 0 else "lower"
    return slices


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
    """The error rates of slices, and how far they are from those of all other pairs."""

    def __init__(self, pairs: MeasuredPairs, codes: np.ndarray, slices: int) -> None:
        self._codes, self._slices = codes, slices
        scored = ~np.isnan(pairs.probability)
        self._trials = {"far": scored & (pairs.truth == 1), "frr": scored & (pairs.truth == 0)}
        self._wrong = {"far": self._trials["far"] & ~pairs.calls, "frr": self._trials["frr"] & pairs.calls}

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


def _significant(trials: Sequence[Mapping[str, tuple[float, float]]]) -> list[tuple[str, int]]:
    """The rates of slices that differ from those of all other pairs, by Fisher's exact test with Holm's correction.

    trials: (wrong verdicts, pairs) by rate, for each slice. Source: Holm 1979.
    """
    from scipy.stats import fisher_exact

    p_values: dict[tuple[str, int], float] = {}
    for rate in RATES:
        wrong, pairs = np.array([each[rate] for each in trials], np.int64).T
        for code in np.flatnonzero((pairs > 0) & (pairs < pairs.sum())).tolist():
            inside = [wrong[code], pairs[code] - wrong[code]]
            outside = [wrong.sum() - wrong[code], pairs.sum() - pairs[code] - wrong.sum() + wrong[code]]
            _, p_values[rate, code] = fisher_exact([inside, outside])
    passed: list[tuple[str, int]] = []
    for each in sorted(p_values, key=lambda each: p_values[each]):
        if p_values[each] > LEVEL / (len(p_values) - len(passed)):
            break
        passed.append(each)
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
        measured.append(Fold(name=names[code], pairs=len(inside.scored), threshold=threshold, figures=figures))
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
