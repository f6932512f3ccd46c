"""Distances straight from the matrix against slow loops; the same bits whatever the numbers' type and place."""

import numpy as np
import pytest
import torch

from batchverify.heads.features import chi_square_distance
from batchverify.kernels.loops import EPSILON, distances

RNG = np.random.default_rng(3)


def unit_rows(count: int, dimension: int, kind: type = np.float16) -> np.ndarray:
    rows = RNG.normal(size=(count, dimension))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(kind)


def slow(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    pairs = [(float(p), float(q)) for p, q in zip(x, y, strict=True)]
    chi = sum((p - q) ** 2 / (abs(p) + abs(q) + EPSILON) for p, q in pairs)
    return chi, sum(p * q for p, q in pairs)


@pytest.mark.parametrize("kind", [np.float16, np.float32])
@pytest.mark.parametrize("dimension", [1, 7, 32, 100, 512])
def test_they_are_their_formulas(dimension, kind):
    first, second = unit_rows(20, dimension, kind), unit_rows(9, dimension, kind)
    a, b = RNG.integers(0, 20, 50), RNG.integers(0, 9, 50)
    expected = [slow(first[i], second[j]) for i, j in zip(a, b, strict=True)]
    np.testing.assert_allclose(np.stack(distances(first, second, a, b), axis=1), expected, atol=2e-5)


def test_half_precision_float32_both_orders_and_layouts_give_the_same_bits():
    half = unit_rows(300, 512)
    wide = half.astype(np.float32)
    a, b = RNG.integers(0, 300, (2, 1000))
    expected = np.stack(distances(half, half, a, b))
    turned = np.asfortranarray(half)
    turned.flags.writeable = False
    for first, second in ((wide, wide), (half, wide), (wide, half), (turned, half)):
        assert np.array_equal(np.stack(distances(first, second, a, b)), expected)
    assert np.array_equal(np.stack(distances(half, half, b, a)), expected)
    assert np.array_equal(np.stack(distances(half, half, a[::-1], b[::-1])), expected[:, ::-1])


def test_every_half_precision_number_is_widened_exactly():
    numbers = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    finite = numbers[np.isfinite(numbers)][:, None]
    one, rows = np.ones((1, 1), np.float16), np.arange(len(finite))
    _, dots = distances(finite, one, rows, np.zeros_like(rows))
    assert np.array_equal(dots, finite[:, 0].astype(np.float32))


def test_they_are_the_features_that_heads_are_trained_on():
    rows = unit_rows(200, 512)
    a, b = np.arange(100), np.arange(100, 200)
    x, y = (torch.from_numpy(rows[each]).float() for each in (a, b))
    chi, dots = distances(rows, rows, a, b)
    np.testing.assert_allclose(chi, chi_square_distance(x, y)[:, 0], rtol=1e-6)
    np.testing.assert_allclose(dots, (x * y).sum(1), atol=1e-6)


def test_equal_rows_zeros_and_no_pairs():
    rows = np.vstack([unit_rows(1, 512), np.zeros((1, 512), np.float16)])
    chi, dots = distances(rows, rows, np.array([0, 1, 1]), np.array([0, 1, 0]))
    assert chi[0] == chi[1] == dots[1] == dots[2] == 0
    np.testing.assert_allclose([dots[0], chi[2]], [1, abs(rows[0].astype(float)).sum()], rtol=2e-3)
    nothing = np.zeros(0, np.int64)
    assert [each.shape for each in distances(rows, rows, nothing, nothing)] == [(0,), (0,)]


@pytest.mark.parametrize("rows", [[0, -1], [5, 0]])
def test_rows_that_are_not_there_are_refused(rows):
    vectors = unit_rows(5, 32)
    for pair in ((rows, [0, 0]), ([0, 0], rows)):
        with pytest.raises(IndexError, match="of 5"):
            distances(vectors, vectors, *map(np.array, pair))


def test_what_does_not_fit_is_refused_and_other_numbers_are_float32():
    vectors, none = unit_rows(5, 32), np.zeros(0, np.int64)
    for first, second, a, b in (
        (vectors, vectors, np.arange(3), np.arange(2)),
        (vectors, vectors, none, np.arange(2)),
        (vectors, unit_rows(5, 16), np.arange(3), np.arange(3)),
    ):
        with pytest.raises(ValueError, match="of matrices"):
            distances(first, second, a, b)
    with pytest.raises(TypeError):
        distances(vectors, vectors, np.array([0.0]), np.array([1.0]))
    rows = np.arange(5)
    expected = np.stack(distances(vectors.astype(np.float32), vectors.astype(np.float32), rows, rows[::-1]))
    found = distances(vectors.astype(np.float64), vectors, rows.astype(np.uint8), rows[::-1])
    assert np.array_equal(np.stack(found), expected)
