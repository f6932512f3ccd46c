"""Differential measures by loops as in the standard, rates of 0, draws."""

import math

import numpy as np
import pytest

from batchverify.evaluation.differentials import (
    MEASURES,
    gini,
    measure_differentials,
    worst_over_best,
    worst_over_gmean,
)

NOTHING = np.zeros((0, 3))


def slow_gini(rates) -> float:
    """The formula of NIST IR 8429, sum by sum."""
    count, mean, total = len(rates), sum(rates) / len(rates), 0.0
    for one in rates:
        for other in rates:
            total += abs(one - other)
    return count / (count - 1) * total / (2 * count * count * mean)


def slow_gmean(rates) -> float:
    product = 1.0
    for rate in rates:
        product *= rate
    return product ** (1 / len(rates))


@pytest.mark.parametrize("count", [2, 3, 10])
@pytest.mark.parametrize("seed", range(3))
def test_measures_are_those_of_loops(count, seed):
    rates = np.random.default_rng(seed).random((4, count)) / 10
    assert gini(rates) == pytest.approx([slow_gini(row) for row in rates.tolist()], abs=1e-12)
    ratios = [max(row) / slow_gmean(row) for row in rates.tolist()]
    assert worst_over_gmean(rates) == pytest.approx(ratios, rel=1e-12)
    assert worst_over_best(rates) == pytest.approx([max(row) / min(row) for row in rates.tolist()])


def test_equal_groups_and_one_bad_group_are_the_ends_of_the_scale():
    equal, one = np.full(5, 0.02), np.array([0.0, 0.0, 0.0, 0.0, 0.1])
    assert (float(gini(equal)), float(worst_over_gmean(equal))) == (pytest.approx(0), pytest.approx(1))
    assert (gini(np.full((3, 50), [[0.1], [0.003], [1 / 3]])) >= 0).all()
    # Without the factor G / (G - 1) it would be 0.8.
    assert float(gini(one)) == pytest.approx(1)


def test_a_rate_of_0_makes_a_ratio_at_least_what_its_bound_makes_it():
    rates, highest = np.array([0.0, 0.02, 0.04]), np.array([0.01, 1.0, 1.0])
    found = measure_differentials(list("abc"), rates, highest, NOTHING)
    assert (found["worst"], found["best"], found["reason"]) == ("c", "a", None)
    measures = found["measures"]
    assert measures["worst_over_gmean"]["value"] is None
    assert measures["worst_over_gmean"]["at_least"] == pytest.approx(0.04 / slow_gmean([0.01, 0.02, 0.04]))
    assert measures["worst_over_best"]["at_least"] == pytest.approx(4)
    # The Gini coefficient is defined, and lowest with the 0 at its bound.
    assert measures["gini"]["value"] == pytest.approx(slow_gini([0.0, 0.02, 0.04]))
    assert measures["gini"]["at_least"] == pytest.approx(slow_gini([0.01, 0.02, 0.04]))


@pytest.mark.parametrize("seed", range(10))
def test_at_least_is_the_lowest_value_with_zeros_anywhere_below_their_bounds(seed):
    rng = np.random.default_rng(seed)
    rates, highest = rng.random(4) * [0, 0, 1, 1], rng.random(4)
    found = measure_differentials(list("abcd"), rates, highest, np.zeros((0, 4)))["measures"]
    tried = np.where(rates == 0, np.maximum(rng.random((4000, 4)) * highest, 1e-9), rates)
    # Both zeros alike is one of the best choices.
    tried[2000:, :2] = np.minimum(tried[2000:, :1], highest[:2])
    for name, measure in MEASURES.items():
        lowest = measure(tried).min()
        assert found[name]["at_least"] <= lowest + 1e-9
        assert found[name]["at_least"] == pytest.approx(lowest, abs=0.05)


def test_a_bound_above_all_rates_says_nothing():
    found = measure_differentials(list("ab"), np.array([0.0, 0.02]), np.array([0.3, 1.0]), NOTHING[:, :2])
    assert found["measures"]["worst_over_best"]["at_least"] == 1


@pytest.mark.parametrize(
    ("rates", "reason"), [([0.0, 0.0], "no errors"), ([0.1], "needs two groups"), ([], "needs two groups")]
)
def test_what_cannot_be_compared_has_a_reason(rates, reason):
    count = len(rates)
    found = measure_differentials(list("ab")[:count], np.array(rates), np.ones(count), np.zeros((50, count)))
    assert (found["reason"], found["measures"], found["worst"]) == (reason, {}, None)


def test_intervals_are_quantiles_over_the_draws_and_may_have_no_upper_end():
    rng = np.random.default_rng(0)
    rates, drawn = np.array([0.1, 0.2]), rng.random((100, 2))
    found = measure_differentials(["a", "b"], rates, np.ones(2), drawn)["measures"]["worst_over_best"]
    ratios = [max(row) / min(row) for row in drawn.tolist()]
    assert found["interval"] == pytest.approx(np.quantile(ratios, [0.025, 0.975]))
    # Of groups alike: each drawn rate by the group's own.
    alike = sorted(max(a / 0.1, b / 0.2) / min(a / 0.1, b / 0.2) for a, b in drawn.tolist())
    assert found["by_chance"] == pytest.approx(alike[math.ceil(99 * 0.95)])
    drawn[:10, 0] = 0
    drawn[50] = np.nan
    found = measure_differentials(["a", "b"], rates, np.ones(2), drawn)["measures"]["worst_over_best"]
    low, high = found["interval"] or ()
    assert high == math.inf and 1 <= low < 2


def test_by_chance_holds_where_groups_are_alike():
    """Of equal groups the measure stays below `by_chance` about 95 times in 100."""
    above = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        rates = rng.binomial(2000, 0.05, 4) / 2000
        drawn = rng.binomial(2000, rates, (200, 4)) / 2000
        found = measure_differentials(list("abcd"), rates, np.ones(4), drawn)["measures"]["worst_over_gmean"]
        above += found["value"] > found["by_chance"]
    assert above <= 20
