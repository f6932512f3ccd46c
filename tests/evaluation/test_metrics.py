"""Metrics against scikit-learn and slow loops, with ties."""

import json
import math
import warnings
from dataclasses import asdict

import numpy as np
import pytest
from sklearn.metrics import f1_score

from batchverify.evaluation.figures import best_f1, calibration_error, equal_error, log_loss, measure, roc_auc


def slow_best_f1(labels, scores):
    """The highest F1 of all thresholds that tell scores apart."""
    return max(f1_score(labels, scores >= threshold) for threshold in np.unique(scores))


def draw(seed, levels):
    """Labels and float32 scores; few levels make many ties."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, 60)
    labels[:2] = 0, 1
    return labels, (np.round((rng.random(60) + 0.3 * labels) * levels) / levels).astype(np.float32)


@pytest.mark.parametrize("levels", [3, 20, 10_000])
@pytest.mark.parametrize("seed", range(4))
def test_best_f1_is_the_highest_and_its_threshold_gives_it(seed, levels):
    labels, scores = draw(seed, levels)
    highest, threshold = best_f1(labels, scores)
    assert highest == pytest.approx(slow_best_f1(labels, scores), abs=1e-12)
    assert f1_score(labels, scores >= np.float32(threshold)) == pytest.approx(highest, abs=1e-12)


@pytest.mark.parametrize("low", [0.5, np.nextafter(np.float32(0.5), np.float32(1)), 0.9999999, 0.0])
def test_best_f1_between_neighbouring_floats(low):
    below = np.float32(low)
    above = np.nextafter(below, np.float32(2))
    highest, threshold = best_f1(np.array([1, 0]), np.array([above, below]))
    assert highest == 1
    assert (np.array([above, below]) >= np.float32(threshold)).tolist() == [True, False]


def test_best_f1_where_everything_is_called_different():
    labels, scores = np.array([1, 1, 0]), np.array([0.2, 0.2, 0.2], np.float32)
    highest, threshold = best_f1(labels, scores)
    assert highest == pytest.approx(0.8)
    assert (scores >= threshold).all()
    assert best_f1(np.array([1, 1]), np.zeros(2, np.float32)) == (1.0, 0.0)


def test_best_f1_of_small_integer_labels_does_not_overflow():
    labels = np.ones(300, np.int8)
    assert best_f1(labels, np.linspace(0.1, 1, 300, dtype=np.float32))[0] == 1


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
    labels, scores = draw(seed, levels)
    scores /= scores.max()
    rate, threshold = equal_error(labels.astype(np.int8), scores)
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
    found = equal_error(np.array(labels), np.array(scores))
    assert found[0] == pytest.approx(rate)
    assert 0 <= found[1] <= 1
    assert threshold is None or found[1] == threshold


@pytest.mark.parametrize("levels", [2, 5, 10_000])
@pytest.mark.parametrize("seed", range(3))
def test_roc_auc_counts_couples(seed, levels):
    labels, scores = draw(seed, levels)
    couples = [(d > s) + 0.5 * (d == s) for d in scores[labels == 1] for s in scores[labels == 0]]
    assert roc_auc(labels, scores) == pytest.approx(np.mean(couples))
    assert roc_auc(labels, -scores) == pytest.approx(1 - np.mean(couples))


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
    losses = [
        -math.log(p if y else 1 - p) for y, p in zip(labels.tolist(), probabilities.tolist(), strict=True)
    ]
    assert log_loss(labels, probabilities) == pytest.approx(sum(losses) / 300, rel=1e-5)
    halves = [np.mean([x for x, y in zip(losses, labels, strict=True) if y == label]) for label in (0, 1)]
    assert log_loss(labels, probabilities, balanced=True) == pytest.approx(sum(halves) / 2, rel=1e-5)


def test_log_loss_of_certain_probabilities_is_finite():
    labels = np.array([0, 1, 1], np.int8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for kind in (np.float32, np.float64):
            assert log_loss(labels, labels.astype(kind)) == pytest.approx(0, abs=1e-6)
            assert 10 < log_loss(labels, 1 - labels.astype(kind)) < 50
        assert log_loss(np.ones(3, np.int8), np.full(3, 0.5)) == pytest.approx(math.log(2))
