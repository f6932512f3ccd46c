"""Curves and metrics compared with scikit-learn and slow loops, with ties, weights and failures."""

import json
import math
import warnings
from dataclasses import asdict

import numpy as np
import pytest
import sklearn.metrics as reference
from sklearn.utils.class_weight import compute_sample_weight

from batchverify.evaluation import field_figures
from batchverify.evaluation.figures import (
    NAMES,
    RATES,
    Curve,
    MeasuredPairs,
    Tally,
    balanced_log_loss,
    calibration_error,
    measure,
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


def reference_equal_error(truth, scores) -> tuple[float, float]:
    """Rate and threshold from scikit-learn's ROC curve, whose first threshold is infinite."""
    false_rejects, true_rejects, thresholds = reference.roc_curve(truth, scores, drop_intermediate=False)
    best = int(np.argmin(np.abs(false_rejects - (1 - true_rejects))))
    return (false_rejects[best] + 1 - true_rejects[best]) / 2, min(thresholds[best], 1.0)


@pytest.mark.parametrize(("seed", "levels"), CASES)
def test_equal_error_and_calibration_are_those_of_scikit_learn_and_of_training(seed, levels):
    truth, scores = draw(seed, levels)
    pairs = MeasuredPairs(truth, scores, 0.6)
    assert pairs.curve.equal_error() == pytest.approx(reference_equal_error(truth, scores), abs=1e-12)
    assert pairs.figures()["ece"] == pytest.approx(calibration_error(truth, scores), abs=1e-12)


@pytest.mark.parametrize("kind", [np.float32, np.float64])
@pytest.mark.parametrize(("seed", "levels"), CASES)
def test_measure_is_scikit_learn(seed, levels, kind):
    truth, scores = draw(seed, levels)
    scores = scores.astype(kind)
    calls, wide = scores >= kind(0.6), scores.astype(np.float64)
    found = measure(truth, scores, 0.6)
    assert found.auc == pytest.approx(reference.roc_auc_score(truth, wide), abs=1e-12)
    assert found.f1 == pytest.approx(reference.f1_score(truth, calls), abs=1e-12)
    assert found.accuracy == pytest.approx(reference.accuracy_score(truth, calls), abs=1e-12)
    assert found.brier == pytest.approx(reference.brier_score_loss(truth, wide), abs=1e-12)


@pytest.mark.parametrize(("seed", "levels"), CASES)
def test_balanced_log_loss_is_scikit_learn(seed, levels):
    truth, scores = draw(seed, levels)
    truth[:200], wide = 0, scores.astype(np.float64)
    expected = reference.log_loss(truth, wide, sample_weight=compute_sample_weight("balanced", truth))
    assert balanced_log_loss(truth, wide) == pytest.approx(expected, abs=1e-12)


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
    # Of ZeroFMR the threshold is that of all pairs.
    for name in (found.keys() & repeated.keys()) - {"zero_fmr"}:
        assert found[name] == pytest.approx(repeated[name], abs=1e-12, nan_ok=True), name
    # By hand, the figures whose thresholds are searched for under the weights.
    kinds = [np.repeat(scores, weights * (truth == kind)) for kind in (0, 1)]
    same, different = (each[~np.isnan(each)] for each in kinds)
    rates = [((different < at).mean(), (same >= at).mean()) for at in [*np.unique(scores[~np.isnan(scores)]), 2]]
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
    assert Curve.of(truth, wide).equal_error() == pytest.approx(reference_equal_error(truth, wide), abs=1e-12)


@pytest.mark.parametrize(("seed", "levels"), CASES)
def test_a_rate_takes_the_highest_threshold_that_keeps_to_it(seed, levels):
    truth, scores = draw(seed, levels)
    same, different = scores[truth == 0], scores[truth == 1]
    curve = Curve.of(truth, scores)
    for rate in (0.5, 0.1, 0.03, 0.01):
        fitting = [each for each in [*np.unique(scores), 9.0] if (different < each).mean() <= rate]
        place = curve.at_rate(rate)
        assert curve.threshold(place) == pytest.approx(min(max(fitting), np.nextafter(scores.max(), np.float32(9))))
        assert curve.same[place] == (same < max(fitting)).sum()
        assert curve.different[place] == (different < max(fitting)).sum()


def test_supported_rates_and_their_thresholds_are_those_of_training():
    truth, scores = draw(0, 100_000, pairs=5_000)
    rows = rate_table(MeasuredPairs(truth, scores, 0.5), {"tar@1e-1": (0.1, 0.2)})
    trained = {entry["far"]: entry["threshold"] for entry in rate_thresholds(scores[truth == 1])}
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
        ("S", "D" * 100, [None, "needs 1,000 different pairs, 100 available"]),
        ("", "D" * 100, ["needs same pairs", "needs 1,000 different pairs, 100 available"]),
        ("s", "D" * 100, ["needs scored same pairs", "needs 1,000 different pairs, 100 available"]),
        (
            "S",
            "D" * 9,
            ["needs 100 different pairs, 9 available", "needs 1,000 different pairs, 9 available"],
        ),
        ("s", "d" * 9, [f"needs {each} scored different pairs, 0 available" for each in ("100", "1,000")]),
        ("S", "", ["needs 100 different pairs, 0 available", "needs 1,000 different pairs, 0 available"]),
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
    curve = Curve.of(np.append(truth, 0), np.append(scores, np.float32(0)))
    assert curve.different[curve.at_rate(0.29)] == 29


@pytest.mark.parametrize(("seed", "levels"), CASES)
def test_the_threshold_of_best_accuracy_is_a_slow_scan(seed, levels):
    truth, scores = draw(seed, levels)
    threshold = Curve.of(truth, scores).best_accuracy()
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


def test_shares_are_those_of_the_counts():
    tally = Tally(10, 20, false_accepts=3, false_rejects=4, same_failed=1, different_failed=2)
    assert tally.trials() == {
        "far": (3, 20),
        "frr": (4, 10),
        "recall": (17, 20),
        "precision": (17, 21),
        "accuracy": (23, 30),
        "failure_rate": (3, 33),
        "far_with_failures": (3, 22),
        "frr_with_failures": (5, 11),
    }


@pytest.mark.parametrize("kind", [0, 1])
def test_one_kind_of_pair_leaves_the_figures_of_both_open(kind):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = MeasuredPairs(np.full(4, kind, np.int8), np.array([0.1, 0.4, 0.6, np.nan], np.float32), 0.5).figures()
    open_figures = {name for name, value in found.items() if math.isnan(value)}
    both = {"auc", "average_precision", "equal_error", "f1", "precision"} | field_figures.NAMES.keys()
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


def slow_best_f1(labels, scores):
    """The highest F1 of all thresholds that tell scores apart."""
    return max(reference.f1_score(labels, scores >= threshold) for threshold in np.unique(scores))


@pytest.mark.parametrize("levels", [3, 20, 10_000])
@pytest.mark.parametrize("seed", range(4))
def test_best_f1_is_the_highest_and_its_threshold_gives_it(seed, levels):
    labels, scores = draw(seed, levels, pairs=60)
    highest, threshold = Curve.of(labels, scores).best_f1()
    assert highest == pytest.approx(slow_best_f1(labels, scores), abs=1e-12)
    assert reference.f1_score(labels, scores >= np.float32(threshold)) == pytest.approx(highest, abs=1e-12)


@pytest.mark.parametrize("low", [0.5, np.nextafter(np.float32(0.5), np.float32(1)), 0.9999999, 0.0])
def test_best_f1_between_neighbouring_floats(low):
    below = np.float32(low)
    above = np.nextafter(below, np.float32(2))
    highest, threshold = Curve.of(np.array([1, 0]), np.array([above, below])).best_f1()
    assert highest == 1
    assert (np.array([above, below]) >= np.float32(threshold)).tolist() == [True, False]


def test_best_f1_where_everything_is_called_different():
    labels, scores = np.array([1, 1, 0]), np.array([0.2, 0.2, 0.2], np.float32)
    highest, threshold = Curve.of(labels, scores).best_f1()
    assert highest == pytest.approx(0.8)
    assert (scores >= threshold).all()
    assert Curve.of(np.array([1, 1]), np.zeros(2, np.float32)).best_f1() == (1.0, 0.0)


def test_best_f1_of_small_integer_labels_does_not_overflow():
    labels = np.ones(300, np.int8)
    assert Curve.of(labels, np.linspace(0.1, 1, 300, dtype=np.float32)).best_f1()[0] == 1


def test_measure_counts_by_hand():
    labels = np.array([0, 0, 1, 1, 1])
    scores = np.array([0.1, 0.6, 0.4, 0.6, 0.9], np.float32)
    found = measure(labels, scores, 0.6)
    assert found.pairs == 5
    assert found.threshold == 0.6
    # At 0.6: different called so 2, same called different 1, different called same 1.
    assert found.f1 == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert found.accuracy == pytest.approx(3 / 5)
    # Of the 6 (same, different) couples, (0.6, 0.4) is the wrong way round and (0.6, 0.6) is half right.
    assert found.auc == pytest.approx(4.5 / 6)
    assert found.brier == pytest.approx(np.mean((scores - labels) ** 2), abs=1e-6)
    # By fifteenths the bins are {0.1}, {0.4}, {0.6, 0.6}, {0.9}; the third's share is a half.
    assert found.ece == pytest.approx((0.1 + 0.6 + 2 * 0.1 + 0.1) / 5)
    assert (found.best_f1, found.best_threshold) == (pytest.approx(6 / 7), pytest.approx(0.25))


def test_a_score_at_the_threshold_means_different_in_float32_too():
    score = np.array([0.1, 0.3], np.float32)
    assert measure(np.array([0, 1]), score, 0.3).f1 == 1


def slow_calibration_error(labels, probabilities, bins) -> float:
    """A bin at a time: [k / bins, (k + 1) / bins), the last one with 1."""
    total = 0.0
    for k in range(bins):
        low, high = k / bins, (k + 1) / bins if k + 1 < bins else np.inf
        inside = [(y, p) for y, p in zip(labels, probabilities, strict=True) if low <= p < high]
        if inside:
            share, mean = (sum(each) / len(inside) for each in zip(*inside, strict=True))
            total += len(inside) / len(labels) * abs(share - mean)
    return total


@pytest.mark.parametrize("bins", [1, 2, 10, 15])
@pytest.mark.parametrize("seed", range(4))
def test_calibration_error_is_the_slow_loop(seed, bins):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, 400).astype(np.int8)
    probabilities = rng.random(400)
    # Edges of bins that floats hold exactly, among them 0 and 1.
    probabilities[:90] = rng.choice([0.0, 0.5, 1.0], 90)
    expected = slow_calibration_error(labels.tolist(), probabilities.tolist(), bins)
    assert calibration_error(labels, probabilities, bins) == pytest.approx(expected, abs=1e-12)
    single = calibration_error(labels, probabilities.astype(np.float32), bins)
    assert single == pytest.approx(expected, abs=1e-6)


