"""Bounds of error rates that hold whatever people are like: counts among pairs that share nobody.

Pairs that share people are not independent, however many there are: a person who looks like many others is in many
wrong pairs, or in none if the sample missed them. Pairs that share nobody are, so counts among them are binomial.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from batchverify.errors import UsageError

# The confidences whose bounds a head stores; others are computed from its tails.
CONFIDENCES = (0.9, 0.95, 0.99)
UNITS = ("people", "images")
# Ranks that a stored tail keeps. All up to some dozens, then every second, third and so on.
MOST_RANKS = 250
# Pairs that share nobody, which a head may say that its bounds were counted from.
MOST_PAIRS = 10_000_000
# Steps of a bisection: beyond the digits of a float.
_STEPS = 100


def disjoint_pairs(a: np.ndarray, b: np.ndarray, seed: int = 0) -> np.ndarray:
    """Indices of pairs that share no unit with each other, at random, sorted; no further pair would fit.

    a, b: (N,) integers, the unit (person or image) of each side. The choice knows no scores: in a random order, each
    pair is taken whose units are still free. These are at least half as many as the most that fit.
    """
    rows = np.random.default_rng(seed).permutation(len(a))
    _, units = np.unique(np.stack([a[rows], b[rows]], axis=1), return_inverse=True)
    ends = units.reshape(-1, 2)
    chosen, used = [np.zeros(0, np.int64)], np.zeros(ends.size, np.bool_)
    while len(rows):
        leads = _leads(ends, len(used))
        chosen.append(rows[leads])
        used[ends[leads]] = True
        left = ~used[ends].any(axis=1)
        ends, rows = ends[left], rows[left]
    return np.sort(np.concatenate(chosen))


def count_disjoint(a: np.ndarray, b: np.ndarray, kinds: np.ndarray, count: int, *, seed: int = 0) -> np.ndarray:
    """(count,) int64: of each kind, a number of pairs of which no two share a unit, at least half the highest.

    a, b: (N,) units of both sides. kinds: (N,) int64 below `count`.
    """
    most = int(max(a.max(initial=0), b.max(initial=0))) + 1
    chosen = disjoint_pairs(kinds * most + a, kinds * most + b, seed)
    return np.bincount(kinds[chosen], minlength=count)


def _leads(ends: np.ndarray, units: int) -> np.ndarray:
    """(N,) bool: pairs whose units no earlier pair has. ends: (N, 2) units."""
    rows = np.arange(len(ends))
    first = np.full(units, -1, np.int64)
    # Of several values for one place the last one stays.
    first[ends[::-1].ravel()] = np.repeat(rows[::-1], 2)
    return np.asarray((first[ends] == rows[:, None]).all(axis=1))


def matched_people(groups: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Positions of (M,) first and second images of M different pairs in which each person appears at most once.

    groups: (N,) integers, the person of each image. People are matched at random, with a random image of each.
    """
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(len(groups))
    _, first = np.unique(groups[shuffled], return_index=True)
    images = rng.permutation(shuffled[first])
    half = len(images) // 2
    return images[:half], images[half : 2 * half]


def at_most(errors: int, trials: int, rate: float) -> float:
    """The probability of at most so many errors in so many independent trials of this rate (0 < rate < 1)."""
    if errors >= trials:
        return 1.0
    counts = np.arange(errors)
    steps = np.log((trials - counts) / (counts + 1)) + math.log(rate) - math.log1p(-rate)
    logs = trials * math.log1p(-rate) + np.concatenate([np.zeros(1), np.cumsum(steps)])
    return min(1.0, math.exp(float(np.logaddexp.reduce(logs))))


def upper_bound(errors: int, trials: int, confidence: float) -> float:
    """The rate that is exceeded by the truth in a share 1 - confidence of samples at most.

    Source: Clopper & Pearson 1934, one-sided. Without errors in n trials it is 1 - (1 - confidence)^(1/n), which is
    about 3/n at 95 % (the rule of three); without trials it is 1.
    """
    if errors >= trials:
        return 1.0
    low, high = errors / trials, 1.0
    for _ in range(_STEPS):
        middle = (low + high) / 2
        if not low < middle < high:
            break
        low, high = (middle, high) if at_most(errors, trials, middle) > 1 - confidence else (low, middle)
    return high


def needed_trials(rate: float, confidence: float) -> int:
    """The fewest independent trials without any error whose upper bound is at most `rate`."""
    return math.ceil(math.log1p(-confidence) / math.log1p(-rate))


