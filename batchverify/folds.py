"""The k-fold protocol: each fold is measured at the threshold that is best on all others, as LFW View 2 asks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from batchverify.manifest.columns import cell_names
from batchverify.measured import MeasuredPairs

FOLD = "fold"
FIGURES = ("accuracy", "f1", "auc", "equal_error", "far", "frr")


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
