"""What scores tell without labels: the share of same pairs, the error rates to expect, and drift."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from batchverify.evaluation.bootstrap import bootstrap
from batchverify.evaluation.document import BaseRateDocument
from batchverify.evaluation.head_threshold import calibrated_shares, head_of_run
from batchverify.evaluation.scores import Scores, read_units
from batchverify.heads.drift import DRIFT, UNCHECKED, Verdict, checked, independent_pairs
from batchverify.heads.fused_head import FusedHead
from batchverify.heads.head import Head
from batchverify.heads.prior import Units, most_likely_share, shift, step_probabilities, steps_of

# Scored pairs that are looked at; of more a sample, drawn by the seed.
MOST_PAIRS = 1_000_000
# Expected pairs of a kind from which its error rate is stated.
FEWEST_EXPECTED = 10
NAMES = {"share": "share of same pairs", "far": "expected FAR", "frr": "expected FRR"}


def measure_base_rate(scores: Scores, *, draws: int, seed: int) -> BaseRateDocument | None:
    """Estimates from the calibrated probabilities alone; None if no pair is scored or any has a label.

    FAR is the probability of different people among the pairs called same, over that among all; FRR likewise. Figures
    are None if the scores have drifted, since the estimates believe in the head's calibration.
    """
    rows = np.flatnonzero(scores.scored)
    if not len(rows) or len(scores.labelled) or not scores.calibrated:
        return None
    if len(rows) > MOST_PAIRS:
        rows = np.sort(np.random.default_rng(seed).choice(rows, MOST_PAIRS, replace=False))
    units = read_units(scores.file).subset(rows)
    probability = scores.probability[rows]
    head = head_of_run(scores.file)
    fitted, assumed = calibrated_shares(head, scores.file.record)
    drift = _drift(head, probability, fitted, assumed, units)
    figures: Mapping[str, float] = {}
    spans: Mapping[str, tuple[float, float]] = {}
    if drift.verdict != DRIFT:
        measure = _Expected(probability, scores.calls[rows], assumed)
        figures = measure(np.ones(len(rows)))
        spans = bootstrap(units, measure, draws=draws, seed=seed) if draws else {}
        spans = {name: (low, high) for name, (low, high) in spans.items() if low < high}
    return {
        "probabilities_for": assumed,
        "estimates": {name: figures.get(name) for name in NAMES},
        "intervals": dict(spans),
        "pairs": len(rows),
        "unit": units.kind,
        "units": units.count,
        "drift": dict(vars(drift)),
    }


class _Expected:
    """The share of same pairs and the error rates of (N,) probabilities with their verdicts, by weights."""

    def __init__(self, probability: np.ndarray, called: np.ndarray, assumed: float) -> None:
        self._codes = 2 * steps_of(probability) + called
        self._middles, self._assumed = step_probabilities(), assumed

    def __call__(self, weights: np.ndarray) -> dict[str, float]:
        counts = np.bincount(self._codes, weights, 2 * len(self._middles)).reshape(-1, 2)
        pairs = counts.sum(axis=1)
        share = most_likely_share(self._middles, pairs, self._assumed)
        if math.isnan(share):
            return {}
        least = 0.5 / max(pairs.sum(), 1)
        different = shift(self._middles, float(np.clip(share, least, 1 - least)), self._assumed)
        found = {"share": share}
        for name, likely, wrong in (("far", different, 0), ("frr", 1 - different, 1)):
            # Of hardly any pairs of a kind no rate says anything.
            if (expected := float(likely @ pairs)) >= FEWEST_EXPECTED:
                found[name] = float(likely @ counts[:, wrong] / expected)
        return found


def _drift(
    head: Head | FusedHead | None, probability: np.ndarray, fitted: float, assumed: float, units: Units
) -> Verdict:
    if head is None:
        return Verdict(UNCHECKED, "the head of the run is not stated, or not found where it was")
    calibrated = shift(probability, fitted, assumed) if fitted != assumed else probability
    return checked(head.about, calibrated, independent_pairs(units.a, units.b))