@dataclass(frozen=True)
class Tail:
    """The worst scores of pairs that share nobody.

    pairs: how many such pairs there were. ranks: ascending from 1. scores: by rank; ascending for different pairs,
    descending for same pairs, as float32 numbers.
    """

    pairs: int
    ranks: tuple[int, ...]
    scores: tuple[float, ...]

    @classmethod
    def of(cls, scores: np.ndarray, *, highest: bool = False) -> Tail:
        """The tail of (N,) float32 scores: the lowest ones, or the highest."""
        ordered = np.sort(scores)[::-1] if highest else np.sort(scores)
        count = len(ordered)
        spaced = np.unique(np.geomspace(1, max(count, 1), MOST_RANKS).astype(np.int64))
        ranks = spaced[spaced <= count]
        return cls(count, tuple(ranks.tolist()), tuple(float(score) for score in ordered[ranks - 1]))

    def at(self, rank: int) -> float | None:
        """The score of the highest stored rank up to this one, which is on the safe side; None for a rank below 1."""
        index = int(np.searchsorted(self.ranks, rank, side="right")) - 1
        return self.scores[index] if index >= 0 else None

    def bounded(self, rate: float, confidence: float) -> float | None:
        """The score beyond which, with this confidence, lies at most a share `rate` of the scores of other people.

        None if there are too few pairs. Of n independent scores the k-th has more than `rate` beyond it with the
        probability of at most k - 1 among n trials. Source: Wilks 1941, Determination of sample sizes for setting
        tolerance limits; Tong, Feng & Li 2018, Neyman-Pearson classification algorithms.
        """
        low, high = 0, self.pairs
        while low < high:
            middle = (low + high + 1) // 2
            fits = at_most(middle - 1, self.pairs, rate) <= 1 - confidence
            low, high = (middle, high) if fits else (low, middle - 1)
        return self.at(low)

    def conformal(self, rate: float) -> float | None:
        """The score beyond which the score of one more pair, of other people, lies with probability `rate` at most.

        None if there are too few pairs: it takes 1 / rate - 1. Source: Vovk, Gammerman & Shafer 2005, Algorithmic
        learning in a random world; Angelopoulos & Bates 2023, Conformal prediction: a gentle introduction. One pair
        of each person, as Dunn, Wasserman & Ramdas 2023, Distribution-free prediction sets for two-layer
        hierarchical models (their subsampling).
        """
        # As floats, 0.01 * 100 may be a little below 1.
        return self.at(math.floor(rate * (self.pairs + 1) * (1 + 1e-12)))

    def to_json(self) -> dict[str, Any]:
        """For a head's metadata."""
        return {"pairs": self.pairs, "ranks": list(self.ranks), "scores": list(self.scores)}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Tail:
        """Read and check what `to_json` wrote. Raises `ValueError`, `TypeError` or `LookupError`."""
        pairs = int(stored["pairs"])
        if not 0 <= pairs <= MOST_PAIRS:
            raise ValueError(f"its bounds are of {pairs} pairs")
        ranks = tuple(int(rank) for rank in stored["ranks"])
        scores = tuple(float(score) for score in stored["scores"])
        rising = all(one < other for one, other in pairwise(ranks))
        if len(ranks) != len(scores) or not rising or not all(1 <= rank <= pairs for rank in ranks):
            raise ValueError("the ranks of its bounds do not fit")
        if not all(0 <= score <= 1 for score in scores):
            raise ValueError("the scores of its bounds do not lie between 0 and 1")
        return cls(pairs, ranks, scores)


def stored_tails(stored: Mapping[str, Any], option: str) -> tuple[Tail, Tail, str]:
    """The tails of different and of same pairs in a head's thresholds, and their unit: `people` or `images`.

    option: the one that needs them, for the message. Raises `UsageError` for a head that holds none.
    """
    if "bounds" not in stored:
        raise UsageError(
            f"{option}: the head holds no bounds, since it was fitted by an older version: fit it anew, or run "
            "`batchverify calibrate` on labelled pairs"
        )
    bounds = stored["bounds"]
    return Tail.from_json(bounds["different"]), Tail.from_json(bounds["same"]), str(bounds["unit"])


def guaranteed_threshold(stored: Mapping[str, Any], far: float, confidence: float) -> float:
    """The highest threshold whose false accept rate is at most `far` with this confidence.

    stored: the thresholds in a head's metadata. Raises `UsageError` if its pairs cannot promise that.
    """
    option = f"--at-far {far:g} --confidence {confidence:g}"
    tail, _, unit = stored_tails(stored, option)
    threshold = tail.bounded(far, confidence)
    if threshold is None:
        needed = needed_trials(far, confidence)
        raise UsageError(
            f"{option}: the pairs behind the head cannot promise this: it takes {needed:,} different pairs that "
            f"share no {unit} ({2 * needed:,} {unit}), and there were {tail.pairs:,}; ask for a higher rate or a "
            "lower confidence, or run `batchverify calibrate` on more labelled pairs"
        )
    return threshold
