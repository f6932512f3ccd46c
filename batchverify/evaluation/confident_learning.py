"""Confident learning: which labels the scores disagree with, by thresholds of each class.

Source: Northcutt, Jiang and Chuang 2021, Confident Learning: Estimating Uncertainty in Dataset Labels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# Probabilities nearer 0 or 1 say no more than these.
LEAST = 1e-7
# The bounds of the noise rate that labels are weighed with. Ten benchmarks have 3.3 % of wrong labels on average
# (Northcutt, Athalye and Mueller 2021), so that none at all is not to be reckoned with.
FEWEST, MOST = 0.01, 0.2


@dataclass(frozen=True)
class ConfidentLearning:
    """What the scores of N pairs say about their labels.

    thresholds: the mean self-confidence of the pairs labelled same and of those labelled different; None without
    such pairs. margin: (N,) the normalised margin from 0 to 1, below 0.5 if the scores prefer the other label.
    off_diagonal: (N,) bool, pairs whose other label has at least that label's threshold. log_odds: (N,) of two
    people, 0 half-way between the thresholds.
    """

    thresholds: tuple[float | None, float | None]
    margin: np.ndarray
    off_diagonal: np.ndarray
    log_odds: np.ndarray

    @classmethod
    def of(cls, probability: np.ndarray, labels: np.ndarray) -> ConfidentLearning:
        """From (N,) probabilities of two people, none NaN, and (N,) labels 0 and 1.

        The probabilities should be out of sample: of a head that was not fitted to these pairs.
        """
        p = np.clip(probability.astype(np.float64), LEAST, 1 - LEAST)
        own = np.where(labels == 1, p, 1 - p)
        same, different = (
            float(own[labels == label].mean()) if (labels == label).any() else None for label in (0, 1)
        )
        # Where a class has no pairs, its threshold is as far from a half as that of the other.
        other = np.where(labels == 1, same or different or 0.5, different or same or 0.5)
        centre = (log_odds(different or same or 0.5) - log_odds(same or different or 0.5)) / 2
        off = (1 - own >= other) & (1 - own > own)
        return cls((same, different), own, off, log_odds(p) - centre)

    @property
    def noise(self) -> float:
        """The share of wrong labels to reckon with: that of the pairs off the diagonal, within bounds."""
        return float(np.clip(self.off_diagonal.mean(), FEWEST, MOST))

    @property
    def trust(self) -> float:
        """The log-odds of a right label."""
        return float(np.log(1 / self.noise - 1))


def log_odds(p: np.ndarray | float) -> np.ndarray:
    """The natural logarithm of p / (1 - p)."""
    clipped = np.clip(p, LEAST, 1 - LEAST)
    return np.log(clipped / (1 - clipped))
