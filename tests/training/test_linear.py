"""Linear heads against scikit-learn on an independently built design matrix."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.svm import LinearSVC

from batchverify.errors import UsageError
from batchverify.heads.features import Features
from batchverify.training.linear import (
    LEAST_PENALTY,
    SLOPE_PENALTY,
    fit_linear,
    log_loss,
    minimise,
    moments,
    squared_hinge,
)
from batchverify.training.pairs import LabelledPairs

DIMENSION = 12


def make_pairs(count: int = 300, seed: int = 0, dimension: int = DIMENSION, noise: float = 0.9):
    """Pairs of images of 40 people; more noise makes them harder to separate."""
    rng = np.random.default_rng(seed)
    people = np.arange(160) % 40
    rows = rng.normal(size=(40, dimension))[people] + noise * rng.normal(size=(160, dimension))
    vectors = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)
    labels = np.arange(count) % 2
    a = rng.integers(0, 160, count)
    others = [np.flatnonzero((people == people[x]) != bool(y)) for x, y in zip(a, labels, strict=True)]
    b = np.array([rng.choice(each[each != x]) for each, x in zip(others, a, strict=True)])
    return LabelledPairs(vectors, a.astype(np.int32), b.astype(np.int32), labels.astype(np.int8))


def terms_of(pairs: LabelledPairs, features: str) -> np.ndarray:
    x, y = (torch.from_numpy(pairs.vectors[side]).double() for side in (pairs.a, pairs.b))
    return Features.parse(features)(x, y).numpy()


def design(pairs: LabelledPairs, features: str, shrinkage: float) -> tuple[np.ndarray, np.ndarray]:
    """Columns whose coefficients have a penalty of half their square, and labels; both orders for concat.

    Columns: 1, the standardised sum of each feature's terms, and the terms divided by the feature's mean spread.
    """
    ordered = [pairs]
    if not Features.parse(features).symmetric:
        ordered.append(replace(pairs, a=pairs.b, b=pairs.a))
    sums, own = [], []
    for name in features.split("+"):
        terms = np.concatenate([terms_of(each, name) for each in ordered])
        whole = terms.sum(axis=1, keepdims=True)
        sums.append((whole - whole.mean()) / whole.std() / SLOPE_PENALTY**0.5)
        if terms.shape[1] > 1:
            centred = terms - terms.mean(axis=0)
            own.append(centred / terms.std(axis=0).mean() / max(2 * shrinkage, LEAST_PENALTY) ** 0.5)
    ones = np.full((len(sums[0]), 1), LEAST_PENALTY**-0.5)
    return np.hstack([ones, *sums, *own]), np.concatenate([each.labels for each in ordered])


def scores_of(scorer, pairs: LabelledPairs) -> np.ndarray:
    (weight, bias), *rest = scorer.layers
    assert not rest and weight.dtype == bias.dtype == np.float32
    return terms_of(pairs, scorer.features) @ weight[0].astype(np.float64) + bias


def fit(pairs: LabelledPairs, features: str, shrinkage: float = 10.0, **more):
    return fit_linear(pairs, Features.parse(features), algorithm="logistic", shrinkage=shrinkage, **more)


NAMES = [
    "chi2",
    "product",
    "absdiff",
    "concat",
    "cosine",
    "chi2sum",
    "cosine+euclidean",
    "chi2+cosine+sqdiff",
]


@pytest.mark.parametrize("shrinkage", [0.5, 100.0])
@pytest.mark.parametrize("features", NAMES)
def test_logistic_regression_is_scikit_learns(features, shrinkage):
    pairs = make_pairs()
    columns, labels = design(pairs, features, shrinkage)
    reference = LogisticRegression(C=1, fit_intercept=False, solver="newton-cholesky", tol=1e-10, max_iter=500)
    reference.fit(columns, labels)
    expected = reference.decision_function(columns)[: len(pairs)]
    scorer = fit(pairs, features, shrinkage)
    np.testing.assert_allclose(scores_of(scorer, pairs), expected, atol=2e-5 * max(1, abs(expected).max()))
    assert (scorer.algorithm, scorer.features) == ("logistic", features)
    scorer.check(DIMENSION)


@pytest.mark.parametrize("features", ["chi2", "chi2sum", "chi2+product"])
def test_squared_hinge_is_scikit_learns(features):
    pairs = make_pairs()
    columns, labels = design(pairs, features, 20.0)
    # In its primal form: half the squared coefficients plus C times the sum of the losses.
    reference = LinearSVC(C=1, fit_intercept=False, dual=False, tol=1e-10, max_iter=100_000)
    expected = reference.fit(columns, labels).decision_function(columns)
    scores = scores_of(fit(pairs, features, 20.0, loss=squared_hinge), pairs)
    np.testing.assert_allclose(scores, expected, atol=1e-3 * abs(expected).max())


@pytest.mark.parametrize("loss", [log_loss, squared_hinge])
def test_the_losses_derivatives_are_theirs(loss):
    logits = torch.linspace(-8, 8, 101, dtype=torch.float64, requires_grad=True)
    for label in (0.0, 1.0):
        value, first, second = loss(logits, torch.full_like(logits, label))
        (slope,) = torch.autograd.grad(value.sum(), logits, create_graph=True)
        torch.testing.assert_close(first, slope)
        (bend,) = torch.autograd.grad(slope.sum(), logits)
        # At the hinge itself there is no second derivative.
        apart = (logits.detach().abs() - 1).abs() > 1e-9
        torch.testing.assert_close(second[apart].double(), bend[apart])
    big = loss(torch.tensor([-1e4, 1e4]).double(), torch.tensor([1.0, 0.0]).double())
    assert all(torch.isfinite(each).all() for each in big)


def test_much_shrinkage_leaves_the_weights_equal_and_little_lets_them_differ():
    pairs = make_pairs()
    spreads = []
    for shrinkage in (1e9, 1e3, 10.0, 0.1):
        weights = fit(pairs, "chi2", shrinkage).layers[0][0][0]
        spreads.append(weights.std() / abs(weights.mean()))
    assert spreads[0] < 1e-4 and spreads == sorted(spreads) and spreads[-1] > 0.3
    # All weights equal is the distance with its slope.
    ends = fit(pairs, "chi2", 1e9), fit(pairs, "chi2sum")
    weighted, summed = (scores_of(each, pairs) for each in ends)
    np.testing.assert_allclose(weighted, summed, atol=1e-4)


@pytest.mark.parametrize("features", ["chi2", "concat", "product+absdiff"])
def test_no_shrinkage_and_more_terms_than_pairs_is_finite(features):
    pairs = make_pairs(40, dimension=64)
    scorer = fit(pairs, features, 0.0)
    scorer.check(64)
    # With so many terms any labels can be memorised.
    assert features == "concat" or roc_auc_score(pairs.labels, scores_of(scorer, pairs)) == 1
    assert abs(scores_of(scorer, pairs)).max() < 1e3


@pytest.mark.parametrize("features", ["chi2sum", "cosine", "euclidean", "chi2"])
def test_perfectly_separated_pairs_have_a_finite_slope(features):
    pairs = make_pairs(dimension=64, noise=0.1)
    scores = scores_of(fit(pairs, features, 1000.0), pairs)
    assert roc_auc_score(pairs.labels, scores) == 1
    assert scores[pairs.labels == 0].max() < 0 < scores[pairs.labels == 1].min()
    assert abs(scores).max() < 50


@pytest.mark.parametrize(("features", "sign"), [("cosine", -1), ("euclidean", 1), ("chi2sum", 1)])
def test_a_distance_has_one_weight_with_the_right_sign(features, sign):
    pairs = make_pairs(2000, noise=0.7)
    ((weight, bias),) = fit(pairs, features, 1e6).layers
    assert weight.shape == (1, 1) and bias.shape == (1,) and weight[0, 0] * sign > 0
    # Shrinkage applies to terms; a distance has only the slight penalty of its slope.
    free = LogisticRegression(C=np.inf, tol=1e-10, max_iter=1000).fit(terms_of(pairs, features), pairs.labels)
    assert weight[0, 0] == pytest.approx(free.coef_[0, 0], rel=1e-3)
    assert bias[0] == pytest.approx(free.intercept_[0], rel=1e-3)


def test_concatenation_is_learned_in_both_orders():
    pairs = make_pairs()
    ((weight, _),) = fit(pairs, "concat", 1.0).layers
    np.testing.assert_allclose(weight[0, :DIMENSION], weight[0, DIMENSION:], atol=1e-5)
    assert abs(weight).max() > 0.1


@pytest.mark.parametrize("features", ["chi2", "cosine", "chi2+product"])
def test_swapped_sides_give_the_same_bytes(features):
    pairs = make_pairs()
    one, other = (fit(each, features) for each in (pairs, replace(pairs, a=pairs.b, b=pairs.a)))
    assert np.array_equal(one.layers[0][0], other.layers[0][0])
    assert np.array_equal(one.layers[0][1], other.layers[0][1])


@pytest.mark.parametrize("features", ["chi2", "concat"])
def test_the_order_of_the_pairs_does_not_matter_and_twice_the_pairs_halve_the_shrinkage(features):
    pairs = make_pairs()
    expected = scores_of(fit(pairs, features, 10.0), pairs)
    shuffled = pairs.subset(np.random.default_rng(0).permutation(len(pairs)))
    np.testing.assert_allclose(scores_of(fit(shuffled, features, 10.0), pairs), expected, atol=1e-5)
    penalties = {"slope_penalty": 2 * SLOPE_PENALTY, "least_penalty": 2 * LEAST_PENALTY}
    twice = pairs.subset(np.arange(2 * len(pairs)) % len(pairs))
    np.testing.assert_allclose(scores_of(fit(twice, features, 20.0, **penalties), pairs), expected, atol=1e-5)


@pytest.mark.parametrize("features", ["chi2", "concat", "cosine", "chi2+cosine"])
def test_streamed_features_give_the_same_bytes_as_cached_ones(features):
    # More than one block of pairs.
    pairs = make_pairs(5000)
    cached = fit(pairs, features)
    streamed = fit(pairs, features, cached_values=0)
    for expected, array in zip(cached.layers[0], streamed.layers[0], strict=True):
        assert np.array_equal(array, expected)


@pytest.mark.parametrize("count", [20, 97, 5000])
@pytest.mark.parametrize("features", [*NAMES, "chi2raw"])
def test_pairs_with_equal_features_are_refused(features, count):
    pairs = replace(make_pairs(count), name="training", a=np.zeros(count, np.int32))
    # Several, since it depends on the values whether the spread is zero or a rounding error.
    for image in range(1, 9):
        with pytest.raises(UsageError, match=r"the training pairs cannot be told apart: .* same features"):
            fit(replace(pairs, b=np.full(count, image, np.int32)), features)
    if not {"concat", "product", "cosine"} & set(features.split("+")):
        # An image with itself: all distances are zero.
        with pytest.raises(UsageError, match="cannot be told apart"):
            fit(replace(pairs, a=np.arange(count, dtype=np.int32) % 160, b=np.arange(count) % 160), features)


def test_a_dimension_that_is_always_zero_has_a_harmless_weight():
    pairs = make_pairs()
    dead = pairs.vectors.copy()
    dead[:, 3] = 0
    for shrinkage in (0.0, 10.0):
        scorer = fit(replace(pairs, vectors=dead), "absdiff", shrinkage)
        others = fit(replace(pairs, vectors=np.delete(dead, 3, axis=1)), "absdiff", shrinkage)
        assert np.isfinite(scorer.layers[0][0]).all()
        # Its spread of zero lowers the feature's mean spread, which changes the shrinkage of the others.
        assert roc_auc_score(pairs.labels, scores_of(scorer, replace(pairs, vectors=dead))) == pytest.approx(
            roc_auc_score(pairs.labels, scores_of(others, replace(pairs, vectors=np.delete(dead, 3, 1)))),
            abs=0.01,
        )


@pytest.mark.parametrize("size", [1, 7, 100])
@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_moments_are_numpys(size, offset):
    rows = np.random.default_rng(0).normal(size=(100, 5)) * [1, 10, 1e-3, 1, 1] + offset
    count, mean, spread = moments(torch.from_numpy(rows).split(size))
    assert count == 100
    np.testing.assert_allclose(mean, rows.mean(axis=0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(spread, rows.std(axis=0), rtol=1e-6)


def test_the_spread_of_equal_rows_is_zero():
    _, mean, spread = moments(torch.full((30, 2), 0.1, dtype=torch.float64).split(4))
    assert spread.tolist() == [0, 0] and mean.tolist() == [0.1, 0.1]


def test_a_quadratic_in_one_step():
    rng = np.random.default_rng(0)
    root = rng.normal(size=(6, 6))
    hessian, target = root @ root.T + np.eye(6), rng.normal(size=6)
    points = []

    def derivatives(point):
        points.append(point)
        return hessian @ (point - target), hessian

    minimum = minimise(lambda point: 0.5 * (point - target) @ hessian @ (point - target), derivatives, np.zeros(6))
    np.testing.assert_allclose(minimum, target, atol=1e-12)
    assert len(points) <= 3


@pytest.mark.parametrize("offset", [0.0, 1e3, -1e3])
@pytest.mark.parametrize("seed", range(3))
def test_ridge_logistic_regression_as_scipy_finds_it(seed, offset):
    rng = np.random.default_rng(seed)
    columns, labels = rng.normal(size=(80, 4)), rng.integers(0, 2, 80)

    def value(point):
        logits = columns @ point
        return float((np.logaddexp(0, logits) - labels * logits).sum() + 0.05 * point @ point) + offset

    def derivatives(point):
        p = 1 / (1 + np.exp(-columns @ point))
        hessian = (columns.T * (p * (1 - p))) @ columns + 0.1 * np.eye(4)
        return columns.T @ (p - labels) + 0.1 * point, hessian

    minimum = minimise(value, derivatives, np.zeros(4))
    expected = minimize(value, np.zeros(4), jac=lambda x: derivatives(x)[0], method="BFGS", tol=1e-10)
    np.testing.assert_allclose(minimum, expected.x, atol=1e-5)
    assert np.abs(derivatives(minimum)[0]).max() < 1e-7


@pytest.mark.parametrize("start", [2.0, -2.0, 5.0])
def test_steps_that_overshoot_are_halved(start):
    # Plain Newton steps from |x| > 1.09 diverge (log cosh, minimum 0).
    minimum = minimise(
        lambda x: float(np.logaddexp(x[0], -x[0])),
        lambda x: (np.tanh(x), np.array([[max(1 - np.tanh(x[0]) ** 2, 1e-12)]])),
        np.array([start]),
    )
    np.testing.assert_allclose(minimum, 0, atol=1e-6)


def test_starting_at_the_minimum_stays_there():
    minimum = minimise(lambda x: float(x @ x), lambda x: (2 * x, 2 * np.eye(3)), np.zeros(3))
    assert np.array_equal(minimum, np.zeros(3))


def test_the_start_is_not_modified():
    start = np.ones(2)
    minimise(lambda x: float(x @ x), lambda x: (2 * x, 2 * np.eye(2)), start)
    assert np.array_equal(start, np.ones(2))


@pytest.mark.parametrize("wall", [np.nan, np.inf])
def test_values_that_are_not_finite_end_the_search(wall):
    # Finite at the start only.
    point = minimise(lambda x: 1.0 if x[0] == 1 else wall, lambda x: (np.ones(1), np.eye(1)), np.array([1.0]))
    assert point.tolist() == [1.0]


def test_steps_beyond_the_domain_are_halved():
    # x - log x, infinite at and below zero, minimum 1: the first step from 5 lands at -15.
    def value(x):
        return float(x[0] - np.log(x[0])) if x[0] > 0 else float("nan")

    minimum = minimise(value, lambda x: (1 - 1 / x, np.diag(1 / x**2)), np.array([5.0]))
    np.testing.assert_allclose(minimum, 1, rtol=1e-6)
