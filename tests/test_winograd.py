"""Convolutions with fewer multiplications against torch's in float64, in both number formats, at every edge."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import conv2d, prelu

from batchverify.tiles import multiplies_bfloat16
from batchverify.winograd import APART, DEEP, THREE, TWO, WinogradConvolution, bfloat16

needs_bfloat16 = pytest.mark.skipif(
    not multiplies_bfloat16(), reason="this CPU multiplies no bfloat16 in vectors"
)


def layer(inputs: int, outputs: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weight, bias and slopes below zero, above one and between."""
    random = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, 3, 3, generator=random) / (9 * inputs) ** 0.5
    return weight, torch.randn(outputs, generator=random), torch.linspace(-1.3, 1.3, outputs)


def images(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def wanted(
    values: torch.Tensor, parts: tuple[torch.Tensor, ...], padding: int, stride: int = 1
) -> torch.Tensor:
    """The layer in float64: (B, h, w, C) to (B, h', w', D)."""
    weight, bias, slopes = (part.double() for part in parts)
    pixels = values.double().permute(0, 3, 1, 2)
    return prelu(conv2d(pixels, weight, bias, stride, padding), slopes).permute(0, 2, 3, 1)


def built(parts: tuple[torch.Tensor, ...], **options: object) -> WinogradConvolution:
    return WinogradConvolution(*(part.numpy() for part in parts), **options)


@pytest.mark.parametrize(("filtering", "size"), [(TWO, 2), (THREE, 3), (APART, 2)])
def test_the_matrices_filter(filtering, size):
    random = np.random.default_rng(0)
    line, kernel = random.standard_normal(filtering.side), random.standard_normal(3)
    products = (np.array(filtering.kernel) @ kernel) * (np.array(filtering.inputs) @ line)
    right = np.correlate(line, kernel, "valid")[:: filtering.stride]
    np.testing.assert_allclose(np.array(filtering.outputs) @ products, right)
    assert filtering.size == len(right) == size


@pytest.mark.parametrize("height", range(3, 13))
@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("stride", [1, 2])
def test_float32_is_the_convolution(height, padding, stride):
    values, parts = images(3, height, 17 - height, 16), layer(16, 32)
    found = built(parts, padding=padding, stride=stride)(values.numpy())
    np.testing.assert_allclose(found, wanted(values, parts, padding, stride), rtol=0, atol=2e-5)


@pytest.mark.parametrize(("inputs", "outputs"), [(16, 16), (32, 48), (80, 64), (64, 80)])
def test_any_number_of_channels(inputs, outputs):
    values, parts = images(2, 23, 20, inputs), layer(inputs, outputs)
    found = built(parts)(values.numpy())
    np.testing.assert_allclose(found, wanted(values, parts, 0), rtol=0, atol=2e-5)


@needs_bfloat16
@pytest.mark.parametrize(
    ("inputs", "outputs", "padding"), [(32, 64, 1), (80, 192, 0), (192, 192, 1), (16, 16, 1)]
)
@pytest.mark.parametrize("side", [4, 8, 17])
@pytest.mark.parametrize("stride", [1, 2])
def test_bfloat16_is_near_the_convolution(inputs, outputs, padding, side, stride):
    values, parts = images(2, side, side + 1, inputs).bfloat16(), layer(inputs, outputs)
    bits = built(parts, padding=padding, stride=stride, pairs=True)(values.view(torch.int16).numpy())
    found = torch.from_numpy(bits).view(torch.bfloat16).double()
    right = wanted(values, parts, padding, stride)
    assert (found - right).norm() / right.norm() < (0.006 if inputs < DEEP or stride == 2 else 0.012)


@needs_bfloat16
def test_pairs_sum_up_in_float32():
    # One channel after the other adds 1 to 256: in bfloat16 it would stay 256.
    weight = torch.zeros(16, 64, 3, 3)
    weight[:, :, 1, 1] = 1
    values = torch.ones(1, 5, 5, 64).bfloat16()
    bias = np.full(16, 256, np.float32)
    found = WinogradConvolution(weight.numpy(), bias, 0 * bias, pairs=True)(values.view(torch.int16).numpy())
    assert torch.equal(torch.from_numpy(found).view(torch.bfloat16).float(), torch.full((1, 3, 3, 16), 320.0))


@pytest.mark.parametrize("pairs", [False, pytest.param(True, marks=needs_bfloat16)])
def test_an_image_does_not_depend_on_its_neighbours(pairs):
    values, convolution = images(5, 11, 11, 32), built(layer(32, 32), padding=1, pairs=pairs)
    numbers = values.bfloat16().view(torch.int16).numpy() if pairs else values.numpy()
    before = numbers.copy()
    together = convolution(numbers)
    assert np.array_equal(convolution(numbers[::-1].copy())[::-1], together)
    for image, alone in zip(numbers, together, strict=True):
        assert np.array_equal(convolution(image[None])[0], alone)
    assert np.array_equal(numbers, before)


def test_bits_are_rounded_as_torch_does():
    values = torch.cat([images(1000), torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 0.0, -0.0, 3e38])])
    assert np.array_equal(bfloat16(values.numpy()), values.bfloat16().view(torch.int16).numpy())


def test_a_cpu_with_short_registers_computes_the_same(tmp_path):
    code = (
        "import numpy as np; from batchverify.tiles import multiplies_bfloat16, tile_rows\n"
        "from test_winograd import built, images, layer, wanted\n"
        "assert tile_rows() == 6 and not multiplies_bfloat16()\n"
        "values, parts = images(2, 23, 20, 32), layer(32, 48)\n"
        "np.testing.assert_allclose(built(parts)(values.numpy()), wanted(values, parts, 0), rtol=0, atol=2e-5)\n"
    )
    old = {
        "NUMBA_CPU_NAME": "haswell",
        "NUMBA_CPU_FEATURES": "+avx,+avx2,+fma",
        "NUMBA_CACHE_DIR": str(tmp_path),
    }
    subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=Path(__file__).parent, env={**os.environ, **old}
    )
