"""Pair features against slow loops; both sides of a pair count alike."""

import numpy as np
import torch

from batchverify.features import EPSILON, FEATURES, chi_square, cosine

RNG = np.random.default_rng(0)


def unit_rows(count: int) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.from_numpy(RNG.normal(size=(count, 512)).astype(np.float32)))


def test_chi_square_is_the_formula():
    a, b = unit_rows(3), unit_rows(3)
    slow = [
        [(x - y) ** 2 / (abs(x) + abs(y) + EPSILON) for x, y in zip(*rows, strict=True)]
        for rows in zip(a.tolist(), b.tolist(), strict=True)
    ]
    np.testing.assert_allclose(chi_square(a, b).numpy(), slow, rtol=1e-5, atol=1e-9)


def test_chi_square_of_opposite_values_and_zeros_is_finite():
    # DeepFace's denominator a + b is zero here.
    terms = chi_square(torch.tensor([[0.5, 0.0, -0.1]]), torch.tensor([[-0.5, 0.0, -0.1]]))
    np.testing.assert_allclose(terms.numpy(), [[1.0, 0.0, 0.0]], rtol=1e-5)


def test_cosine_is_the_dot_product():
    a, b = unit_rows(4), unit_rows(4)
    slow = [
        sum(x * y for x, y in zip(*rows, strict=True)) for rows in zip(a.tolist(), b.tolist(), strict=True)
    ]
    np.testing.assert_allclose(cosine(a, b).numpy(), slow, atol=1e-6)
    np.testing.assert_allclose(cosine(a, a).numpy(), 1, atol=1e-6)


def test_the_sides_can_be_exchanged_bit_for_bit():
    a, b = unit_rows(200), unit_rows(200)
    for feature in [*FEATURES.values(), cosine]:
        assert torch.equal(feature(a, b), feature(b, a))
