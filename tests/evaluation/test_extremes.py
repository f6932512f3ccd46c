"""Extrapolated rates against exact tails of known distributions, and the fit against scipy's."""

import numpy as np
import pytest
from scipy import stats

from batchverify.evaluation.extremes import extrapolate, extreme_lines
from batchverify.evaluation.figures import MeasuredPairs
from batchverify.evaluation.pareto_tail import Tail, fit_tail, refusal
from batchverify.heads.prior import Units

KNOWN = [stats.norm(0, 0.15), stats.beta(20, 30), stats.t(8), stats.expon()]


@pytest.mark.parametrize("shape", [-0.3, 0.0, 0.3])
def test_the_likelihood_is_at_least_that_of_scipy(shape):
    drawn = stats.genpareto(shape, scale=2).rvs(3000, random_state=1)
    scores = np.concatenate([-np.arange(1.0, 200_000), [0.0], drawn])
    tail = fit_tail(scores, size=3000)
    assert tail.start == 0
    theirs = stats.genpareto.fit(drawn, floc=0)
    ours = stats.genpareto(tail.shape, scale=tail.scale).logpdf(drawn).sum()
    assert ours >= stats.genpareto.logpdf(drawn, *theirs).sum() - 1e-3
    assert tail.shape == pytest.approx(shape, abs=0.06) and tail.scale == pytest.approx(2, abs=0.15)


@pytest.mark.parametrize("shape", [-0.2, 0.0, 0.2])
def test_levels_and_rates_are_those_of_the_distribution(shape):
    tail = Tail(0.3, 0.01, shape, 0.05)
    exact = stats.genpareto(shape, loc=0.3, scale=0.05)
    assert tail.level(1e-5) == pytest.approx(exact.isf(1e-3))
    assert tail.rate(0.4) == pytest.approx(0.01 * exact.sf(0.4))
    assert tail.rate(tail.level(1e-6)) == pytest.approx(1e-6)


@pytest.mark.parametrize("known", KNOWN)
def test_extrapolated_thresholds_have_the_rates_that_they_promise(known):
    """Twenty samples of 20,000 pairs each: the median of the true rates is within a factor of 2.5 of 1e-5."""
    found = []
    for seed in range(20):
        tail = fit_tail(known.rvs(20_000, random_state=seed))
        found.append(known.sf(tail.level(1e-5)))
    assert 0.4e-5 <= np.median(found) <= 2.5e-5


def test_tails_that_cannot_be_extrapolated_are_refused():
    rng = np.random.default_rng(0)
    assert refusal(rng.normal(size=20_000)) is None
    assert refusal(rng.normal(size=1000)) == "needs 100 different pairs in the tail, 51 available"
    assert refusal(rng.normal(size=20_000).round(1)) == "too many equal scores in the tail"
    assert "shape" in str(refusal(rng.standard_cauchy(20_000)))
    mixed = np.concatenate([rng.normal(size=20_000), rng.normal(9, 0.1, 100)])
    assert refusal(mixed) is not None


def test_pairs_are_extrapolated_with_intervals_that_hold_the_truth():
    """Log-odds of different pairs are normal with mean 6: the exact thresholds are known."""
    rng = np.random.default_rng(3)
    odds = np.concatenate([rng.normal(6, 2, 20_000), rng.normal(-4, 2, 500)])
    truth = np.repeat([1, 0], [20_000, 500])
    exact = {rate: stats.norm(6, 2).ppf(rate) for rate in (1e-5, 1e-6)}
    pairs = MeasuredPairs(truth, (1 / (1 + np.exp(-odds))).astype(np.float32), 1 / (1 + np.exp(3.5)))
    units = Units("pairs", np.arange(20_500), np.arange(20_500), 20_500)
    found = extrapolate(pairs, units)
    assert found["reason"] is None and found["pairs"] == 20_000
    for row in found["rates"]:
        assert row["interval"] is not None
        low, high = row["interval"]
        assert low <= 1 / (1 + np.exp(-exact[row["far"]])) <= high
        assert low <= row["threshold"] <= high
    few = extrapolate(pairs.subset(np.arange(500)), None)
    assert "needs 100" in str(few["reason"]) and few["rates"] == [] and few["at_threshold"] is None


def test_people_who_may_be_missing_are_said():
    rng = np.random.default_rng(4)
    odds = rng.normal(6, 2, 5000)
    pairs = MeasuredPairs(np.ones(5000, np.int64), (1 / (1 + np.exp(-odds))).astype(np.float32), 0.01)
    a = rng.integers(0, 399, 5000)
    found = extrapolate(pairs, Units("identities", a, a + 1, 1000))
    assert found["reason"] is None
    assert found["units"] == 400 and found["unseen"] == pytest.approx(1 - 0.05 ** (1 / 400))
    lines = list(extreme_lines(found))
    assert [name for name, _ in lines] == ["FAR 1e-05 extrapolated", "FAR 1e-06 extrapolated", ""]
    assert "if these 400 stand for all: a kind of people that makes up 0.75% or less" in lines[2][1]
    assert extrapolate(pairs, Units("pairs", a, a, 1000))["unseen"] is None
    assert list(extreme_lines(extrapolate(pairs.subset(a < 10), None))) == []
