"""Convolutions of 1 x 1 in bfloat16 against torch's in float64: several inputs, several outputs, sums in place."""

import numpy as np
import pytest
import torch

from batchverify.products import ROWS, PixelProduct
from batchverify.tiles import multiplies_bfloat16

pytestmark = pytest.mark.skipif(
    not multiplies_bfloat16(), reason="this CPU multiplies no bfloat16 in vectors"
)


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def bits(values: torch.Tensor) -> np.ndarray:
    return values.view(torch.int16).numpy()


def floats(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values).view(torch.bfloat16).double()


@pytest.mark.parametrize("pixels", [1, ROWS - 1, ROWS, ROWS + 1, 5 * ROWS + 3])
@pytest.mark.parametrize(
    ("inputs", "outputs"), [([16], [32]), ([64], [32, 96]), ([32, 16, 48], [64]), ([48, 96], [160])]
)
@pytest.mark.parametrize("adds", [False, True])
def test_it_is_the_convolution(pixels, inputs, outputs, adds):
    if adds:
        outputs = [sum(outputs)]
    channels, filters = sum(inputs), sum(outputs)
    weight, bias = numbers(filters, channels) / channels**0.5, numbers(filters, seed=1)
    slopes = torch.linspace(-1.3, 1.3, filters)
    values = [numbers(1, 1, pixels, count, seed=count).bfloat16() for count in inputs]
    there = numbers(1, 1, pixels, filters, seed=3).bfloat16()
    wanted = torch.cat(values, 3).double() @ weight.bfloat16().double().T + bias.double()
    wanted = wanted + there.double() if adds else wanted
    wanted = torch.where(wanted > 0, wanted, wanted * slopes.double())

    product = PixelProduct(weight.numpy(), bias.numpy(), slopes.numpy(), outputs)
    found = product(*map(bits, values), onto=bits(there) if adds else None)
    assert [each.shape for each in found] == [(1, 1, pixels, count) for count in outputs]
    joined = torch.cat([floats(each) for each in found], 3)
    # Rounded once, to eight bits.
    torch.testing.assert_close(joined, wanted, rtol=2**-8, atol=1e-4)
    assert not adds or np.shares_memory(found[0], bits(there))


def test_pixels_do_not_depend_on_their_neighbours():
    weight, nothing = numbers(64, 32).numpy(), np.zeros(64, np.float32)
    values = bits(numbers(4, 3, 7, 32).bfloat16())
    product = PixelProduct(weight, nothing, nothing)
    together = product(values)[0].reshape(-1, 64)
    alone = [product(pixel.reshape(1, 1, 1, 32))[0].reshape(64) for pixel in values.reshape(-1, 32)]
    np.testing.assert_array_equal(together, alone)


@pytest.mark.parametrize(
    ("inputs", "outputs", "onto"),
    [([48], None, None), ([24, 8], None, None), ([32], [32, 32], (5, 64)), ([32], None, (5, 128))],
)
def test_other_shapes_are_refused(inputs, outputs, onto):
    nothing = np.zeros(64, np.float32)
    product = PixelProduct(np.zeros((64, 32), np.float32), nothing, nothing, outputs)
    values = [np.zeros((1, 1, 5, count), np.int16) for count in inputs]
    target = None if onto is None else np.zeros((1, 1, *onto), np.int16)[..., :64]
    with pytest.raises(ValueError, match=r"channels must be 32|one contiguous array"):
        product(*values, onto=target)
