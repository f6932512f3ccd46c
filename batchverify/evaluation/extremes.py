"""False accept rates below what pairs can count: the tail of the different pairs' scores, extrapolated."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from batchverify.evaluation.bootstrap import shown_span
from batchverify.evaluation.document import Extremes
from batchverify.evaluation.field_figures import log_odds
from batchverify.evaluation.figures import MeasuredPairs
from batchverify.evaluation.pareto_tail import fit_tail, refusal
from batchverify.evaluation.tail_intervals import TailIntervals
from batchverify.heads.bounds import upper_bound
from batchverify.heads.prior import Units

RATES = (1e-5, 1e-6)
CONFIDENCE = 0.95


def extrapolate(pairs: MeasuredPairs, units: Units | None) -> Extremes:
    """Thresholds for `RATES`, and the false accept rate at the threshold if no false accept was counted.

    The scores are the negative log-odds of the different pairs. units: of the pairs; None for no intervals.
    """
    if not pairs.calibrated:
        return _empty("not a probability", 0, None)
    rows = pairs.scored[pairs.truth[pairs.scored] == 1]
    scores, level = -log_odds(pairs.probability[rows]), -float(log_odds(np.array([pairs.threshold]))[0])
    found = _empty(refusal(scores), len(rows), units.subset(rows) if units is not None else None)
    if found["reason"] is not None:
        return found
    tail = fit_tail(scores)
    likely = TailIntervals.of(scores, units.subset(rows)) if units is not None else None
    found["tail"] = {
        "start": _probability(tail.start),
        "share": tail.share,
        "shape": tail.shape,
        "scale": tail.scale,
    }
    for rate in RATES:
        span = likely.of_level(rate) if likely is not None else None
        found["rates"].append(
            {
                "far": rate,
                "threshold": _probability(tail.level(rate)),
                # A higher level is a lower probability.
                "interval": [_probability(span[1]), _probability(span[0])] if span is not None else None,
            }
        )
    if level > tail.start and not (scores > level).any():
        span = likely.of_rate(level) if likely is not None else None
        found["at_threshold"] = {
            "far": tail.rate(level),
            "interval": list(span) if span is not None else None,
        }
    return found


def _empty(reason: str | None, pairs: int, units: Units | None) -> Extremes:
    """Nothing extrapolated yet. units: of these pairs."""
    count = len(np.unique([units.a, units.b])) if units is not None and units.kind != "pairs" else 0
    return {
        "reason": reason,
        "pairs": pairs,
        "units": count or None,
        # The rule of three, with people as trials.
        "unseen": upper_bound(0, count, CONFIDENCE) if count else None,
        "tail": None,
        "rates": [],
        "at_threshold": None,
    }


def extreme_lines(found: Extremes | None) -> Iterator[tuple[str, str]]:
    """What the table on the terminal says: nothing if nothing was extrapolated."""
    if found is None or not found["rates"]:
        return
    for rate in found["rates"]:
        span = shown_span(rate["interval"], ".3g")
        yield f"FAR {rate['far']:g} extrapolated", f"at threshold {rate['threshold']:.3g}{span}"
    if found["unseen"]:
        kind = f"a kind of people that makes up {found['unseen']:.2%} or less may be missing"
        yield "", f"if these {found['units']:,} stand for all: {kind}"


def _probability(level: float) -> float:
    """The probability whose negative log-odds are `level`."""
    return 1 / (1 + math.exp(min(level, 700.0)))
