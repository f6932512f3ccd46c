"""How often bounds, guaranteed thresholds and review bands hold: `python benchmarks/guarantees.py [DRAWS]`.

Draws of people whose true error rates are known. People differ: each has an own offset in all different pairs and
one in all same pairs, and a few look like everyone else (the wolves of Doddington et al. 1998). Pairs share people.
Each promise must hold at least as often as it says. Beside it stands the bound that takes pairs for independent.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass

import numpy as np

from batchverify.heads.bounds import Tail, disjoint_pairs, upper_bound
from batchverify.heads.review_band import ReviewBand

DRAWS = 2000
# In a draw: people, different pairs of each with others, same pairs of each.
PEOPLE, MATES, SHOTS = 800, 4, 3
CONFIDENCES = (0.9, 0.95, 0.99)
FAR, FRR = 0.02, 0.02
# Different pairs score like N(0, 1) in all, same pairs like N(-SAME_MEAN, 1).
SAME_MEAN = 4.0


@dataclass(frozen=True)
class Population:
    """How people differ.

    spread: share of the variance of scores that is the people's own. wolves: share of people whose different pairs
    score `bite` lower.
    """

    name: str
    spread: float
    wolves: float = 0.0
    bite: float = 0.0

    def far(self, logit: float) -> float:
        """The true share of different pairs of new people below a logit."""
        shares = [(1 - self.wolves) ** 2, 2 * self.wolves * (1 - self.wolves), self.wolves**2]
        return sum(share * _normal(logit + count * self.bite) for count, share in enumerate(shares))

    def frr(self, logit: float) -> float:
        """The true share of same pairs of new people at or above a logit."""
        return 1 - _normal(logit + SAME_MEAN)

    def logit_at(self, far: float) -> float:
        """The logit with this true false accept rate."""
        low, high = -40.0, 40.0
        for _ in range(80):
            middle = (low + high) / 2
            low, high = (middle, high) if self.far(middle) < far else (low, middle)
        return high


POPULATIONS = (
    Population("all alike", 0.0),
    Population("people differ", 0.4),
    Population("1 % wolves", 0.2, wolves=0.01, bite=2.5),
    Population("few strong wolves", 0.2, wolves=0.003, bite=6.0),
)


@dataclass(frozen=True)
class Sample:
    """A draw of people and their pairs. different: (N,) scores with their people a, b. same: (M,) with person c."""

    different: np.ndarray
    a: np.ndarray
    b: np.ndarray
    same: np.ndarray
    c: np.ndarray

    @classmethod
    def of(cls, population: Population, seed: int, people: int = PEOPLE) -> Sample:
        """Draw people, pairs and scores."""
        rng = np.random.default_rng(seed)
        own, rest = math.sqrt(population.spread / 2), math.sqrt(1 - population.spread)
        offset = rng.normal(0, own, people) - population.bite * (rng.random(people) < population.wolves)
        a = np.repeat(np.arange(people), MATES)
        b = (a + rng.integers(1, people, len(a))) % people
        different = offset[a] + offset[b] + rng.normal(0, rest, len(a))
        c = np.repeat(np.arange(people), SHOTS)
        person = rng.normal(-SAME_MEAN, math.sqrt(population.spread), people)
        same = person[c] + rng.normal(0, rest, len(c))
        return cls(_sigmoid(different), a, b, _sigmoid(same), c)

    def tails(self) -> tuple[np.ndarray, Tail, Tail]:
        """The scores of different pairs that share nobody, and the tails of both kinds, as a head stores them."""
        unseen = self.different[disjoint_pairs(self.a, self.b)]
        same = self.same[disjoint_pairs(self.c, self.c)]
        return unseen, Tail.of(unseen), Tail.of(same, highest=True)


@dataclass(frozen=True)
class Outcome:
    """Shares of draws in which promises held, by confidence, and the mean true error rates of the band.

    bounds: upper bounds of a fixed threshold. naive: those that take pairs for independent. thresholds: those whose
    bound is FAR. far, frr: of the band's two thresholds; review: the mean share of pairs that it leaves open.
    """

    bounds: dict[float, float]
    naive: dict[float, float]
    thresholds: dict[float, float]
    far: float
    frr: float
    review: float


def simulate(population: Population, draws: int, people: int = PEOPLE) -> Outcome:
    """Draw people so often and count."""
    fixed = population.logit_at(FAR)
    counts = {name: dict.fromkeys(CONFIDENCES, 0) for name in ("bounds", "naive", "thresholds")}
    rates = np.zeros(3)
    for seed in range(draws):
        sample = Sample.of(population, seed, people)
        unseen, different, same = sample.tails()
        stored = {"unit": "people", "different": different.to_json(), "same": same.to_json()}
        band = ReviewBand.of({"best_f1": 0.5, "bounds": stored}, FAR, FRR)
        for confidence in CONFIDENCES:
            at = np.float32(_sigmoid(np.array([fixed]))[0])
            for name, scores in (("bounds", unseen), ("naive", sample.different)):
                counts[name][confidence] += upper_bound(int((scores < at).sum()), len(scores), confidence) >= FAR
            threshold = different.bounded(FAR, confidence)
            holds = threshold is None or population.far(_logit(threshold)) <= FAR
            counts["thresholds"][confidence] += holds
        low, high = _logit(band.same_below), _logit(band.different_from)
        open_share = (population.far(high) - population.far(low) + population.frr(low) - population.frr(high)) / 2
        rates += np.array([population.far(low), population.frr(high), open_share])
    shares = {name: {each: held / draws for each, held in kinds.items()} for name, kinds in counts.items()}
    far, frr, review = (rates / draws).tolist()
    return Outcome(shares["bounds"], shares["naive"], shares["thresholds"], far, frr, review)


def main(draws: int) -> None:
    """Print a table for each population."""
    errors = ", ".join(f"{(each * (1 - each) / draws) ** 0.5:.4f} at {each:g}" for each in CONFIDENCES)
    print(f"{draws:,} draws of {PEOPLE} people; rates {FAR:g} and {FRR:g}; standard errors of shares {errors}")
    for population in POPULATIONS:
        found = simulate(population, draws)
        print(f"\n{population.name}\n{'promised':>28} {'bound':>8} {'threshold':>10} {'pairs as if independent':>24}")
        for each in CONFIDENCES:
            row = f"{found.bounds[each]:8.3f} {found.thresholds[each]:10.3f} {found.naive[each]:24.3f}"
            print(f"{each:>28.2f} {row}")
        print(
            f"  band: false accepts {found.far:.4f}, false rejects {found.frr:.4f}, for review {found.review:.3f} of "
            "each kind's pairs"
        )


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    return (1 / (1 + np.exp(-logits))).astype(np.float32)


def _logit(score: float) -> float:
    return math.log(score) - math.log1p(-score) if 0 < score < 1 else math.copysign(40.0, score - 0.5)


def _normal(value: float) -> float:
    return (1 + math.erf(value / math.sqrt(2))) / 2


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else DRAWS)
