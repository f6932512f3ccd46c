"""Pairs that share no unit: never more than there can be, at least half of them."""

from itertools import combinations

import numpy as np
import pytest

from batchverify.evaluation.disjoint_pairs import count_disjoint, exact_span


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
