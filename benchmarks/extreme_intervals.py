"""Whether intervals of extrapolated rates hold the truth: `python benchmarks/extreme_intervals.py [--faces FILE]`.

Two tables. Simulated people whose exact thresholds are known: people differ, pairs share people, a few people look
like everyone else. And vectors of real faces (`--faces`: an .npz with `vectors`, (N, D), and `people`, (N,)): people
are drawn from them, and couples of these, while all couples of all people count the truth. Printed is how often a
sample is refused, how often the 95 % interval holds the true threshold, and at which true rate the extrapolated
threshold lies.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import click
import numpy as np
from results import publish, table
from scipy import optimize, stats

from batchverify.evaluation.extremes import RATES
from batchverify.evaluation.pareto_tail import fit_tail, refusal
from batchverify.evaluation.tail_intervals import TailIntervals
from batchverify.heads.prior import Units

DRAWS = 400
# People and different pairs of each with others.
SIZES = ((2500, 4), (400, 25))
# Of real faces: people and couples in a draw.
FACES = (400, 10_000)
HEADER = ["pairs", "refused", *(f"{rate:g}: {name}" for rate in RATES for name in ("covers", "FAR there"))]
NOTE = (
    "covers: share of the samples that were not refused whose 95 % interval holds the true threshold; FAR there: the "
    "true rate at the extrapolated threshold, median (10 % to 90 %). Standard error of a share of .95: {error:.3f}."
)


@dataclass(frozen=True)
class Population:
    """How scores of different pairs are distributed; higher is more alike.

    noise: the distribution of a pair's own part. spread: the standard deviation of a person's part, of which a pair
    has two. wolves, bite: the share of people whose pairs all score `bite` higher.
    """

    name: str
    noise: stats.rv_continuous
    spread: float = 0.0
    wolves: float = 0.0
    bite: float = 0.0

    def far(self, level: float) -> float:
        """The true share of pairs that score higher."""
        nodes, weights = np.polynomial.hermite_e.hermegauss(80)
        weights, shifts = weights / weights.sum(), math.sqrt(2) * self.spread * nodes
        shares = ((1 - self.wolves) ** 2, 2 * self.wolves * (1 - self.wolves), self.wolves**2)
        each = [float(weights @ self.noise.sf(level - shifts - count * self.bite)) for count in range(3)]
        return float(np.dot(shares, each))

    def level(self, rate: float) -> float:
        """The score with this true rate."""
        return float(optimize.brentq(lambda level: math.log(self.far(level) + 1e-300) - math.log(rate), -5, 60))

    def draw(self, rng: np.random.Generator, people: int, mates: int) -> tuple[np.ndarray, Units]:
        """The scores of (people * mates,) pairs, and their people."""
        own = rng.normal(0, 1, people) * self.spread + self.bite * (rng.random(people) < self.wolves)
        a = np.repeat(np.arange(people), mates)
        b = (a + rng.integers(1, people, len(a))) % people
        scores = own[a] + own[b] + self.noise.rvs(len(a), random_state=rng)
        return scores, Units("identities", a, b, people)


POPULATIONS = (
    Population("logistic", stats.logistic()),
    Population("logistic, people differ", stats.logistic(), spread=0.8),
    Population("normal", stats.norm()),
    Population("normal, people differ", stats.norm(scale=math.sqrt(0.6)), spread=math.sqrt(0.2)),
    Population("bounded (beta)", stats.beta(20, 30)),
    Population("bounded (uniform sum), people differ", stats.beta(4, 4), spread=0.05),
    Population("heavy (t, 8 degrees)", stats.t(8)),
    Population("1 % wolves", stats.norm(scale=math.sqrt(0.8)), math.sqrt(0.1), wolves=0.01, bite=2.5),
    Population("few strong wolves", stats.norm(scale=math.sqrt(0.8)), math.sqrt(0.1), wolves=0.003, bite=6.0),
)


@dataclass
class Tally:
    """What samples of one kind said. levels: the true thresholds. far: the true rate at any threshold."""

    levels: list[float]
    far: Callable[[float], float]
    refused: int = 0
    covered: list[int] = field(default_factory=lambda: [0] * len(RATES))
    found: list[list[float]] = field(default_factory=lambda: [[] for _ in RATES])

    def add(self, scores: np.ndarray, units: Units) -> None:
        """Extrapolate one sample."""
        if refusal(scores) is not None:
            self.refused += 1
            return
        tail, likely = fit_tail(scores), TailIntervals.of(scores, units)
        for place, (rate, level) in enumerate(zip(RATES, self.levels, strict=True)):
            low, high = likely.of_level(rate)
            self.covered[place] += low <= level <= high
            self.found[place].append(self.far(tail.level(rate)))

    def row(self, pairs: int) -> list[str]:
        """For the table."""
        done = [len(each) for each in self.found]
        cells = [f"{pairs:,}", f"{self.refused / (self.refused + done[0]):.2f}"]
        for held, rates in zip(self.covered, self.found, strict=True):
            low, middle, high = np.quantile(rates, [0.1, 0.5, 0.9])
            cells += [f"{held / len(rates):.3f}", f"{middle:.1e} ({low:.0e} to {high:.0e})"]
        return cells


def simulated(population: Population, people: int, mates: int, draws: int) -> list[str]:
    """A row of the table."""
    tally = Tally([population.level(rate) for rate in RATES], population.far)
    for seed in range(draws):
        tally.add(*population.draw(np.random.default_rng((seed, people)), people, mates))
    return [population.name, f"{people:,}", *tally.row(people * mates)]


class Faces:
    """Vectors of real faces, and the cosines of all couples of two people, of which the highest are kept."""

    KEPT = 0.02
    BLOCK = 500

    def __init__(self, path: Path) -> None:
        stored = np.load(path)
        vectors = stored["vectors"].astype(np.float32)
        self.unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        self.codes = np.unique(stored["people"], return_inverse=True)[1]
        self.images = [np.flatnonzero(self.codes == code) for code in range(self.codes.max() + 1)]
        self.couples, parts = 0, []
        for start in range(0, len(self.unit), self.BLOCK):
            rows = np.arange(start, min(start + self.BLOCK, len(self.unit)))
            others = np.arange(start, len(self.unit))
            wanted = (others > rows[:, None]) & (self.codes[rows][:, None] != self.codes[others])
            cosines = (self.unit[rows] @ self.unit[start:].T)[wanted]
            self.couples += len(cosines)
            least = max(int(len(cosines) * (1 - self.KEPT)), 0)
            parts.append(np.partition(cosines, least)[least:])
        self.tail = np.sort(np.concatenate(parts))

    def far(self, level: float) -> float:
        """The counted share of couples that score higher; for levels in the tail that was kept."""
        return (len(self.tail) - np.searchsorted(self.tail, level, side="right")) / self.couples

    def level(self, rate: float) -> float:
        """The score that a share `rate` of all couples exceeds."""
        return float(self.tail[-max(round(rate * self.couples), 1)])

    def draw(self, rng: np.random.Generator, people: int, couples: int) -> tuple[np.ndarray, Units]:
        """Cosines of couples of images of some people."""
        chosen = rng.choice(len(self.images), people, replace=False)
        images = np.concatenate([self.images[code] for code in chosen])
        a, b = rng.choice(images, (2, 3 * couples))
        apart = np.flatnonzero(self.codes[a] != self.codes[b])[:couples]
        a, b = a[apart], b[apart]
        scores = np.einsum("ij,ij->i", self.unit[a], self.unit[b])
        return scores, Units("identities", self.codes[a], self.codes[b], len(self.images))


def counted(path: Path, draws: int) -> list[str]:
    """A row of the table."""
    faces = Faces(path)
    tally = Tally([faces.level(rate) for rate in RATES], faces.far)
    for seed in range(draws):
        tally.add(*faces.draw(np.random.default_rng(seed), *FACES))
    about = f"{path.stem}: {len(faces.unit):,} images of {len(faces.images):,} people"
    return [about, f"{FACES[0]:,}", *tally.row(FACES[1])]


@click.command(help=__doc__)
@click.option("--draws", default=DRAWS, show_default=True)
@click.option("--faces", multiple=True, type=click.Path(exists=True, path_type=Path), help="Vectors, people.")
@click.option("--only", help="Populations whose name holds this.")
@click.option("--record", is_flag=True, help="Put the table into RESULTS.md.")
def main(draws: int, faces: tuple[Path, ...], only: str | None, record: bool) -> None:
    """Print the table."""
    rows = []
    for population in POPULATIONS:
        if only is None or only in population.name:
            for size in SIZES:
                rows.append(simulated(population, *size, draws))
                print(rows[-1], flush=True)
    for path in faces:
        rows.append(counted(path, draws))
        print(rows[-1], flush=True)
    body = table(["people", "drawn", *HEADER], rows)
    body += f"\n\n{draws} draws each. {NOTE.format(error=(0.95 * 0.05 / draws) ** 0.5)}"
    publish("Intervals of extrapolated rates", "python benchmarks/extreme_intervals.py", body, record=record)


if __name__ == "__main__":
    main()
