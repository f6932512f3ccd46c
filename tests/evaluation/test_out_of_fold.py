"""Out-of-fold probabilities against scikit-learn, and that no pair's own label has a say in them."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from batchverify.evaluation.out_of_fold import FEWEST, FOLDS, fitted, logistic, out_of_fold


def draw(seed: int, pairs: int = 600) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, pairs)
    return rng.normal(labels[:, None] * [2.0, 1.0, 0.0], 1.0, (pairs, 3)), labels


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_regression_is_that_of_scikit_learn(seed):
    features, labels = draw(seed)
    weights = fitted(np.column_stack([np.ones(len(labels)), features]), labels)
    theirs = LogisticRegression(C=1.0, tol=1e-10, max_iter=1000).fit(features, labels)
    assert weights == pytest.approx([theirs.intercept_[0], *theirs.coef_[0]], abs=1e-5)


def test_separable_pairs_end():
    features = np.repeat([[-1.0], [1.0]], 100, axis=0)
    labels = np.repeat([0, 1], 100)
    found = out_of_fold(features, labels)
    assert found is not None and ((found > 0.9) == (labels == 1)).all()


def test_a_label_has_no_say_in_its_own_probability():
    features, labels = draw(3)
    before = out_of_fold(features, labels)
    turned = labels.copy()
    turned[7] = 1 - turned[7]
    after = out_of_fold(features, turned)
    assert after[7] == before[7]
    fold = np.random.default_rng(0).permutation(len(labels)) % FOLDS
    assert (after[fold == fold[7]] == before[fold == fold[7]]).all()
    assert (after[fold != fold[7]] != before[fold != fold[7]]).all()


def test_a_feature_without_spread_changes_nothing():
    features, labels = draw(4)
    wider = np.column_stack([features, np.full(len(labels), 3.0)])
    assert out_of_fold(wider, labels) == pytest.approx(out_of_fold(features, labels))


def test_few_pairs_of_a_label_say_nothing():
    features, _ = draw(5)
    labels = np.zeros(len(features), np.int64)
    labels[: FEWEST - 1] = 1
    assert out_of_fold(features, labels) is None
    labels[FEWEST - 1] = 1
    assert out_of_fold(features, labels) is not None


def test_logistic_is_finite_everywhere():
    assert logistic(np.array([-1e9, 0.0, 1e9])).tolist() == pytest.approx([0, 0.5, 1])
