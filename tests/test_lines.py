"""Convolutions along one side in bfloat16 against torch's in float64, with every number of zeros at the ends."""

import numpy as np
import pytest
import torch
from torch.nn.functional import conv2d, prelu

from batchverify.lines import LineConvolution
from batchverify.tiles import multiplies_bfloat16

pytestmark = pytest.mark.skipif(
    not multiplies_bfloat16(), reason="this CPU multiplies no bfloat16 in vectors"
)


@pytest.mark.parametrize("taps", [3, 7])
@pytest.mark.parametrize("upright", [False, True])
@pytest.mark.parametrize(("along", "beside"), [(1, 8), (2, 8), (8, 8), (13, 9), (5, 16), (3, 23)])
def test_it_is_the_convolution(taps, upright, along, beside):
    random = torch.Generator().manual_seed(taps)
    weight = torch.randn(64, 32, taps, generator=random) / (32 * taps) ** 0.5
    bias, slopes = torch.randn(64, generator=random), torch.linspace(-1.3, 1.3, 64)
    kernel = weight[:, :, :, None] if upright else weight[:, :, None]
    sides = (along, beside) if upright else (beside, along)
    values = torch.randn(3, *sides, 32, generator=random).bfloat16()
    padding = (taps // 2, 0) if upright else (0, taps // 2)
    wanted = conv2d(
        values.double().permute(0, 3, 1, 2), kernel.bfloat16().double(), bias.double(), padding=padding
    )
    wanted = prelu(wanted, slopes.double()).permute(0, 2, 3, 1)

    found = LineConvolution(kernel.numpy(), bias.numpy(), slopes.numpy())(values.view(torch.int16).numpy())
    assert found.dtype == np.int16
    got = torch.from_numpy(found).view(torch.bfloat16).double()
    # Rounded once, to eight bits.
    torch.testing.assert_close(got, wanted, rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize("shape", [(1, 7, 8, 32), (1, 8, 7, 64)])
def test_other_shapes_are_refused(shape):
    nothing = np.zeros(32, np.float32)
    line = LineConvolution(np.zeros((32, 32, 1, 3), np.float32), nothing, nothing)
    with pytest.raises(ValueError, match=r"8 pixels at least|channels must be 32"):
        line(np.zeros(shape, np.int16))
