"""Bounds against scipy's binomial and beta, thresholds against their definition, tails against all scores."""

import itertools
import json

import numpy as np
import pytest
from scipy.stats import beta, binom

from batchverify.errors import UsageError
from batchverify.heads.bounds import (
    Tail,
    at_most,
    disjoint_pairs,
    guaranteed_threshold,
    matched_people,
    needed_trials,
    upper_bound,
)


@pytest.mark.parametrize("trials", [1, 10, 734, 29_510])
@pytest.mark.parametrize("rate", [1e-6, 0.001, 0.05, 0.9])
def test_the_distribution_is_the_binomial_one(trials, rate):
    for errors in {0, 1, trials // 100, trials // 2, trials}:
        assert at_most(errors, trials, rate) == pytest.approx(binom.cdf(errors, trials, rate), rel=1e-9, abs=1e-300)


@pytest.mark.parametrize(("errors", "trials"), [(0, 1), (0, 100), (1, 100), (30, 29_510), (99, 100), (500, 1000)])
@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.95, 0.99])
def test_the_bound_is_clopper_and_pearsons(errors, trials, confidence):
    expected = beta.ppf(confidence, errors + 1, trials - errors)
    assert upper_bound(errors, trials, confidence) == pytest.approx(expected, rel=1e-9)


def test_a_bound_is_never_zero():
    assert upper_bound(0, 1000, 0.95) == pytest.approx(3 / 1000, rel=0.01)
    assert upper_bound(0, 0, 0.95) == upper_bound(5, 5, 0.95) == 1


@pytest.mark.parametrize("rate", [0.1, 0.01, 0.001])
@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
def test_so_many_trials_are_needed_and_no_fewer(rate, confidence):
    needed = needed_trials(rate, confidence)
    assert upper_bound(0, needed, confidence) <= rate < upper_bound(0, needed - 1, confidence)
    scores = np.arange(needed, dtype=np.float32) / needed
    assert Tail.of(scores).bounded(rate, confidence) == 0
    assert Tail.of(scores[:-1]).bounded(rate, confidence) is None


@pytest.mark.parametrize("seed", range(5))
def test_chosen_pairs_share_nobody_and_no_further_pair_fits(seed):
    rng = np.random.default_rng(seed)
    a, b = rng.integers(0, 40, (2, 200))
    rows = disjoint_pairs(a, b, seed)
    sides = [{x, y} for x, y in zip(a[rows].tolist(), b[rows].tolist(), strict=True)]
    assert all(not one & other for one, other in itertools.combinations(sides, 2))
    used = set().union(*sides)
    assert all({x, y} & used for x, y in zip(a.tolist(), b.tolist(), strict=True))
    assert (np.diff(rows) > 0).all()


def test_no_pairs_give_no_pairs():
    assert len(disjoint_pairs(np.zeros(0, int), np.zeros(0, int))) == 0
    assert Tail.of(np.zeros(0, np.float32)).conformal(0.9) is None


@pytest.mark.parametrize("people", [0, 1, 2, 7, 30])
def test_people_are_matched_once_each(people):
    groups = np.repeat(np.arange(people), 3)
    first, second = matched_people(groups, 1)
    assert len(first) == len(second) == people // 2
    assert len({*groups[first].tolist(), *groups[second].tolist()}) == 2 * (people // 2)


@pytest.mark.parametrize("count", [1, 100, 250, 5000])
def test_a_tail_keeps_the_worst_scores_and_errs_on_the_safe_side(count):
    scores = np.random.default_rng(count).random(count).astype(np.float32)
    low, high = Tail.of(scores), Tail.of(scores, highest=True)
    ordered = np.sort(scores)
    for rank in range(1, count + 1):
        assert low.at(rank) <= ordered[rank - 1]
        assert high.at(rank) >= ordered[count - rank]
    assert (low.at(1), high.at(1)) == (ordered[0], ordered[-1])
    # Small ranks are all there.
    assert all(low.at(rank) == ordered[rank - 1] for rank in range(1, min(count, 25)))
    assert low.at(0) is None
    assert len(low.ranks) <= 250
    assert Tail.from_json(json.loads(json.dumps(low.to_json()))) == low


@pytest.mark.parametrize("count", [60, 300, 734])
@pytest.mark.parametrize("rate", [0.05, 0.1])
def test_a_bounded_threshold_is_the_highest_whose_own_bound_holds(count, rate):
    scores = np.random.default_rng(count).random(count).astype(np.float32)
    threshold = Tail.of(scores).bounded(rate, 0.95)
    assert upper_bound(int((scores < threshold).sum()), count, 0.95) <= rate
    if count <= 250:
        higher = np.sort(scores)[(scores < threshold).sum() + 1]
        assert upper_bound(int((scores < higher).sum()), count, 0.95) > rate


@pytest.mark.parametrize(("count", "rate", "rank"), [(99, 0.01, 1), (98, 0.01, None), (9, 0.1, 1), (200, 0.1, 20)])
def test_a_conformal_threshold_counts_the_new_pair(count, rate, rank):
    scores = np.random.default_rng(0).random(count).astype(np.float32)
    expected = None if rank is None else np.sort(scores)[rank - 1]
    assert Tail.of(scores).conformal(rate) == expected


@pytest.mark.parametrize(
    "changes",
    [
        {"ranks": [2, 1]},
        {"ranks": [0, 1]},
        {"ranks": [1, 4]},
        {"ranks": [1]},
        {"scores": [0.1, float("nan")]},
        {"scores": [0.1, 1.5]},
        {"scores": None},
        {"pairs": "many"},
    ],
)
def test_damaged_tails_are_refused(changes):
    with pytest.raises((ValueError, TypeError)):
        Tail.from_json({"pairs": 3, "ranks": [1, 2], "scores": [0.1, 0.2], **changes})


def test_what_the_pairs_cannot_promise_is_refused_with_what_it_takes():
    tail = Tail.of(np.linspace(0, 1, 300, dtype=np.float32)).to_json()
    stored = {"bounds": {"unit": "people", "different": tail, "same": tail}}
    assert guaranteed_threshold(stored, 0.01, 0.95) == 0
    with pytest.raises(UsageError, match=r"it takes 2,995 different pairs .* \(5,990 people\), and there were 300"):
        guaranteed_threshold(stored, 0.001, 0.95)
    with pytest.raises(UsageError, match="batchverify calibrate"):
        guaranteed_threshold({"far": []}, 0.01, 0.95)
