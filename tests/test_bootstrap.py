"""The bootstrap: weights of pairs by hand, the same draws from the same seed, coverage of what it promises."""

import numpy as np
import pytest

from batchverify.bootstrap import Units, bootstrap


def slow_weights(units: Units, seed) -> list[int]:
    """Draw the units one by one and count how often each side came."""
    drawn = np.random.default_rng(seed).integers(0, units.count, units.count).tolist()
    weights = []
    for a, b in zip(units.a.tolist(), units.b.tolist(), strict=True):
        weights.append(drawn.count(a) if a == b else drawn.count(a) * drawn.count(b))
    return weights


def draw_units(seed, pairs=60, count=12) -> Units:
    rng = np.random.default_rng(seed)
    a, b = rng.integers(0, count, (2, pairs)).astype(np.int32)
    return Units("identities", a, b, count)


@pytest.mark.parametrize("seed", range(5))
def test_a_pair_weighs_the_product_of_its_sides_counts(seed):
    units = draw_units(seed)
    assert units.weights((7, seed)).tolist() == slow_weights(units, (7, seed))


def test_intervals_are_quantiles_over_the_draws():
    units, values = draw_units(0), np.linspace(0, 1, 60)

    def mean(weights):
        return {"mean": float(weights @ values / weights.sum()), "never": float("nan")}

    found = bootstrap(units, mean, draws=100, seed=3)
    slow = [mean(np.array(slow_weights(units, (3, number))))["mean"] for number in range(100)]
    assert found.spans == {
        "mean": (pytest.approx(np.quantile(slow, 0.025)), pytest.approx(np.quantile(slow, 0.975)))
    }
    assert (found.draws, found.unit, found.units) == (100, "identities", 12)
    assert bootstrap(units, mean, draws=100, seed=3) == found
    assert bootstrap(units, mean, draws=100, seed=4) != found


def test_too_few_draws_that_say_something_make_no_interval():
    units = draw_units(0)
    assert bootstrap(units, lambda weights: {"one": 1.0}, draws=39).spans == {}
    assert bootstrap(units, lambda weights: {"one": 1.0}, draws=40).spans == {"one": (1.0, 1.0)}


def test_intervals_over_identities_hold_the_truth_where_pairs_share_people():
    """People differ in how often their own pairs are rejected: intervals over pairs would be far too narrow."""
    people, each, covered, naive = 60, 20, 0, 0
    side = np.repeat(np.arange(people, dtype=np.int32), each)
    units = Units("identities", side, side, people)
    for seed in range(60):
        rng = np.random.default_rng(seed)
        wrong = rng.random(people * each) < np.repeat(rng.beta(0.2, 1.8, people), each)
        low, high = bootstrap(
            units, lambda weights, wrong=wrong: {"frr": weights @ wrong / weights.sum()}, draws=100, seed=seed
        ).spans["frr"]
        covered += low <= 0.1 <= high
        naive += abs(wrong.mean() - 0.1) <= 1.96 * (wrong.mean() * (1 - wrong.mean()) / len(wrong)) ** 0.5
    assert covered >= 50
    assert naive <= 45
