"""Figures of the field against scikit-learn and plain loops by their definitions."""

import math

import numpy as np
import pytest
from sklearn.isotonic import IsotonicRegression
from sklearn.metrics import matthews_corrcoef

from batchverify.evaluation.figures import MeasuredPairs
from batchverify.heads.prior import shift

EXACT = 1e-9


def draw(seed: int, pairs: int = 1500, *, ties: bool = False) -> MeasuredPairs:
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, 2, pairs)
    truth[: pairs * 2 // 3] = 1
    p = 1 / (1 + np.exp(-rng.normal(truth * 3 - 1.5, 1.5)))
    p = (p.round(2).clip(0.01, 0.99) if ties else p).astype(np.float32)
    p[::50] = np.nan
    return MeasuredPairs(truth, p, 0.4)


def draws():
    return [draw(0), draw(1, ties=True), draw(2, 300)]


def kinds(pairs: MeasuredPairs) -> tuple[np.ndarray, np.ndarray]:
    p = pairs.probability.astype(np.float64)
    return tuple(p[(pairs.truth == kind) & ~np.isnan(p)] for kind in (0, 1))


def slow_point(pairs: MeasuredPairs, rate: float) -> float:
    """The lowest false reject rate of all thresholds whose false accept rate is at most `rate`."""
    same, different = kinds(pairs)
    thresholds = [*same.tolist(), *different.tolist(), 2.0]
    return min((same >= t).mean() for t in thresholds if (different < t).mean() <= rate)


def slow_cost(same: list[float], different: list[float]) -> float:
    """Cllr of likelihood ratios same : different."""
    first = [math.log2(1 + 1 / ratio) if ratio else math.inf for ratio in same]
    second = [math.log2(1 + ratio) for ratio in different]
    return (sum(first) / len(first) + sum(second) / len(second)) / 2


def slow_minimum(pairs: MeasuredPairs) -> float:
    same, different = kinds(pairs)
    scores = np.concatenate([same, different])
    truth = np.repeat([0.0, 1.0], [len(same), len(different)])
    fitted = IsotonicRegression().fit(scores, truth)
    odds = len(same) / len(different)
    ratios = [
        [((1 - q) / q / odds) if q else math.inf for q in fitted.predict(each).tolist()] for each in (same, different)
    ]
    return slow_cost(*ratios)


@pytest.mark.parametrize("pairs", draws())
def test_figures_at_the_threshold_are_those_of_scikit_learn(pairs):
    known = ~np.isnan(pairs.probability)
    calls, figures = pairs.calls[known], pairs.figures()
    assert figures["mcc"] == pytest.approx(matthews_corrcoef(pairs.truth[known], calls), abs=EXACT)
    same, different = kinds(pairs)
    limit = np.float32(0.4)
    half = ((different < limit).mean() + (same >= limit).mean()) / 2
    assert figures["hter"] == pytest.approx(half, abs=EXACT)


@pytest.mark.parametrize("pairs", draws())
def test_operating_points_are_the_lowest_rates_of_any_threshold(pairs):
    figures = pairs.figures()
    assert figures["zero_fmr"] == pytest.approx(slow_point(pairs, 0), abs=EXACT)
    if len(kinds(pairs)[1]) >= 1000:
        assert figures["fmr100"] == pytest.approx(slow_point(pairs, 0.01), abs=EXACT)
    else:
        assert math.isnan(figures["fmr100"])
    assert math.isnan(figures["fmr1000"])


def test_fmr1000_with_enough_pairs():
    pairs = draw(3, 16_000, ties=True)
    same, different = kinds(pairs)
    limits = [*np.unique(np.concatenate([same, different])).tolist(), 2.0]
    wanted = min((same >= t).mean() for t in limits if (different < t).mean() <= 0.001)
    assert pairs.figures()["fmr1000"] == pytest.approx(wanted, abs=EXACT)


@pytest.mark.parametrize("pairs", draws())
def test_decidability_and_costs_by_their_definitions(pairs):
    figures = pairs.figures()
    odds = [np.log(each / (1 - each)) for each in kinds(pairs)]
    pooled = math.sqrt((odds[0].var() + odds[1].var()) / 2)
    assert figures["d_prime"] == pytest.approx(abs(odds[0].mean() - odds[1].mean()) / pooled, abs=EXACT)
    ratios = [[(1 - p) / p for p in each.tolist()] for each in kinds(pairs)]
    assert figures["cllr"] == pytest.approx(slow_cost(*ratios), abs=EXACT)
    assert figures["min_cllr"] == pytest.approx(slow_minimum(pairs), abs=EXACT)
    assert figures["min_cllr"] <= figures["cllr"]


def test_weights_are_repeated_pairs():
    pairs = draw(4)
    weights = np.random.default_rng(4).integers(0, 4, len(pairs))
    rows = np.repeat(np.arange(len(pairs)), weights)
    found, wanted = pairs.figures(weights), pairs.subset(rows).figures()
    for name in ("mcc", "hter", "d_prime", "cllr", "min_cllr"):
        assert found[name] == pytest.approx(wanted[name], abs=EXACT), name


def test_the_threshold_of_zero_fmr_is_that_of_all_pairs_in_every_draw():
    pairs = draw(5)
    same, different = kinds(pairs)
    scored = ~np.isnan(pairs.probability)
    least = float(different.min())
    weights = np.ones(len(pairs), np.int64)
    # A draw without the pair that decides, and one with some same pairs twice.
    weights[scored & (pairs.probability == np.float32(least)) & (pairs.truth == 1)] = 0
    assert pairs.figures(weights)["zero_fmr"] == pytest.approx((same >= least).mean(), abs=EXACT)
    weights[scored & (pairs.truth == 0) & (pairs.probability >= np.float32(least))] = 2
    twice = (same >= least).sum() * 2
    wanted = twice / (twice + (same < least).sum())
    assert pairs.figures(weights)["zero_fmr"] == pytest.approx(wanted, abs=EXACT)


@pytest.mark.parametrize("share", [0.01, 0.3, 0.9])
def test_likelihood_ratios_do_not_change_with_the_prior(share):
    pairs = draw(6)
    moved = shift(pairs.probability, share).astype(np.float64)
    found = MeasuredPairs(pairs.truth, moved, 0.4, assumed=share).figures()
    wanted = pairs.figures()
    for name in ("cllr", "min_cllr", "d_prime"):
        assert found[name] == pytest.approx(wanted[name], abs=EXACT), name
    assert found["log_loss"] != pytest.approx(wanted["log_loss"], abs=1e-3)


def test_one_pair_of_a_kind():
    """The variance of a single pair is 0: d' stands on the spread of the other kind."""
    truth = np.array([0, 1, 1, 1])
    p = np.array([0.1, 0.6, 0.7, 0.9], np.float32)
    odds = np.log(p.astype(np.float64) / (1 - p.astype(np.float64)))
    wanted = abs(odds[0] - odds[1:].mean()) / math.sqrt(odds[1:].var() / 2)
    figures = MeasuredPairs(truth, p, 0.5).figures()
    assert figures["d_prime"] == pytest.approx(wanted, abs=EXACT)
    both = MeasuredPairs(truth[:2], p[:2], 0.5).figures()
    assert math.isnan(both["d_prime"])
    assert all(isinstance(value, float) for value in both.values())


def test_perfect_and_useless_scores():
    truth = np.array([0, 0, 1, 1])
    perfect = MeasuredPairs(truth, np.array([0, 0, 1, 1], np.float32), 0.5).figures()
    assert (perfect["mcc"], perfect["min_cllr"], perfect["zero_fmr"]) == (1, 0, 0)
    assert math.isnan(perfect["d_prime"])
    useless = MeasuredPairs(truth, np.array([0.5, 0.5, 0.5, 0.5], np.float32), 0.5).figures()
    assert (useless["mcc"], useless["cllr"], useless["min_cllr"]) == (0, 1, 1)
    one_kind = MeasuredPairs(truth[:2], np.array([0.1, 0.2], np.float32), 0.5).figures()
    assert math.isnan(one_kind["mcc"]) and math.isnan(one_kind["cllr"])
