"""Convolution, slope and pooling in one go against torch's three calls; maxima alone in both number formats."""

import numpy as np
import pytest
import torch
from test_winograd import images, layer, needs_bfloat16, wanted
from torch.nn.functional import max_pool2d

from batchverify.strips import PooledConvolution, maxima


def pooled(values: torch.Tensor, window: int) -> torch.Tensor:
    """(B, h, w, C) to (B, h', w', C), by torch."""
    return max_pool2d(values.permute(0, 3, 1, 2), window, 2, ceil_mode=True).permute(0, 2, 3, 1)


@pytest.mark.parametrize("height", [5, 6, 9, 24])
@pytest.mark.parametrize("width", [5, 8, 13, 14, 17, 18, 48])
@pytest.mark.parametrize(("window", "outputs"), [(2, 16), (3, 32), (2, 48), (3, 64)])
def test_it_is_torchs(height, width, window, outputs):
    values, parts = images(2, height, width, 3), layer(3, outputs)
    found = PooledConvolution(*(part.numpy() for part in parts), window)(values.numpy())
    np.testing.assert_allclose(found, pooled(wanted(values, parts, 0), window), rtol=0, atol=1e-5)


def test_areas_are_pooled_as_if_each_were_alone():
    values, parts = images(2, 15, 24, 3), layer(3, 16)
    areas = np.array([[0, 0, 7, 9], [8, 0, 5, 6], [0, 10, 13, 12]])
    found = PooledConvolution(*(part.numpy() for part in parts), 2)(values.numpy(), areas)
    convolved = wanted(values, parts, 0)
    covered = np.zeros(found.shape[1:3], bool)
    for top, left, height, width in areas.tolist():
        alone = pooled(convolved[:, top : top + height, left : left + width], 2)
        place = slice(top // 2, top // 2 + alone.shape[1]), slice(left // 2, left // 2 + alone.shape[2])
        np.testing.assert_allclose(found[:, place[0], place[1]], alone, rtol=0, atol=1e-5)
        covered[place] = True
    assert not covered.all() and not found[:, ~covered].any()


@pytest.mark.parametrize("height", range(3, 12))
@pytest.mark.parametrize("width", [3, 6, 9, 14])
@pytest.mark.parametrize("window", [2, 3])
def test_maxima_are_torchs(height, width, window):
    values = images(2, height, width, 32)
    assert np.array_equal(maxima(values.numpy(), window), pooled(values, window))


@needs_bfloat16
def test_maxima_of_bfloat16_are_exact():
    values = images(2, 9, 11, 48).bfloat16()
    found = torch.from_numpy(maxima(values.view(torch.int16).numpy(), 3)).view(torch.bfloat16)
    assert torch.equal(found, pooled(values, 3))
