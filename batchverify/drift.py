"""How far the scores of a run have moved from those of a reference, with or without truth."""

from __future__ import annotations

from typing import Any

import numpy as np

from batchverify.scores import Scores

# Shares of pairs that are compared, and what people read for them.
SHARES = {"called_different": "share called different", "failure_rate": "share not scored"}
BINS = 10
# The usual reading of the index; Siddiqi 2006, Credit risk scorecards, chapter 6.
SOME, MUCH = 0.1, 0.25
# The 99 % point of chi-squared with `BINS - 1` degrees of freedom.
CHI_SQUARED = 21.666
# A share that differs so seldom by chance is said to have changed.
RARE = 0.01
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
    runs = (new, reference)
    document: dict[str, Any] = {
        "called_different": _shares_of([each.calls[each.scored] for each in runs]),
        "failure_rate": _shares_of([~each.scored for each in runs]),
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


def _shares_of(chosen: list[np.ndarray]) -> dict[str, Any]:
    """The shares of two runs' pairs that are chosen, (N,) bool each, and whether they differ beyond chance.

    Fisher's exact test: it takes the runs for independent, which of two runs of the same pairs errs on the
    side of saying nothing.
    """
    from scipy.stats import fisher_exact

    seen, of = [int(each.sum()) for each in chosen], [len(each) for each in chosen]
    shares = [part / whole if whole else None for part, whole in zip(seen, of, strict=True)]
    if None in shares:
        return {"share": shares, "p_value": None, "verdict": "nothing to compare"}
    p = float(fisher_exact([[part, whole - part] for part, whole in zip(seen, of, strict=True)]).pvalue)
    more = seen[0] * of[1] > seen[1] * of[0]
    verdict = (
        f"{'more' if more else 'fewer'} than chance explains" if p < RARE else "no more than chance explains"
    )
    return {"share": shares, "p_value": p, "verdict": verdict}


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
