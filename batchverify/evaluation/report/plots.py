"""The numbers behind the report's plots: few enough to embed, whatever the number of pairs."""

from __future__ import annotations

from typing import Any

import numpy as np

from batchverify.evaluation.figures import BINS, Curve, MeasuredPairs
from batchverify.evaluation.scores import UNKNOWN, Scores

HISTOGRAM_BINS = 60
# Points of a curve; more cannot be told apart on a screen.
POINTS = 400
GRID = 1000
KINDS = {"same": 0, "different": 1, "unknown": UNKNOWN}


def histograms(scores: Scores) -> dict[str, Any] | None:
    """Counts by truth of probabilities and similarities: edges (B + 1,) and a list of B counts a kind.

    None, as of every plot here, where there is nothing to draw: an empty object is true to JavaScript.
    """
    found: dict[str, Any] = {}
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
                # A cosine of rounded vectors may exceed 1 by a rounding.
                counts[kind] = np.histogram(np.clip(inside, low, 1.0), edges)[0].tolist()
        found[name] = {"edges": _rounded(edges), "counts": counts}
    return found or None


def curves(pairs: MeasuredPairs) -> dict[str, Any] | None:
    """Points of the ROC and DET curves, false accept rates ascending; None unless both kinds are there."""
    curve = pairs.curve
    if not curve.both:
        return None
    places = _spread(curve)
    at = pairs.ranking.place(pairs.threshold)
    accepts, rejects = curve.false_accepts(), curve.false_rejects()
    return {
        "far": _rounded(accepts[places]),
        "frr": _rounded(rejects[places]),
        "here": [float(accepts[at]), float(rejects[at])],
        # Half a pair: where a rate of none is drawn on a log axis.
        "floor": [0.5 / each for each in (curve.totals[1], curve.totals[0])],
    }


def _spread(curve: Curve) -> np.ndarray:
    """Places of a curve that follow each other evenly on log axes of either rate."""
    corners = np.flatnonzero(np.diff(curve.same, prepend=-1) + np.diff(curve.different, prepend=-1))
    if len(corners) <= POINTS:
        return corners
    wanted = []
    for counts in (curve.different, curve.same[-1] - curve.same[::-1]):
        targets = np.unique(np.concatenate([[0], np.geomspace(1, counts[-1], POINTS // 2)]).astype(np.int64))
        found = np.searchsorted(counts, targets, side="right") - 1
        # Both ends of each step.
        found = np.minimum(np.concatenate([found, found + 1]), len(counts) - 1)
        wanted.append(found if counts is curve.different else len(counts) - 1 - found)
    return np.unique(np.concatenate([*wanted, [0, len(curve.same) - 1]]))


def calibration(pairs: MeasuredPairs) -> dict[str, Any] | None:
    """By bin of probability, those that hold pairs: mean probability, share that is different, pairs.

    low, high: the share's 95 % interval of that many independent pairs (Wilson 1927).
    """
    if not len(pairs.scored):
        return None
    counts = np.bincount(pairs.bins, minlength=BINS)
    kept = np.flatnonzero(counts)
    truth = pairs.truth[pairs.scored].astype(np.float64)
    sums = [np.bincount(pairs.bins, each, BINS)[kept] for each in (pairs.probability[pairs.scored], truth)]
    means, shares = (each / counts[kept] for each in sums)
    many, z = counts[kept], 1.96
    middle = (shares + z**2 / (2 * many)) / (1 + z**2 / many)
    half = z * np.sqrt(shares * (1 - shares) / many + (z / (2 * many)) ** 2) / (1 + z**2 / many)
    spans = {"low": _rounded(np.maximum(middle - half, 0)), "high": _rounded(np.minimum(middle + half, 1))}
    return {"mean": _rounded(means), "share": _rounded(shares), **spans, "pairs": many.tolist()}


def explorer(scores: Scores) -> dict[str, Any] | None:
    """What each threshold of a grid accepts, by truth: counts of probabilities below it.

    The grid is even and grows finer towards 0 and 1, where the probabilities are; the run's threshold is on it.
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
        # As short as tells float32 apart.
        "grid": [float(str(each)) for each in grid],
        "start": int(np.searchsorted(grid, np.float32(scores.threshold))),
        "accepted": accepted,
        "totals": totals,
    }


def scatter(new: Scores, reference: Scores, rows: np.ndarray) -> dict[str, Any] | None:
    """Both runs' probabilities of some rows, and their truth."""
    if not len(rows):
        return None
    return {
        "new": _rounded(new.probability[rows]),
        "reference": _rounded(reference.probability[rows]),
        "truth": new.truth[rows].tolist(),
        "threshold": [new.threshold, reference.threshold],
    }


def overlaid(new: Scores, reference: Scores) -> dict[str, Any] | None:
    """Shares of all probabilities by bin in both runs; None where one of them scored nothing."""
    if not (new.scored.any() and reference.scored.any()):
        return None
    edges = np.linspace(0, 1, HISTOGRAM_BINS + 1)
    shares = {}
    for name, run in (("new", new), ("reference", reference)):
        counts = np.histogram(run.probability[run.scored], edges)[0]
        shares[name] = _rounded(counts / counts.sum())
    return {"edges": _rounded(edges), "shares": shares}


def _rounded(values: np.ndarray) -> list[float]:
    """Six digits: more cannot be seen."""
    return [float(f"{each:.6g}") for each in values.tolist()]