def test_calibration_error_by_hand():
    labels = np.array([0, 1, 1, 1])
    # Two bins of 15: three pairs at 0.5, two thirds of them different; one at 1, which is.
    assert calibration_error(labels, np.array([0.5, 0.5, 0.5, 1.0])) == pytest.approx(3 / 4 * (2 / 3 - 1 / 2))
    assert calibration_error(labels, labels.astype(np.float32)) == 0
    assert calibration_error(labels, 1.0 - labels) == 1
    # One bin hides it: the mean probability is the share.
    assert calibration_error(np.array([0, 1]), np.array([0.6, 0.4]), bins=1) == pytest.approx(0)
    assert calibration_error(np.array([0, 1]), np.array([0.6, 0.4])) == pytest.approx(0.6)


def test_probabilities_drawn_from_themselves_are_calibrated():
    rng = np.random.default_rng(0)
    p = rng.random(200_000)
    labels = rng.random(len(p)) < p
    assert calibration_error(labels.astype(int), p) < 0.005
    assert calibration_error(labels.astype(int), p**2) == pytest.approx(1 / 6, abs=0.01)


def slow_errors(labels, scores, threshold) -> tuple[float, float]:
    """(false rejects, false accepts), as shares, of calling a pair different from the threshold on."""
    same, different = scores[labels == 0], scores[labels == 1]
    return sum(same >= threshold) / len(same), sum(different < threshold) / len(different)


