"""Thresholds at false accept rates, from the different pairs of a development set."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

RATES = (1e-1, 1e-2, 1e-3, 1e-4)
# A rate is only stored when the pairs behind it would give this many false accepts.
EXPECTED_FALSE_ACCEPTS = 10


@dataclass(frozen=True)
class RateThreshold:
    """The threshold below which at most a share `far` of `pairs` different pairs scores: false accepts."""

    far: float
    threshold: float
    pairs: int

    def to_json(self) -> dict[str, Any]:
        """As it stands in a head's metadata."""
        return asdict(self)


def rate_thresholds(different: np.ndarray) -> list[RateThreshold]:
    """Thresholds for the rates that (N,) probabilities of different pairs can support."""
    scores = np.sort(different)
    supported = [rate for rate in RATES if rate * len(scores) >= EXPECTED_FALSE_ACCEPTS]
    return [RateThreshold(rate, float(scores[int(rate * len(scores))]), len(scores)) for rate in supported]
