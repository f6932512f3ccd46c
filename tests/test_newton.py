"""Newton's method against closed forms and scipy."""

import numpy as np
import pytest
from scipy.optimize import minimize

from batchverify.newton import minimise


def test_a_quadratic_in_one_step():
    rng = np.random.default_rng(0)
    root = rng.normal(size=(6, 6))
    hessian, target = root @ root.T + np.eye(6), rng.normal(size=6)
    steps = []

    def derivatives(place):
        steps.append(place)
        return hessian @ (place - target), hessian

    found = minimise(
        lambda place: 0.5 * (place - target) @ hessian @ (place - target), derivatives, np.zeros(6)
    )
    np.testing.assert_allclose(found, target, atol=1e-12)
    assert len(steps) <= 3


@pytest.mark.parametrize("offset", [0.0, 1e3, -1e3])
@pytest.mark.parametrize("seed", range(3))
def test_ridge_logistic_regression_as_scipy_finds_it(seed, offset):
    rng = np.random.default_rng(seed)
    columns, labels = rng.normal(size=(80, 4)), rng.integers(0, 2, 80)

    def value(place):
        logits = columns @ place
        return float((np.logaddexp(0, logits) - labels * logits).sum() + 0.05 * place @ place) + offset

    def derivatives(place):
        p = 1 / (1 + np.exp(-columns @ place))
        hessian = (columns.T * (p * (1 - p))) @ columns + 0.1 * np.eye(4)
        return columns.T @ (p - labels) + 0.1 * place, hessian

    found = minimise(value, derivatives, np.zeros(4))
    expected = minimize(value, np.zeros(4), jac=lambda x: derivatives(x)[0], method="BFGS", tol=1e-10)
    np.testing.assert_allclose(found, expected.x, atol=1e-5)
    assert np.abs(derivatives(found)[0]).max() < 1e-7


@pytest.mark.parametrize("start", [2.0, -2.0, 5.0])
def test_steps_that_overshoot_are_halved(start):
    # A plain Newton step from |x| > 1.09 goes further away each time (log cosh, minimum 0).
    found = minimise(
        lambda x: float(np.logaddexp(x[0], -x[0])),
        lambda x: (np.tanh(x), np.array([[max(1 - np.tanh(x[0]) ** 2, 1e-12)]])),
        np.array([start]),
    )
    np.testing.assert_allclose(found, 0, atol=1e-6)


def test_starting_at_the_minimum_stays_there():
    found = minimise(lambda x: float(x @ x), lambda x: (2 * x, 2 * np.eye(3)), np.zeros(3))
    assert np.array_equal(found, np.zeros(3))


def test_the_start_is_not_written_to():
    start = np.ones(2)
    minimise(lambda x: float(x @ x), lambda x: (2 * x, 2 * np.eye(2)), start)
    assert np.array_equal(start, np.ones(2))


@pytest.mark.parametrize("wall", [np.nan, np.inf])
def test_values_that_are_not_finite_end_it_where_it_was(wall):
    # Finite at the start alone.
    found = minimise(lambda x: 1.0 if x[0] == 1 else wall, lambda x: (np.ones(1), np.eye(1)), np.array([1.0]))
    assert found.tolist() == [1.0]


def test_a_wall_in_the_way_is_kept_from():
    # x - log x, infinite at and below zero, minimum 1: the first step from 5 lands at -15.
    def value(x):
        return float(x[0] - np.log(x[0])) if x[0] > 0 else float("nan")

    found = minimise(value, lambda x: (1 - 1 / x, np.diag(1 / x**2)), np.array([5.0]))
    np.testing.assert_allclose(found, 1, rtol=1e-6)
