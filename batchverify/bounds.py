"""Intervals where every draw of a bootstrap agrees: such draws do not show how far a figure may be off."""

from __future__ import annotations

from collections.abc import Mapping

# What a 95 % interval leaves out at either end.
TAIL = 0.025

Span = tuple[float, float]


def honest(
    spans: Mapping[str, Span], trials: Mapping[str, tuple[float, float]]
) -> tuple[dict[str, Span], list[str]]:
    """The intervals of a bootstrap without those that have no width, and the names of those replaced.

    trials: (successes, trials) of figures that are shares. Of those that are 0 or 1 the exact binomial bound
    stands in; F1's follows from the bounds of precision and recall. All take pairs for independent. Other
    figures (ROC AUC, equal error, average precision) have none.
    """
    kept = {name: span for name, span in spans.items() if span[0] < span[1]}
    flat = spans.keys() - kept.keys()
    found = {name: span for name in sorted(flat) if name in trials and (span := _exact(*trials[name]))}
    if "f1" in flat and {"precision", "recall"} <= found.keys():
        ends = zip(found["precision"], found["recall"], strict=True)
        low, high = (2 * p * r / (p + r) if p + r else 0.0 for p, r in ends)
        found["f1"] = (low, high)
    return kept | found, sorted(found)


def verdict_trials(counts: Mapping[str, int]) -> dict[str, tuple[float, float]]:
    """(successes, trials) of every figure that is a share of `MeasuredPairs.counts`."""
    accepts, rejects = counts["false_accepts"], counts["false_rejects"]
    same, different = counts["same"], counts["different"]
    lost = counts["same_failed"] + counts["different_failed"]
    hits = different - accepts
    return {
        "far": (accepts, different),
        "frr": (rejects, same),
        "recall": (hits, different),
        "precision": (hits, hits + rejects),
        "accuracy": (hits + same - rejects, same + different),
        "failure_rate": (lost, same + different + lost),
        "far_with_failures": (accepts, different + counts["different_failed"]),
        "frr_with_failures": (rejects + counts["same_failed"], same + counts["same_failed"]),
    }


def _exact(seen: float, trials: float) -> Span | None:
    """The Clopper-Pearson interval of none or all of some trials; None of any other number."""
    bound = 1 - TAIL ** (1 / trials) if trials else 1.0
    if not seen:
        return 0.0, bound
    return (1 - bound, 1.0) if seen == trials else None
