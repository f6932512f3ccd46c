"""Mean and spread against numpy's, in blocks of any size."""

import numpy as np
import pytest
import torch

from batchverify.moments import moments


@pytest.mark.parametrize("size", [1, 7, 100])
@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_moments_are_numpys(size, offset):
    rows = np.random.default_rng(0).normal(size=(100, 5)) * [1, 10, 1e-3, 1, 1] + offset
    count, mean, spread = moments(torch.from_numpy(rows).split(size))
    assert count == 100
    np.testing.assert_allclose(mean, rows.mean(axis=0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(spread, rows.std(axis=0), rtol=1e-6)


def test_rows_all_alike_have_no_spread_at_all():
    _, mean, spread = moments(torch.full((30, 2), 0.1, dtype=torch.float64).split(4))
    assert spread.tolist() == [0, 0] and mean.tolist() == [0.1, 0.1]
