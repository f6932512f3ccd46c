"""Metrics against scikit-learn and slow loops, with ties."""

import numpy as np
import pytest
from sklearn.metrics import f1_score

from batchverify.metrics import best_f1, measure


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
    assert (found.best_f1, found.best_threshold) == (pytest.approx(6 / 7), pytest.approx(0.25))


def test_a_score_at_the_threshold_means_different_in_float32_too():
    score = np.array([0.1, 0.3], np.float32)
    assert measure(np.array([0, 1]), score, 0.3).f1 == 1
