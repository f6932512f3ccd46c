"""Intervals of extrapolated tails: against a slow profile likelihood, and how often they hold."""

import math

import numpy as np
import pytest
from scipy import optimize, stats

from batchverify.evaluation.pareto_tail import SHAPES, fit_tail
from batchverify.evaluation.tail_intervals import (
    NEAR,
    TailIntervals,
    TailLikelihood,
    inflation,
    level_at,
    log_rate_at,
)
from batchverify.heads.prior import Units


def alone(count: int) -> Units:
    return Units("pairs", np.arange(count), np.arange(count), count)


def likelihood_of(scores: np.ndarray) -> TailLikelihood:
    tail = fit_tail(scores)
    return TailLikelihood.of(scores[scores > tail.start] - tail.start, tail)


def slow_end(scores: np.ndarray, rate: float, side: int) -> float:
    """The end of the profile likelihood interval: the level at which the best likelihood has fallen far enough."""
    tail = fit_tail(scores)
    excess, count = scores[scores > tail.start] - tail.start, len(scores)
    beyond = len(excess)

    def likely(share: float, scale: float, shape: float) -> float:
        binomial = beyond * math.log(share) + (count - beyond) * math.log1p(-share)
        return float(binomial + stats.genpareto.logpdf(excess, shape, scale=scale).sum())

    def profile(level: float) -> float:
        """The highest likelihood of all tails with this level."""

        def cost(point: np.ndarray) -> float:
            share, shape = tail.share * math.exp(point[0]), float(np.clip(point[1], *SHAPES))
            found = -likely(share, (level - tail.start) / stats.genpareto.isf(rate / share, shape), shape)
            return min(found, 1e9)

        return -float(optimize.minimize(cost, [0.0, tail.shape], method="Nelder-Mead", tol=1e-6).fun)

    best, middle = likely(tail.share, tail.scale, tail.shape), tail.level(rate)
    end = tail.start + 0.3 * (middle - tail.start) if side < 0 else middle + 4 * (middle - tail.start)
    return float(optimize.brentq(lambda level: profile(level) - best + NEAR / 2, middle, end, xtol=1e-4))


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("rate", [1e-4, 1e-5])
def test_the_interval_is_that_of_the_profile_likelihood(seed, rate):
    scores = np.random.default_rng(seed).logistic(size=8000)
    likely = likelihood_of(scores)
    low, high = likely.span(level_at(likely.tail.start, rate), 1.0)
    assert low == pytest.approx(slow_end(scores, rate, -1), rel=0.01)
    assert high == pytest.approx(slow_end(scores, rate, 1), rel=0.02)


@pytest.mark.parametrize("shape", [-0.2, 0.0, 0.3])
def test_levels_and_rates_are_those_of_the_distribution(shape):
    share, scale, shapes = (np.array([value]) for value in (0.02, 0.5, shape))
    level = float(level_at(1.0, 1e-5)(share, scale, shapes)[0])
    assert level == pytest.approx(stats.genpareto.isf(1e-5 / 0.02, shape, loc=1.0, scale=0.5))
    assert math.exp(log_rate_at(1.0, level)(share, scale, shapes)[0]) == pytest.approx(1e-5)


def test_no_score_lies_beyond_a_finite_end():
    share, scale, shape = (np.array([value]) for value in (0.02, 0.5, -0.25))
    assert log_rate_at(1.0, 1.0 + 0.5 / 0.25 + 0.1)(share, scale, shape)[0] == -np.inf


def test_pairs_that_are_there_four_times_count_once():
    scores = np.repeat(np.random.default_rng(0).logistic(size=5000), 4)
    tail = fit_tail(scores)
    quantity = level_at(tail.start, 1e-5)
    a = np.repeat(np.arange(5000), 4)
    assert inflation(scores, tail, Units("people", a, a + 5000, 10_000), quantity) == pytest.approx(4)
    assert inflation(scores, tail, alone(len(scores)), quantity) == pytest.approx(1)
    assert inflation(scores, tail, None, quantity) == 1


def test_people_who_look_alike_widen_the_interval():
    rng = np.random.default_rng(1)
    a = np.repeat(np.arange(400), 25)
    b = (a + rng.integers(1, 400, len(a))) % 400
    own = rng.normal(0, 1, 400)
    scores = own[a] + own[b] + rng.normal(0, 0.2, len(a))
    people = Units("people", a, b, 400)
    likely = likelihood_of(scores)
    quantity = level_at(likely.tail.start, 1e-3)
    factor = inflation(scores, likely.tail, people, quantity)
    assert factor > 2
    (low, high), (narrow_low, narrow_high) = (likely.span(quantity, each) for each in (factor, 1.0))
    assert high - low > 1.3 * (narrow_high - narrow_low)


@pytest.mark.parametrize("noise", [stats.logistic(), stats.norm(), stats.beta(20, 30)])
def test_intervals_hold_the_truth(noise):
    """Of 25 samples: with 95 % each, fewer than 21 has a probability of 0.7 %."""
    held = 0
    for seed in range(25):
        scores = noise.rvs(10_000, random_state=seed)
        low, high = TailIntervals.of(scores, None).of_level(1e-6)
        held += low <= noise.isf(1e-6) <= high
    assert held >= 21


def test_the_rate_at_a_threshold_has_an_interval_that_holds_it():
    scores = np.random.default_rng(2).normal(size=20_000)
    low, high = TailIntervals.of(scores, alone(20_000)).of_rate(4.6)
    assert low < stats.norm.sf(4.6) < high


def test_equal_scores_at_the_end_make_no_shorter_tail():
    scores = np.random.default_rng(5).logistic(size=10_000)
    ends = np.sort(scores)[-30]
    few = TailIntervals.of(np.minimum(scores, ends), alone(10_000))
    assert len(TailIntervals.of(scores, alone(10_000)).tails) == 3 > len(few.tails) >= 1
    low, high = few.of_level(1e-6)
    assert low < high
