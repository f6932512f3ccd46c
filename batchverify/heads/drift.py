"""Whether scores look like those that a head was calibrated on, whatever the share of same pairs among them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from batchverify.heads.prior import log_odds

# In a head's metadata.
LOG_ODDS = "log_odds"
# The ends of all bins but the outermost, which are open.
EDGES = np.linspace(-9.5, 9.5, 39)
BINS = len(EDGES) + 1
# Fewer scores tell nothing.
FEWEST = 50
# Bins are joined until each expects so many scores.
_EXPECTED = 5
_DRAWS = 499
_STEPS = 200
# Chosen on LFW View 1 train and dev, see docs/metrics.md.
CHANCE = 0.01
DISTANCE = 0.05
FITS, DRIFT, UNCHECKED = "fits", "drift", "not checked"


def histograms(labels: np.ndarray, probabilities: np.ndarray) -> dict[str, list[int]]:
    """Counts of held-out log-odds by label, for a head's metadata: `same` and `different`, `BINS` numbers each."""
    return {name: _counts(probabilities[labels == label]).tolist() for name, label in (("same", 0), ("different", 1))}


def _counts(probabilities: np.ndarray) -> np.ndarray:
    return np.bincount(np.digitize(log_odds(probabilities), EDGES), minlength=BINS)


@dataclass(frozen=True)
class Verdict:
    """What a check found.

    verdict: `fits`, `drift` or `not checked`. chance: of a fit as bad or worse if nothing has changed. distance:
    total variation from the nearest mixture of the head's same and different pairs, chance included. reason: for
    people.
    """

    verdict: str
    reason: str
    chance: float | None = None
    distance: float | None = None


@dataclass(frozen=True)
class Reference:
    """Counts of a head's held-out log-odds of same and of different pairs, (`BINS`,) int64 each."""

    same: np.ndarray
    different: np.ndarray

    @classmethod
    def of(cls, about: Mapping[str, Any]) -> Reference | None:
        """Those in a head's metadata; None if it has none. Raises `ValueError` for others."""
        stored = about.get(LOG_ODDS)
        if stored is None:
            return None
        counts = [np.array(stored[name]) for name in ("same", "different")]
        for each in counts:
            if each.shape != (BINS,) or each.dtype.kind != "i" or each.min() < 0 or not 0 < each.sum() < 1 << 40:
                raise ValueError(f"its histograms of log-odds are not {BINS} counts for each label")
        return cls(*counts)

    def check(self, probabilities: np.ndarray, independent: float | None = None, *, seed: int = 0) -> Verdict:
        """Whether (N,) calibrated probabilities fit any mixture of same and different pairs of the head.

        independent: as how many independent pairs they count, `independent_pairs`; None for all. Chi-square over the
        bins, whose variances count the chance in the head's own counts, against a parametric bootstrap that draws all
        three histograms and fits a share to each.
        """
        count = len(probabilities)
        if count < FEWEST:
            return Verdict(UNCHECKED, f"{count:,} scores are too few to see drift: {FEWEST} are needed")
        observed = _counts(probabilities)[None].astype(np.float64)
        observed *= (independent or count) / count
        same, different = self.same[None].astype(np.float64), self.different[None].astype(np.float64)
        misfit, mixture, distance = _misfits(observed, same, different)
        drawn, _, _ = _misfits(*self._drawn(mixture[0], float(observed.sum()), seed))
        chance = (1 + int((drawn >= misfit[0]).sum())) / (1 + _DRAWS)
        gap = float(distance[0])
        if chance <= CHANCE and gap >= DISTANCE:
            return Verdict(
                DRIFT,
                f"the scores look unlike those that the head was calibrated on: their histogram differs by {gap:.0%} "
                "from the nearest mixture of its same and different pairs",
                chance,
                gap,
            )
        return Verdict(FITS, "the scores look like those that the head was calibrated on", chance, gap)

    def _drawn(self, share: float, count: float, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Observed, same and different counts as chance would give them: (`_DRAWS`, `BINS`) each."""
        rng = np.random.default_rng(seed)
        same, different = (_shares(each[None].astype(np.float64))[0] for each in (self.same, self.different))
        mixed = share * same + (1 - share) * different
        return (
            rng.multinomial(round(count), mixed, _DRAWS).astype(np.float64),
            rng.multinomial(int(self.same.sum()), same, _DRAWS).astype(np.float64),
            rng.multinomial(int(self.different.sum()), different, _DRAWS).astype(np.float64),
        )


def independent_pairs(a: np.ndarray, b: np.ndarray) -> float:
    """As how many independent pairs do N pairs of (N,) units count: people or images, integers from 0.

    A pair counts as one over the number of pairs in which its more frequent unit is. So all n (n - 1) / 2 pairs of n
    people count as n / 2, the most that share nobody.
    """
    pairs_of = np.bincount(np.concatenate([a, b[a != b]]))
    return float((1 / np.maximum(pairs_of[a], pairs_of[b])).sum())


def checked(about: Mapping[str, Any], probabilities: np.ndarray, independent: float | None = None) -> Verdict:
    """`Reference.check` by a head's metadata. Heads of earlier versions have no histograms and cannot be checked."""
    reference = Reference.of(about)
    if reference is None:
        return Verdict(
            UNCHECKED,
            "the head does not say how its own scores were distributed; heads that `train` makes now do",
        )
    return reference.check(probabilities, independent)


def _shares(counts: np.ndarray) -> np.ndarray:
    """(M, BINS) counts as shares, with half a count in all more so that none is 0."""
    smooth = counts + 0.5 / BINS
    return np.asarray(smooth / smooth.sum(axis=1, keepdims=True))


def _misfits(
    observed: np.ndarray, same: np.ndarray, different: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of M observed histograms, (M, BINS) each: chi-square, fitted share of same pairs and total variation, (M,)."""
    count = observed.sum(axis=1, keepdims=True)
    s, d = _shares(same), _shares(different)
    share = np.full((len(observed), 1), 0.5)
    for _ in range(_STEPS):
        likely = share * s
        share = (observed * likely / (likely + (1 - share) * d)).sum(axis=1, keepdims=True) / count
    expected = count * (share * s + (1 - share) * d)
    noise = count**2 * (
        share**2 * s / same.sum(1, keepdims=True) + (1 - share) ** 2 * d / different.sum(1, keepdims=True)
    )
    chi = np.empty(len(observed))
    for row in range(len(observed)):
        starts = _joined(expected[row])
        gap, variance = (np.add.reduceat(each[row], starts) for each in (observed - expected, expected + noise))
        chi[row] = (gap**2 / variance).sum()
    return chi, share[:, 0], (np.abs(observed - expected).sum(axis=1, keepdims=True) / count / 2)[:, 0]


def _joined(expected: np.ndarray) -> list[int]:
    """The first bins of runs of bins that expect at least `_EXPECTED` scores each."""
    starts, total = [0], 0.0
    for index, each in enumerate(expected.tolist()):
        if total >= _EXPECTED and expected[index:].sum() >= _EXPECTED:
            starts.append(index)
            total = 0.0
        total += each
    return starts
