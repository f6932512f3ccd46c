"""Three verdicts: `same`, `different`, and `review` for the scores between two thresholds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from batchverify.errors import UsageError
from batchverify.heads.bounds import Tail, stored_tails

VERDICT = "verdict"
SAME, DIFFERENT, REVIEW = "same", "different", "review"
VERDICTS = (SAME, DIFFERENT, REVIEW)


@dataclass(frozen=True)
class ReviewBand:
    """Two thresholds, compared as float32: below `same_below` a pair is `same`, from `different_from` on `different`.

    A different pair of other people is called `same` with probability `far` at most, a same pair of another person
    `different` with probability `frr` at most. If one threshold keeps both promises, both are equal, and no pair is
    left for review. `different_from` is above 1 if nothing can be called `different`.
    """

    far: float
    frr: float
    same_below: float
    different_from: float

    @classmethod
    def of(cls, stored: Mapping[str, Any], far: float, frr: float) -> ReviewBand:
        """From the thresholds in a head's metadata. Raises `UsageError` if its pairs cannot promise these rates.

        Source: see `Tail.conformal`; by class, as in Vovk, Gammerman & Shafer 2005, section 4.5 (Mondrian).
        """
        option = f"--review {far:g} {frr:g}"
        different, same, unit = stored_tails(stored, option)
        low = _conformal(different, far, f"{option}: a false accept rate of {far:g}", f"different pairs of {unit}")
        high = _conformal(same, frr, f"{option}: a false reject rate of {frr:g}", f"same pairs of {unit}")
        # From the next number on: a pair with the score itself is not beyond it.
        high = float(np.nextafter(np.float32(high), np.float32(2)))
        if low > high:
            # Any threshold from `high` to `low` keeps both promises; the head's own changes the fewest verdicts.
            low = high = min(max(float(stored["best_f1"]), high), low)
        return cls(far, frr, low, high)

    def verdicts(self, probability: np.ndarray) -> np.ndarray:
        """(N,) int8, indices of `VERDICTS`, of (N,) float32 probabilities."""
        is_same = probability < np.float32(self.same_below)
        is_different = probability >= np.float32(self.different_from)
        return np.where(is_same, 0, np.where(is_different, 1, 2)).astype(np.int8)


def _conformal(tail: Tail, rate: float, what: str, pairs: str) -> float:
    score = tail.conformal(rate)
    if score is None:
        needed = math.ceil(1 / rate * (1 - 1e-12)) - 1
        raise UsageError(
            f"{what} takes {needed:,} {pairs} that share nobody, and behind the head there were {tail.pairs:,}; ask "
            "for a higher rate, or run `batchverify calibrate` on more labelled pairs"
        )
    return score
