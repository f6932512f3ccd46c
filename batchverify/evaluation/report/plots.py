"""The data of the report's plots, of a size that does not grow with the number of pairs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from batchverify.evaluation.figures import BINS, Curve, MeasuredPairs
from batchverify.evaluation.scores import UNKNOWN, Scores

HISTOGRAM_BINS = 60
# Points of a curve; a screen shows no more.
POINTS = 400
GRID = 1000
KINDS = {"same": 0, "different": 1, "unknown": UNKNOWN}


def histograms(scores: Scores) -> dict[str, Any] | None:
    """Probabilities and similarities, each as `edges` (B + 1,) and `counts` by truth, lists of B.

    Like every function here, it returns None if there is nothing to draw: an empty object is true in JavaScript.
    """
    drawn: dict[str, Any] = {}
    for name, low in (("probability", 0.0), ("similarity", -1.0)):
        values = getattr(scores, name)
        if values is None or not scores.scored.any():
            continue
        if name == "similarity":
            low = max(low, float(np.floor(np.nanmin(values) * 10) / 10))
        edges = np.linspace(low, 1.0, HISTOGRAM_BINS + 1)
        counts = {}
        for kind, code in KINDS.items():
            inside = values[(scores.truth == code) & scores.scored]
            if len(inside):
                # Outputs of earlier versions hold cosines slightly above 1.
                counts[kind] = np.histogram(np.clip(inside, low, 1.0), edges)[0].tolist()
        drawn[name] = {"edges": _rounded(edges), "counts": counts}
    return drawn or None


def curves(pairs: MeasuredPairs) -> dict[str, Any] | None:
    """Points of the ROC and DET curves, by ascending false accept rate; None without pairs of both kinds."""
    curve = pairs.curve
    if not curve.both:
        return None
    points, index = _points(curve), pairs.ranking.index(pairs.threshold)
    accepts, rejects = curve.false_accepts(), curve.false_rejects()
    return {
        "far": _rounded(accepts[points]),
        "frr": _rounded(rejects[points]),
        "here": [float(accepts[index]), float(rejects[index])],
        # Half a pair: where a rate of 0 is drawn on a log axis.
        "floor": [0.5 / curve.totals[1], 0.5 / curve.totals[0]],
    }


def _points(curve: Curve) -> np.ndarray:
    """Indices of points of a curve, evenly spaced on log axes of both rates."""
    corners = np.flatnonzero(np.diff(curve.same, prepend=-1) + np.diff(curve.different, prepend=-1))
    if len(corners) <= POINTS:
        return corners
    last = len(curve.same) - 1
    accepts = _log_spaced(curve.different)
    rejects = last - _log_spaced(curve.same[-1] - curve.same[::-1])
    return np.unique(np.concatenate([accepts, rejects, [0, last]]))


def _log_spaced(counts: np.ndarray) -> np.ndarray:
    """Indices into ascending counts, evenly spaced on a log axis: both ends of each step."""
    targets = np.unique(np.concatenate([[0], np.geomspace(1, counts[-1], POINTS // 2)]).astype(np.int64))
    steps = np.searchsorted(counts, targets, side="right") - 1
    return np.minimum(np.concatenate([steps, steps + 1]), len(counts) - 1)


def calibration(pairs: MeasuredPairs) -> dict[str, Any] | None:
    """For every bin of probability with pairs: mean probability, share of different pairs, number of pairs.

    low, high: the 95 % interval of the share for independent pairs (Wilson 1927).
    """
    if not len(pairs.scored):
        return None
    counts = np.bincount(pairs.bins, minlength=BINS)
    filled = np.flatnonzero(counts)
    columns = (pairs.probability[pairs.scored], pairs.truth[pairs.scored])
    n, z = counts[filled], 1.96
    means, shares = (np.bincount(pairs.bins, column, BINS)[filled] / n for column in columns)
    middle = (shares + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * np.sqrt(shares * (1 - shares) / n + (z / (2 * n)) ** 2) / (1 + z**2 / n)
    return {
        "mean": _rounded(means),
        "share": _rounded(shares),
        "low": _rounded(np.maximum(middle - half, 0)),
        "high": _rounded(np.minimum(middle + half, 1)),
        "pairs": n.tolist(),
    }


def explorer(scores: Scores) -> dict[str, Any] | None:
    """How many pairs of each truth each threshold of a grid accepts: those with probabilities below it.

    The grid is even, finer towards 0 and 1, where most probabilities lie, and includes the run's threshold.
    """
    if not scores.scored.any():
        return None
    tails = np.geomspace(1e-7, 1e-3, 40)
    grid = np.unique(np.concatenate([np.linspace(0, 1, GRID + 1), tails, 1 - tails, [scores.threshold]]))
    grid = np.unique(grid.astype(np.float32))
    accepted, totals = {}, {}
    for kind, code in KINDS.items():
        inside = np.sort(scores.probability[(scores.truth == code) & scores.scored])
        totals[kind] = len(inside)
        accepted[kind] = np.searchsorted(inside, grid, side="left").tolist()
    return {
        # The shortest text that tells float32 values apart.
        "grid": [float(str(each)) for each in grid],
        "start": int(np.searchsorted(grid, np.float32(scores.threshold))),
        "accepted": accepted,
        "totals": totals,
    }


def scatter(new: Scores, reference: Scores, rows: np.ndarray) -> dict[str, Any] | None:
    """The probabilities of some rows in both runs, and their truth."""
    if not len(rows):
        return None
    return {
        "new": _rounded(new.probability[rows]),
        "reference": _rounded(reference.probability[rows]),
        "truth": new.truth[rows].tolist(),
        "threshold": [new.threshold, reference.threshold],
    }


def overlaid(new: Scores, reference: Scores) -> dict[str, Any] | None:
    """The share of pairs in each bin of probability, in both runs; None if one of them scored nothing."""
    if not (new.scored.any() and reference.scored.any()):
        return None
    edges = np.linspace(0, 1, HISTOGRAM_BINS + 1)
    shares = {}
    for name, run in (("new", new), ("reference", reference)):
        counts = np.histogram(run.probability[run.scored], edges)[0]
        shares[name] = _rounded(counts / counts.sum())
    return {"edges": _rounded(edges), "shares": shares}


def heat(rates: Sequence[Sequence[float | None]]) -> list[list[int]]:
    """How hot each cell of a matrix of rates is, 0 to 100 on a log scale; 0 for rates of 0 and for none."""
    known = [each for row in rates for each in row if each]
    if not known:
        return [[0 for _ in row] for row in rates]
    low, high = math.log(min(known)), math.log(max(known))
    # The lowest rate above 0 is told from 0, and equal rates are not all at the top.
    span = max(high - low, math.log(10))
    return [[round(15 + 85 * (1 - (high - math.log(each)) / span)) if each else 0 for each in row] for row in rates]


def _rounded(values: np.ndarray) -> list[float]:
    """Six digits, more than a plot shows."""
    return [float(f"{each:.6g}") for each in values.tolist()]
