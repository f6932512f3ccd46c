"""The bootstrap: weights by hand, the same draws from a seed, coverage; bounds of pairs that share no unit."""

from itertools import combinations

import numpy as np
import pytest
from scipy.stats import binomtest

from batchverify.evaluation.bootstrap import bootstrap, exact_span, with_exact_bounds
from batchverify.heads.bounds import count_disjoint
from batchverify.heads.prior import Units

FLAT = {"far": (0.0, 0.0), "recall": (1.0, 1.0), "precision": (1.0, 1.0), "f1": (1.0, 1.0), "auc": (1.0, 1.0)}


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
    assert found == {"mean": (pytest.approx(np.quantile(slow, 0.025)), pytest.approx(np.quantile(slow, 0.975)))}
    assert bootstrap(units, mean, draws=100, seed=3) == found
    assert bootstrap(units, mean, draws=100, seed=4) != found


def test_too_few_defined_draws_make_no_interval():
    units = draw_units(0)
    assert bootstrap(units, lambda weights: {"one": 1.0}, draws=39) == {}
    assert bootstrap(units, lambda weights: {"one": 1.0}, draws=40) == {"one": (1.0, 1.0)}


def test_intervals_over_identities_hold_the_truth_where_pairs_share_people():
    """People differ in how often their own pairs are rejected: intervals over pairs would be far too narrow."""
    people, each, covered, naive = 60, 20, 0, 0
    side = np.repeat(np.arange(people, dtype=np.int32), each)
    units = Units("identities", side, side, people)
    for seed in range(60):
        rng = np.random.default_rng(seed)
        wrong = rng.random(people * each) < np.repeat(rng.beta(0.2, 1.8, people), each)

        def share_wrong(weights, wrong=wrong):
            return {"frr": weights @ wrong / weights.sum()}

        low, high = bootstrap(units, share_wrong, draws=100, seed=seed)["frr"]
        covered += low <= 0.1 <= high
        naive += abs(wrong.mean() - 0.1) <= 1.96 * (wrong.mean() * (1 - wrong.mean()) / len(wrong)) ** 0.5
    assert covered >= 50
    assert naive <= 45


@pytest.mark.parametrize(("seen", "trials"), [(0, 40), (40, 40), (0, 1), (1, 1)])
def test_bounds_are_the_exact_binomial_ones(seen, trials):
    expected = binomtest(seen, trials).proportion_ci(method="exact")
    spans, exact = with_exact_bounds({"far": (seen / trials,) * 2}, {"far": (seen, trials)})
    assert spans["far"] == pytest.approx((expected.low, expected.high))
    assert exact == ["far"]


def test_only_intervals_without_width_are_replaced():
    spans, exact = with_exact_bounds({"far": (0.1, 0.2), "auc": (0.9, 1.0)}, {"far": (0, 9)})
    assert (spans, exact) == ({"far": (0.1, 0.2), "auc": (0.9, 1.0)}, [])
    assert with_exact_bounds({}, {"far": (0, 9)}) == ({}, [])
    # All draws agree on a share that is neither 0 nor 1: nothing is known.
    assert with_exact_bounds({"far": (0.5, 0.5), "log_loss": (1.0, 1.0)}, {"far": (2, 4)}) == ({}, [])


def test_f1_follows_from_precision_and_recall():
    spans, exact = with_exact_bounds(FLAT, {"far": (0, 30), "recall": (30, 30), "precision": (30, 30)})
    assert spans["f1"] == spans["recall"] == (pytest.approx(0.025 ** (1 / 30)), 1)
    assert "auc" not in spans
    assert exact == ["f1", "far", "precision", "recall"]
    none = dict.fromkeys(("f1", "precision", "recall"), (0.0, 0.0))
    spans, _ = with_exact_bounds(none, {"recall": (0, 30), "precision": (0, 0)})
    assert spans["f1"][0] == 0
    assert 0 < spans["f1"][1] < 1


@pytest.mark.parametrize("rejects", [0.0, 0.5, 1.0])
def test_the_bound_of_f1_is_honest(rejects):
    """Where the true F1 lies at the bound, fewer than one sample in forty has no wrong verdict at all.

    rejects: how much of the error falls on the same pairs.
    """
    low = with_exact_bounds(FLAT, {"recall": (40, 40), "precision": (40, 40)})[0]["f1"][0]
    errors = np.linspace(0, 1, 100_001)[:-1]
    accepts, rejected = errors * (1 - rejects), errors * rejects
    f1 = 2 * (1 - accepts) / (2 * (1 - accepts) + accepts + rejected)
    at = int(np.argmin(np.abs(f1 - low)))
    perfect = (1 - accepts[at]) ** 40 * (1 - rejected[at]) ** 40
    assert f1[at] == pytest.approx(low, abs=1e-3)
    assert perfect <= 0.025


def most_disjoint(pairs) -> int:
    """The largest number of pairs without a common unit, by trying all choices."""
    for size in range(len(pairs), 0, -1):
        for chosen in combinations(pairs, size):
            units = [unit for pair in chosen for unit in set(pair)]
            if len(units) == len(set(units)):
                return size
    return 0


@pytest.mark.parametrize("seed", range(20))
def test_the_number_lies_between_half_the_highest_and_the_highest(seed):
    rng = np.random.default_rng(seed)
    a, b = rng.integers(0, 7, (2, 9))
    kinds = rng.integers(0, 2, 9)
    found = count_disjoint(a, b, kinds, 3, seed=seed)
    for kind in (0, 1):
        best = most_disjoint([(x, y) for x, y, each in zip(a, b, kinds, strict=True) if each == kind])
        assert best / 2 <= found[kind] <= best
    assert found[2] == 0


def test_pairs_of_one_person_count_people():
    side = np.repeat(np.arange(30), 5)
    assert count_disjoint(side, side, np.zeros(150, np.int64), 1).tolist() == [30]
    # Everyone against one person.
    assert count_disjoint(side, np.full(150, 30), np.zeros(150, np.int64), 1).tolist() == [1]
    none = np.zeros(0, np.int64)
    assert count_disjoint(none, none, none, 2).tolist() == [0, 0]


def test_rates_of_0_and_1_have_bounds_of_so_many_trials():
    assert exact_span(0, 500, 30) == (0.0, pytest.approx(1 - 0.025 ** (1 / 30)))
    assert exact_span(500, 500, 30) == (pytest.approx(0.025 ** (1 / 30)), 1.0)
    assert exact_span(1, 500, 30) is None
    assert exact_span(0, 0, 0) is None


@pytest.mark.parametrize("share", [0.05, 0.1, 0.2])
def test_the_bound_of_no_false_matches_holds_where_pairs_share_people(share):
    """Some people match each other falsely: in 2,000 draws of people the bound holds, that of all pairs does not."""
    people, draws, rng = 40, 2000, np.random.default_rng(0)
    a, b = np.triu_indices(people, 1)
    disjoint = int(count_disjoint(a, b, np.zeros(len(a), np.int64), 1)[0])
    truth = share**2
    alike = rng.random((draws, people)) < share
    wrong = (alike[:, a] & alike[:, b]).sum(axis=1)
    none = int((wrong == 0).sum())
    assert none
    spans = [exact_span(0, len(a), trials) or (0, 0) for trials in (disjoint, len(a))]
    missed, missed_by_all = (none * (high < truth) / draws for _, high in spans)
    assert missed <= 0.025
    if share == 0.1:
        assert missed_by_all > 0.05
