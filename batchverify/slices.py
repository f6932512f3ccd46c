"""The same figures for each value of a column, at the one threshold, and which values differ beyond chance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from batchverify.bootstrap import Units, bootstrap
from batchverify.measured import MeasuredPairs
from batchverify.scores import UNKNOWN, Scores

# Of a column with more values the rarer ones are taken together.
MOST_SLICES = 50
OTHERS = "(all others)"
BLANK = "(blank)"
LEVEL = 0.05
FIGURES = ("far", "frr", "failure_rate", "f1", "accuracy", "auc", "equal_error")


@dataclass(frozen=True)
class Slice:
    """One value's pairs. figures: by name, NaN without truth. marks: `far` or `frr` to `higher` or `lower`."""

    name: str
    counts: dict[str, int]
    figures: dict[str, float] = field(default_factory=dict)
    marks: dict[str, str] = field(default_factory=dict)


def slice_codes(cells: pa.ChunkedArray) -> tuple[np.ndarray, tuple[str, ...]]:
    """(N,) int32 numbers of the slices and their names: the values, the most frequent first."""
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
    kept = order[:MOST_SLICES]
    place = np.full(len(names), len(kept), np.int32)
    place[kept] = np.arange(len(kept))
    shown = [names[each] for each in kept] + ([OTHERS] if len(order) > len(kept) else [])
    return place[codes], tuple(shown)


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
    marks = _Test(pairs, codes[rows], len(names)).marks(units.subset(rows) if units else None, draws, seed)
    return [
        Slice(name, _counts(scores, codes == code), _figures(pairs, codes[rows] == code), marks[code])
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
        return dict.fromkeys(FIGURES, math.nan)
    inside = MeasuredPairs(pairs.truth[chosen], pairs.probability[chosen], pairs.threshold)
    figures = inside.figures()
    return {name: figures[name] for name in FIGURES}


class _Test:
    """Whether a slice's error rates differ from those of all other pairs.

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

    def marks(self, units: Units | None, draws: int, seed: int) -> list[dict[str, str]]:
        """For each slice the rates that differ, and whether they are higher or lower."""
        found: list[dict[str, str]] = [{} for _ in range(self._slices)]
        observed = self._differences(None)
        suspects = [name for name in self._small() if observed[name] != 0]
        if suspects and units is not None and draws:
            spans = bootstrap(units, self._differences, draws=draws, seed=seed).spans
            suspects = [name for name in suspects if name in spans and spans[name][0] * spans[name][1] > 0]
        for name in suspects:
            rate, code = name.split(":")
            found[int(code)][rate] = "higher" if observed[name] > 0 else "lower"
        return found

    def _small(self) -> list[str]:
        """The slices' rates whose p-value is small after Holm's correction."""
        from scipy.stats import fisher_exact

        values: dict[str, float] = {}
        for rate in ("far", "frr"):
            wrong = np.bincount(self._codes[self._wrong[rate]], minlength=self._slices)
            trials = np.bincount(self._codes[self._trials[rate]], minlength=self._slices)
            for code in np.flatnonzero((trials > 0) & (trials < trials.sum())).tolist():
                inside = [wrong[code], trials[code] - wrong[code]]
                outside = [wrong.sum() - wrong[code], trials.sum() - trials[code] - wrong.sum() + wrong[code]]
                values[f"{rate}:{code}"] = float(fisher_exact([inside, outside]).pvalue)
        return _holm(values)

    def _differences(self, weights: np.ndarray | None) -> dict[str, float]:
        """Each slice's rate less that of all others, by `RATE:SLICE`; NaN where either has no pairs."""
        found: dict[str, float] = {}
        for rate in ("far", "frr"):
            wrong, trials = self._sums(self._wrong[rate], weights), self._sums(self._trials[rate], weights)
            with np.errstate(invalid="ignore", divide="ignore"):
                gaps = wrong / trials - (wrong.sum() - wrong) / (trials.sum() - trials)
            found |= {f"{rate}:{code}": float(gap) for code, gap in enumerate(gaps)}
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
        {"value": each.name, **each.counts, **each.figures, "differs": dict(each.marks)} for each in slices
    ]