@pytest.mark.parametrize("levels", [2, 5, 20, 10_000])
@pytest.mark.parametrize("seed", range(6))
def test_equal_error_is_the_slow_scan(seed, levels):
    labels, scores = draw(seed, levels, pairs=60)
    scores /= scores.max()
    rate, threshold = Curve.of(labels.astype(np.int8), scores).equal_error()
    found = slow_errors(labels, scores, np.float32(threshold))
    assert rate == pytest.approx(sum(found) / 2)
    # Above all scores is a threshold, too.
    gaps = [abs(np.subtract(*slow_errors(labels, scores, each))) for each in [*np.unique(scores), 2.0]]
    assert abs(np.subtract(*found)) == pytest.approx(min(gaps))
    assert 0 <= threshold <= 1


@pytest.mark.parametrize(
    ("labels", "scores", "rate", "threshold"),
    [
        ([0, 0, 1, 1], [0.1, 0.2, 0.8, 0.9], 0.0, 0.8),
        ([1, 1, 0, 0], [0.1, 0.2, 0.8, 0.9], 1.0, None),
        ([0, 1], [0.5, 0.5], 0.5, None),
        ([0, 1], [1.0, 1.0], 0.5, 1.0),
        ([0, 0, 0, 1, 1, 1], [0.1, 0.2, 0.7, 0.3, 0.8, 0.9], 1 / 3, 0.7),
    ],
)
def test_equal_error_by_hand(labels, scores, rate, threshold):
    found = Curve.of(np.array(labels), np.array(scores)).equal_error()
    assert found[0] == pytest.approx(rate)
    assert 0 <= found[1] <= 1
    assert threshold is None or found[1] == threshold


