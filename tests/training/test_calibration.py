"""Calibration against an independent optimiser, thresholds against counts."""

import itertools
import warnings
from fractions import Fraction

import numpy as np
import pytest
from scipy.optimize import minimize
from sklearn.metrics import f1_score

from batchverify.training.calibration import (
    METHODS,
    f1_threshold,
    platt_scaling,
    rate_thresholds,
    sigmoid,
    temperature_scaling,
)


@pytest.mark.parametrize("count", [1, 99, 100, 150, 999, 1_000, 10_000, 10_007, 100_000])
@pytest.mark.parametrize("levels", [50, 10**9])
def test_no_more_pairs_are_falsely_accepted_than_the_rate_allows(count, levels):
    rng = np.random.default_rng(count)
    scores = (np.ceil(rng.random(count) * levels) / levels).astype(np.float32)
    thresholds = rate_thresholds(scores)
    # A rate needs 10 expected false accepts.
    assert [each["far"] for each in thresholds] == [
        r for r in (0.1, 0.01, 0.001, 0.0001) if round(count * r, 9) >= 10
    ]
    for each in thresholds:
        accepted = sum(score < each["threshold"] for score in scores.tolist())
        assert accepted <= each["far"] * count + 1e-9
        assert each["pairs"] == count
        # The next higher score would accept too many: the threshold is as large as possible.
        higher = scores[scores > each["threshold"]]
        assert not len(higher) or (scores < higher.min()).sum() > each["far"] * count


def test_without_different_pairs_nothing_is_stored():
    assert rate_thresholds(np.zeros(0, np.float32)) == []


def test_the_order_of_the_pairs_does_not_matter():
    scores = np.random.default_rng(0).random(1000).astype(np.float32)
    assert rate_thresholds(scores) == rate_thresholds(scores[::-1])


def test_the_entry_of_a_rate():
    scores = np.arange(100, dtype=np.float32) / 128
    assert rate_thresholds(scores)[0] == {"far": 0.1, "threshold": 10 / 128, "pairs": 100}


def draw(count: int, seed: int, slope: float = 3.0, offset: float = -1.0) -> tuple[np.ndarray, np.ndarray]:
    """Scores, and labels that are 1 with probability sigmoid(slope * score + offset)."""
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=count)
    labels = (rng.random(count) < 1 / (1 + np.exp(-slope * scores - offset))).astype(np.int8)
    labels[:2] = 0, 1
    return scores, labels


def slow_loss(scores: np.ndarray, labels: np.ndarray, slope: float, offset: float) -> float:
    """Platt's: cross-entropy with targets (N1 + 1) / (N1 + 2) and 1 / (N0 + 2)."""
    ones = labels.tolist().count(1)
    high, low = (ones + 1) / (ones + 2), 1 / (len(labels) - ones + 2)
    targets = np.array([high if label else low for label in labels.tolist()])
    logits = slope * scores.astype(np.float64) + offset
    return float((np.logaddexp(0, logits) - targets * logits).sum())


@pytest.mark.parametrize(("scale", "shift"), [(1, 0), (0.001, 0), (1, 40), (-20, 3), (1e4, -1e5)])
@pytest.mark.parametrize("count", [20, 500])
def test_platt_scaling_agrees_with_scipy(count, scale, shift):
    plain, labels = draw(count, count)
    expected = minimize(lambda x: slow_loss(plain, labels, *x), np.zeros(2), tol=1e-12).x
    slope, offset = platt_scaling(plain * scale + shift, labels)
    # The calibrated probabilities do not depend on the scale and offset of the scores.
    assert slope * scale == pytest.approx(expected[0], rel=1e-4)
    assert slope * shift + offset == pytest.approx(expected[1], rel=1e-4, abs=1e-4)
    assert type(slope) is type(offset) is float


@pytest.mark.parametrize("scale", [1, 0.001, -20, 1e5])
def test_temperature_scaling_agrees_with_scipy(scale):
    plain, labels = draw(300, 3, offset=0.0)
    expected = minimize(lambda x: slow_loss(plain, labels, x[0], 0), np.zeros(1), tol=1e-12).x
    slope, offset = temperature_scaling(plain * scale, labels)
    assert slope * scale == pytest.approx(expected[0], rel=1e-4)
    assert offset == 0


def test_the_true_slope_is_recovered():
    scores, labels = draw(200_000, 0, slope=2.5, offset=0.7)
    np.testing.assert_allclose(platt_scaling(scores, labels), (2.5, 0.7), atol=0.05)
    scores, labels = draw(200_000, 1, slope=0.4, offset=0.0)
    np.testing.assert_allclose(temperature_scaling(scores, labels), (0.4, 0), atol=0.02)


