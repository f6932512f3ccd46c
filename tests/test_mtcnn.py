"""The rearranged networks against facenet-pytorch's own, and pooling against torch's."""

import numpy as np
import pytest
import torch
from facenet_pytorch.models.mtcnn import ONet, PNet, RNet
from torch.nn.functional import max_pool2d, prelu

from batchverify.mtcnn import (
    Convolution,
    OutputNetwork,
    ProposalNetwork,
    RefineNetwork,
    pooled,
    pooled_on_gpu,
    sloped,
)
from batchverify.pyramid import integral, pyramid


@pytest.mark.parametrize(("height", "width"), [(250, 250), (61, 60), (131, 77), (97, 241), (20, 300)])
@torch.inference_mode()
def test_proposals_on_the_canvas_are_those_of_each_level(height, width):
    pixels = np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8)
    scales = pyramid(height, width, 20)
    canvas = scales.canvas(integral(pixels))
    both = torch.from_numpy(ProposalNetwork("cpu")(torch.cat([canvas, torch.zeros_like(canvas)]), scales))
    answers, empty = both
    assert not torch.allclose(answers, empty)
    network = PNet().eval()
    for level, (top, left, rows, columns) in zip(scales.levels, scales.cells.tolist(), strict=True):
        alone = canvas[:, :3, level.top : level.top + level.height, level.left : level.left + level.width]
        wanted_shifts, wanted = network(alone)
        assert wanted.shape[2:] == (rows, columns)
        found = answers[top : top + rows, left : left + columns]
        scores = torch.softmax(found[..., :2], dim=2)[..., 1]
        torch.testing.assert_close(scores, wanted[0, 1], rtol=0, atol=1e-5)
        torch.testing.assert_close(found[..., 2:6].permute(2, 0, 1), wanted_shifts[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("ours", "theirs", "size"), [(RefineNetwork, RNet, 24), (OutputNetwork, ONet, 48)])
@torch.inference_mode()
def test_patches_are_judged_as_by_the_original(ours, theirs, size):
    patches = torch.randn(9, 3, size, size, generator=torch.Generator().manual_seed(2))
    shifts, scores = ours("cpu")(patches.contiguous(memory_format=torch.channels_last))
    wanted = theirs().eval()(patches)
    torch.testing.assert_close(shifts, wanted[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(scores, wanted[-1][:, 1], rtol=0, atol=1e-5)
    assert ours.size == size


def laid_out(*shape: int) -> torch.Tensor:
    """Values as convolutions leave them: channels last."""
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))
    return values.contiguous(memory_format=torch.channels_last)


SLOPES = torch.linspace(-1.3, 1.3, 16)  # as the networks have: below zero and above one, too


@pytest.mark.parametrize("height", range(3, 12))
@pytest.mark.parametrize("width", [3, 6, 9, 14])
@pytest.mark.parametrize("window", [2, 3])
def test_pooling_is_torchs(height, width, window):
    values = laid_out(2, 16, height, width)
    before = values.clone()
    wanted = max_pool2d(prelu(values, SLOPES), window, 2, ceil_mode=True)
    assert torch.equal(pooled(values, SLOPES, window), wanted)
    assert torch.equal(values, before)
    assert torch.equal(pooled_on_gpu(prelu(values, SLOPES), window), wanted)


def test_areas_are_pooled_as_if_each_were_alone():
    values = laid_out(1, 16, 13, 20)
    areas = np.array([[0, 0, 7, 9], [8, 0, 5, 6], [0, 10, 13, 10]])
    found = pooled(values, SLOPES, 2, areas)
    assert torch.equal(pooled_on_gpu(prelu(values, SLOPES), 2, areas), found)
    assert found.shape == (1, 16, 7, 10)
    covered = torch.zeros(7, 10, dtype=torch.bool)
    for top, left, height, width in areas.tolist():
        alone = values[:, :, top : top + height, left : left + width]
        wanted = max_pool2d(prelu(alone, SLOPES), 2, 2, ceil_mode=True)
        place = slice(top // 2, top // 2 + wanted.shape[2]), slice(left // 2, left // 2 + wanted.shape[3])
        assert torch.equal(found[:, :, place[0], place[1]], wanted)
        covered[place] = True
    assert not found[:, :, ~covered].any()


@pytest.mark.parametrize("shape", [(3, 16, 5, 4), (1, 16, 1, 1), (7, 16)])
def test_slopes_are_torchs(shape):
    values = laid_out(*shape) if len(shape) == 4 else torch.randn(*shape)
    wanted = prelu(values, SLOPES)
    assert torch.equal(sloped(values, SLOPES), wanted)


def test_convolutions_side_by_side_are_padded_with_nothing():
    layers = [torch.nn.Conv2d(3, 5, 3), torch.nn.Conv2d(3, 2, 3)]
    values = torch.randn(1, 3, 7, 8)
    padded = torch.cat([values, torch.full((1, 1, 7, 8), 9.0)], dim=1)
    tensors = {
        f"conv{number}.{name}": tensor.detach()
        for number, layer in enumerate(layers)
        for name, tensor in layer.named_parameters()
    }
    found = Convolution(tensors, ["conv0", "conv1"], 4, "cpu")(padded)
    assert found.shape == (1, 16, 5, 6)
    torch.testing.assert_close(found[:, :5], layers[0](values))
    torch.testing.assert_close(found[:, 5:7], layers[1](values))
    assert not found[:, 7:].any()
