"""Curves and figures against scikit-learn and slow loops, with ties, weights and failures."""

import math
import warnings

import numpy as np
import pytest
import sklearn.metrics as reference

from batchverify.evaluation.figures import (
    NAMES,
    RATES,
    MeasuredPairs,
    Ranking,
    calibration_error,
    equal_error,
    needed_pairs,
    rate_name,
    rate_table,
)
from batchverify.training.calibration import rate_thresholds


def draw(seed, levels, pairs=300):
    """Truth and float32 scores; few levels make many ties."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, 2, pairs).astype(np.int8)
    scores = np.round((0.7 * rng.random(pairs) + 0.3 * truth) * levels) / levels
    return truth, scores.astype(np.float32)


CASES = [(seed, levels) for seed in range(4) for levels in (3, 20, 10_000)]


@pytest.mark.parametrize(("seed", "levels"), CASES)
@pytest.mark.parametrize("weighted", [False, True])
def test_figures_are_those_of_scikit_learn(seed, levels, weighted):
    truth, scores = draw(seed, levels)
    weights = np.random.default_rng(seed).integers(0, 4, len(truth)) if weighted else None
    found = MeasuredPairs(truth, scores, 0.6).figures(weights)
    calls, wide = scores >= np.float32(0.6), scores.astype(np.float64)
    same, different = truth == 0, truth == 1
    heavy = np.ones(len(truth)) if weights is None else weights
    expected = {
        "auc": reference.roc_auc_score(truth, wide, sample_weight=weights),
        "average_precision": reference.average_precision_score(truth, wide, sample_weight=weights),
        "f1": reference.f1_score(truth, calls, sample_weight=weights),
        "precision": reference.precision_score(truth, calls, sample_weight=weights),
        "recall": reference.recall_score(truth, calls, sample_weight=weights),
        "accuracy": reference.accuracy_score(truth, calls, sample_weight=weights),
        "log_loss": reference.log_loss(truth, wide, sample_weight=weights),
        "brier": reference.brier_score_loss(truth, wide, sample_weight=weights),
        "far": heavy[different & ~calls].sum() / heavy[different].sum(),
        "frr": heavy[same & calls].sum() / heavy[same].sum(),
        "failure_rate": 0.0,
    }
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-12), name
    assert found.keys() >= NAMES.keys()


@pytest.mark.parametrize(("seed", "levels"), CASES)
def test_equal_error_and_calibration_are_those_of_metrics(seed, levels):
    truth, scores = draw(seed, levels)
    wide = scores.astype(np.float64)
    pairs = MeasuredPairs(truth, scores, 0.6)
    rate, threshold = pairs.curve.equal_error()
    assert (rate, threshold) == (
        pytest.approx(equal_error(truth, scores)[0], abs=1e-12),
        equal_error(truth, scores)[1],
    )
    assert pairs.figures()["ece"] == pytest.approx(calibration_error(truth, wide), abs=1e-12)


@pytest.mark.parametrize(("seed", "levels"), CASES)
def test_weights_are_rows_repeated(seed, levels):
    """What the bootstrap measures is what a table would give in which each pair stands so often."""
    truth, scores = draw(seed, levels, pairs=3000)
    rng = np.random.default_rng(seed)
    scores[rng.random(3000) < 0.05] = np.nan
    weights = rng.poisson(1, 3000) * rng.poisson(1, 3000)
    found = MeasuredPairs(truth, scores, 0.6).figures(weights)
    repeated = MeasuredPairs(np.repeat(truth, weights), np.repeat(scores, weights), 0.6).figures()
    assert {*NAMES, "tar@1e-1", "tar@1e-2"} <= found.keys() & repeated.keys()
    for name in found.keys() & repeated.keys():
        assert found[name] == pytest.approx(repeated[name], abs=1e-12), name
    # By hand, the figures whose thresholds are searched for under the weights.
    kinds = [np.repeat(scores, weights * (truth == kind)) for kind in (0, 1)]
    same, different = (each[~np.isnan(each)] for each in kinds)
    rates = [
        ((different < at).mean(), (same >= at).mean()) for at in [*np.unique(scores[~np.isnan(scores)]), 2]
    ]
    nearest = min(reversed(rates), key=lambda each: abs(each[0] - each[1]))
    assert found["equal_error"] == pytest.approx(sum(nearest) / 2)
    assert found["tar@1e-1"] == pytest.approx(max(1 - reject for accept, reject in rates if accept <= 0.1))


@pytest.mark.parametrize(
    ("labels", "scores"),
    [
        ([0, 1], [0.5, 0.5]),
        ([1, 1, 0, 0], [0.1, 0.2, 0.8, 0.9]),
        ([0, 0, 1, 1], [0.1, 0.2, 0.8, 0.9]),
        ([1, 0, 1, 0], [0.1, 0.1, 0.2, 0.2]),
    ],
)
def test_of_several_equal_errors_the_highest_threshold_counts(labels, scores):
    truth, wide = np.array(labels, np.int8), np.array(scores)
    assert Ranking.of(truth, wide).curve().equal_error() == equal_error(truth, wide)


@pytest.mark.parametrize(("seed", "levels"), CASES)
def test_a_rate_takes_the_highest_threshold_that_keeps_to_it(seed, levels):
    truth, scores = draw(seed, levels)
    same, different = scores[truth == 0], scores[truth == 1]
    curve = Ranking.of(truth, scores).curve()
    for rate in (0.5, 0.1, 0.03, 0.01):
        fitting = [each for each in [*np.unique(scores), 9.0] if (different < each).mean() <= rate]
        place = curve.at_rate(rate)
        assert curve.threshold(place) == pytest.approx(
            min(max(fitting), np.nextafter(scores.max(), np.float32(9)))
        )
        assert curve.same[place] == (same < max(fitting)).sum()
        assert curve.different[place] == (different < max(fitting)).sum()


def test_supported_rates_and_their_thresholds_are_those_of_training():
    truth, scores = draw(0, 100_000, pairs=5_000)
    rows = rate_table(MeasuredPairs(truth, scores, 0.5), {"tar@1e-1": (0.1, 0.2)})
    trained = {each.far: each.threshold for each in rate_thresholds(scores[truth == 1])}
    assert {row["far"] for row in rows if row["supported"]} == set(trained) == {0.1, 0.01}
    for row in rows:
        if row["supported"]:
            same = scores[truth == 0]
            assert row["threshold"] == pytest.approx(trained[row["far"]])
            assert row["tar"] == (same < np.float32(trained[row["far"]])).mean()
        else:
            assert (row["tar"], row["threshold"]) == (None, None)
            assert row["pairs"] < row["needed"]
    assert [row["needed"] for row in rows] == [100, 1_000, 10_000, 100_000, 1_000_000, 10_000_000]
    assert [row["interval"] for row in rows[:2]] == [(0.1, 0.2), None]


@pytest.mark.parametrize(("pairs", "supported"), [(99, []), (100, [1e-1]), (1_000, [1e-1, 1e-2])])
def test_a_rate_is_supported_from_ten_expected_false_accepts_on(pairs, supported):
    truth = np.array([1] * pairs + [0] * 5, np.int8)
    assert MeasuredPairs(truth, np.linspace(0, 1, len(truth), dtype=np.float32), 0.5).supported() == supported
    assert [rate_name(rate) for rate in RATES[:2]] == ["tar@1e-1", "tar@1e-2"]
    assert needed_pairs(1e-6) == 10_000_000


@pytest.mark.parametrize(
    ("same", "different", "reasons"),
    [
        ("S", "D" * 100, [None, "needs 1,000 different pairs, here 100"]),
        ("", "D" * 100, ["needs same pairs", "needs 1,000 different pairs, here 100"]),
        ("s", "D" * 100, ["needs scored same pairs", "needs 1,000 different pairs, here 100"]),
        ("S", "D" * 9, ["needs 100 different pairs, here 9", "needs 1,000 different pairs, here 9"]),
        ("s", "d" * 9, [f"needs {each} scored different pairs, here 0" for each in ("100", "1,000")]),
        ("S", "", ["needs 100 different pairs, here 0", "needs 1,000 different pairs, here 0"]),
    ],
)
def test_what_is_not_supported_says_what_it_needs(same, different, reasons):
    """Capitals are pairs that were scored."""
    each = same + different
    scores = np.array([0.5 if letter.isupper() else np.nan for letter in each], np.float32)
    truth = np.array([letter in "Dd" for letter in each], np.int8)
    rows = rate_table(MeasuredPairs(truth, scores, 0.5), {})
    assert [row["reason"] for row in rows[:2]] == reasons
    assert [row["supported"] for row in rows[:2]] == [reason is None for reason in reasons]


def test_shares_that_floats_round_up_lose_no_pair():
    # 0.1 * 30 is 3.0000000000000004, 0.7 * 10 is 7.000000000000001 and 0.29 * 100 is 28.999999999999996.
    truth, scores = np.ones(100, np.int8), np.arange(100, dtype=np.float32) / 100
    curve = Ranking.of(np.append(truth, 0), np.append(scores, np.float32(0))).curve()
    assert curve.different[curve.at_rate(0.29)] == 29


@pytest.mark.parametrize(("seed", "levels"), CASES)
def test_the_threshold_of_best_accuracy_is_a_slow_scan(seed, levels):
    truth, scores = draw(seed, levels)
    threshold = Ranking.of(truth, scores).curve().best_accuracy()
    best = max(((scores >= each) == truth).mean() for each in [*np.unique(scores), np.float32(9)])
    assert ((scores >= np.float32(threshold)) == truth).mean() == best


def test_failures_count_as_not_accepted():
    truth = np.array([0, 0, 0, 0, 1, 1, 1, 1, 1], np.int8)
    scores = np.array([0.1, 0.2, 0.9, np.nan, 0.1, 0.8, 0.9, np.nan, np.nan], np.float32)
    pairs = MeasuredPairs(truth, scores, 0.5)
    found = pairs.figures()
    assert (found["far"], found["frr"], found["failure_rate"]) == (1 / 3, 1 / 3, 3 / 9)
    assert (found["far_with_failures"], found["frr_with_failures"]) == (1 / 5, 2 / 4)
    assert pairs.counts() == {
        "same": 3,
        "different": 3,
        "false_accepts": 1,
        "false_rejects": 1,
        "same_failed": 1,
        "different_failed": 2,
    }
    doubled = pairs.figures(np.array([1, 1, 1, 3, 1, 1, 1, 0, 0]))
    assert (doubled["failure_rate"], doubled["frr_with_failures"]) == (3 / 9, 4 / 6)


@pytest.mark.parametrize("kind", [0, 1])
def test_one_kind_of_pair_leaves_the_figures_of_both_open(kind):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = MeasuredPairs(
            np.full(4, kind, np.int8), np.array([0.1, 0.4, 0.6, np.nan], np.float32), 0.5
        ).figures()
    open_figures = {name for name, value in found.items() if math.isnan(value)}
    both = {"auc", "average_precision", "equal_error", "f1", "precision"}
    others = {"far", "far_with_failures", "recall"} if kind == 0 else {"frr", "frr_with_failures"}
    assert open_figures == both | others
    assert found["far" if kind else "frr"] == pytest.approx(2 / 3 if kind else 1 / 3)


@pytest.mark.parametrize("scores", [[], [np.nan, np.nan]])
def test_nothing_scored_leaves_everything_open(scores):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pairs = MeasuredPairs(np.zeros(len(scores), np.int8), np.array(scores, np.float32), 0.5)
        found, rows = pairs.figures(), rate_table(pairs, {})
    assert {name for name, value in found.items() if not math.isnan(value)} <= {
        "failure_rate",
        "frr_with_failures",
    }
    assert not any(row["supported"] for row in rows)