@pytest.mark.parametrize("levels", [2, 5, 10_000])
@pytest.mark.parametrize("seed", range(3))
def test_roc_auc_counts_couples(seed, levels):
    labels, scores = draw(seed, levels, pairs=60)
    couples = [(d > s) + 0.5 * (d == s) for d in scores[labels == 1] for s in scores[labels == 0]]
    assert Curve.of(labels, scores).auc() == pytest.approx(np.mean(couples))
    assert Curve.of(labels, -scores).auc() == pytest.approx(1 - np.mean(couples))


def test_measure_of_a_perfect_and_of_a_blind_head():
    labels = np.array([0, 1, 0, 1], np.int8)
    perfect = measure(labels, labels.astype(np.float32), 0.5)
    assert (perfect.auc, perfect.f1, perfect.accuracy, perfect.brier, perfect.ece) == (1, 1, 1, 0, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        blind = measure(labels, np.full(4, 0.5, np.float32), 0.9)
    assert (blind.auc, blind.f1, blind.accuracy, blind.brier, blind.ece) == (0.5, 0, 0.5, 0.25, 0)
    assert json.loads(json.dumps(asdict(blind)))["best_f1"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_log_loss_is_the_slow_loop_and_balanced_weighs_both_labels_alike(kind):
    rng = np.random.default_rng(0)
    labels = (rng.random(300) < 0.1).astype(np.int8)
    probabilities = rng.uniform(0.01, 0.99, 300).astype(kind)
    losses = [-math.log(p if y else 1 - p) for y, p in zip(labels.tolist(), probabilities.tolist(), strict=True)]
    halves = [np.mean([x for x, y in zip(losses, labels, strict=True) if y == label]) for label in (0, 1)]
    assert balanced_log_loss(labels, probabilities) == pytest.approx(sum(halves) / 2, rel=1e-5)


def test_log_loss_of_certain_probabilities_is_finite():
    labels = np.array([0, 1, 1], np.int8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for kind in (np.float32, np.float64):
            assert balanced_log_loss(labels, labels.astype(kind)) == pytest.approx(0, abs=1e-6)
            assert 10 < balanced_log_loss(labels, 1 - labels.astype(kind)) < 50
        assert balanced_log_loss(np.ones(3, np.int8), np.full(3, 0.5)) == pytest.approx(math.log(2))