@pytest.mark.parametrize("count", [2, 10, 1000])
@pytest.mark.parametrize("method", ["platt", "temperature"])
def test_separable_pairs_have_a_finite_slope(method, count):
    scores = np.linspace(-1, 1, count)
    labels = (scores > 0).astype(np.int8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        slope, offset = METHODS[method](scores, labels)
    p = sigmoid(slope * scores + offset)
    assert 0 < slope < 1e4 and abs(offset) < 1e-6 * slope
    assert p[labels == 0].max() < 0.5 < p[labels == 1].min() <= p[-1] < 1
    if count == 2:
        # The softened targets themselves: (1 + 1) / (1 + 2) and 1 / (1 + 2).
        assert p.tolist() == pytest.approx([1 / 3, 2 / 3])


@pytest.mark.parametrize("kind", [np.float32, np.float64])
@pytest.mark.parametrize(("count", "value"), [(255, -0.66052), (7, 1.807975), (100, 0.1), (9, 0.0), (3, -1e6)])
def test_equal_scores_give_the_share_and_no_slope(kind, count, value):
    # By rounding, their mean differs from their value: a spread of rounding errors once gave slopes of millions.
    scores, labels = np.full(count, value, kind), np.arange(count) % 3 == 0
    slope, offset = platt_scaling(scores, labels.astype(np.int8))
    assert slope == pytest.approx(0, abs=1e-6)
    share = (labels.sum() * (labels.sum() + 1) / (labels.sum() + 2)) + (~labels).sum() / ((~labels).sum() + 2)
    assert sigmoid(np.array([slope * value + offset]))[0] == pytest.approx(share / count, abs=1e-6)


def test_the_scores_are_not_modified_and_none_changes_nothing():
    scores, labels = draw(50, 0)
    before = scores.copy()
    assert METHODS["none"](scores, labels) == (1.0, 0.0)
    for method in METHODS.values():
        method(scores, labels)
        assert np.array_equal(scores, before)


@pytest.mark.parametrize("method", ["platt", "temperature"])
def test_float32_and_float64_scores_are_calibrated_alike(method):
    scores, labels = draw(400, 5)
    single = scores.astype(np.float32)
    np.testing.assert_allclose(
        METHODS[method](single, labels), METHODS[method](single.astype(np.float64), labels), rtol=1e-9
    )


def test_sigmoid_does_not_overflow():
    with np.errstate(all="raise", under="ignore"):
        assert sigmoid(np.array([-1e5, -800.0, 0.0, 800.0, 1e5])).tolist() == [0.0, 0.0, 0.5, 1.0, 1.0]
    np.testing.assert_allclose(sigmoid(np.array([1, -2], np.float32)), 1 / (1 + np.exp([-1.0, 2.0])))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("levels", [4, 10**6])
def test_f1_threshold_has_the_highest_expected_f1_of_all(seed, levels):
    rng = np.random.default_rng(seed)
    p = [Fraction(int(each), levels) for each in np.ceil(rng.beta(0.5, 0.8, 40) * levels)]

    def expected(threshold):
        """F1 of the expected counts: 2 TP / (called different + different)."""
        called = [each for each in p if each >= threshold]
        return 2 * sum(called) / (len(called) + sum(p))

    highest = max(expected(each) for each in p)
    threshold = f1_threshold(np.array([float(each) for each in p]))
    assert threshold == pytest.approx(float(highest / 2), rel=1e-12)
    # Slightly below the threshold, since the float may be just above a probability that it should equal.
    assert float(expected(Fraction(threshold) - Fraction(1, 10**9))) == pytest.approx(float(highest), rel=1e-9)


def test_f1_threshold_against_all_outcomes_of_a_few_pairs():
    p = np.array([0.95, 0.9, 0.85, 0.7, 0.45, 0.4, 0.2, 0.1, 0.05, 0.02, 0.01, 0.01])

    def exact(threshold) -> float:
        """E[F1] over all 4,096 labellings, each with its probability."""
        outcomes = np.array(list(itertools.product([0, 1], repeat=len(p))))
        chances = np.where(outcomes == 1, p, 1 - p).prod(axis=1)
        called = p >= threshold
        f1 = 2 * outcomes[:, called].sum(axis=1) / np.maximum(called.sum() + outcomes.sum(axis=1), 1)
        return float((chances * f1).sum())

    assert exact(f1_threshold(p)) >= max(exact(each) for each in p) - 0.005
    assert exact(0.5) < max(exact(each) for each in p) - 0.005


def test_f1_threshold_of_many_pairs_gives_the_highest_f1_drawn():
    rng = np.random.default_rng(1)
    p = rng.beta(0.3, 0.9, 20_000)
    labels = (rng.random(len(p)) < p).astype(int)
    measured = max(f1_score(labels, p >= each) for each in np.linspace(0, 1, 101)[1:-1])
    assert f1_score(labels, p >= f1_threshold(p)) == pytest.approx(measured, abs=2e-3)


@pytest.mark.parametrize(
    ("probabilities", "threshold"),
    [([1.0], 0.5), ([1.0, 0.0], 0.5), ([0.3], 0.3 / 1.3), ([0.0, 0.0], 0.0), ([1.0, 1.0], 0.5)],
)
def test_f1_threshold_at_the_edges(probabilities, threshold):
    for kind in (np.float32, np.float64):
        assert f1_threshold(np.array(probabilities, kind)) == pytest.approx(threshold, rel=1e-6)
