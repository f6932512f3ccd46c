"""How far the scores of a run have moved from those of a reference, with or without truth."""

from __future__ import annotations

from typing import Any

import numpy as np

from batchverify.scores import Scores

BINS = 10
# The usual reading of the index; Siddiqi 2006, Credit risk scorecards, chapter 6.
SOME, MUCH = 0.1, 0.25
# The 99 % point of chi-squared with `BINS - 1` degrees of freedom.
CHI_SQUARED = 21.666
# What stands for an empty bin: half a pair.
EMPTY = 0.5


def stability_index(new: np.ndarray, reference: np.ndarray) -> float:
    """Population stability index of (N,) new numbers over the deciles of (M,) reference ones, both not empty."""
    edges = np.unique(np.quantile(reference, np.linspace(0, 1, BINS + 1)[1:-1]))
    shares = [
        _shares(np.searchsorted(edges, each, side="right"), len(edges) + 1) for each in (new, reference)
    ]
    return float(((shares[0] - shares[1]) * np.log(shares[0] / shares[1])).sum())


def _shares(places: np.ndarray, bins: int) -> np.ndarray:
    counts = np.maximum(np.bincount(places, minlength=bins), EMPTY)
    return counts / counts.sum()


def chance_index(new: int, reference: int) -> float:
    """The index to expect of two draws of so many numbers from one distribution."""
    return (BINS - 1) * (1 / new + 1 / reference)


def beyond_chance(index: float, chance: float) -> bool:
    """Whether chance alone gives such an index once in a hundred times or less often.

    Over the index that chance gives on average it is distributed as chi-squared over its degrees of freedom.
    Source: Yurdakul 2018, Statistical properties of the population stability index.
    """
    return index > chance * CHI_SQUARED / (BINS - 1)


def measure_drift(new: Scores, reference: Scores) -> dict[str, Any]:
    """Index and verdict for probabilities and similarities; shares called different and failed, in both runs."""
    document: dict[str, Any] = {
        "called_different": [_called(each) for each in (new, reference)],
        "failure_rate": [float((~each.scored).mean()) for each in (new, reference)],
    }
    for name in ("probability", "similarity"):
        values = [getattr(each, name) for each in (new, reference)]
        if any(each is None for each in values):
            continue
        known = [each[~np.isnan(each)] for each in values]
        if min(map(len, known)):
            index, chance = stability_index(*known), chance_index(len(known[0]), len(known[1]))
            document[name] = {
                "stability_index": index,
                "expected_by_chance": chance,
                "verdict": _verdict(index, chance),
                "mean": [float(each.mean(dtype=np.float64)) for each in known],
                "median": [float(np.median(each)) for each in known],
            }
    return document


def _called(scores: Scores) -> float | None:
    """The share of the scored pairs called different."""
    calls = scores.calls[scores.scored]
    return float(calls.mean()) if len(calls) else None


def _verdict(index: float, chance: float) -> str:
    if chance > SOME / 2 and not beyond_chance(index, chance):
        return "too few pairs to tell drift from chance"
    if index < SOME:
        return "no notable drift"
    return (
        "some drift: look at the distributions"
        if index < MUCH
        else "strong drift: do not trust old thresholds"
    )
