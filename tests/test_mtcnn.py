"""The rearranged networks against facenet-pytorch's own, and pooling against torch's."""

import numpy as np
import pytest
import torch
from facenet_pytorch.models.mtcnn import ONet, PNet, RNet
from torch.nn.functional import max_pool2d

from batchverify.mtcnn import Convolution, OutputNetwork, ProposalNetwork, RefineNetwork, halved, thinned
from batchverify.pyramid import STRIDE, integral, pyramid


@pytest.mark.parametrize(("height", "width"), [(250, 250), (61, 60), (131, 77), (97, 241), (20, 300)])
@torch.inference_mode()
def test_proposals_on_the_canvas_are_those_of_each_level(height, width):
    pixels = np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8)
    scales = pyramid(height, width, 20)
    canvas = scales.canvas(integral(pixels))
    shifts, scores = ProposalNetwork("cpu")(canvas, scales)
    assert scores.shape == scales.owner.shape
    network = PNet().eval()
    for level in scales.levels:
        alone = canvas[:, :3, level.top : level.top + level.height, level.left : level.left + level.width]
        wanted_shifts, wanted = network(alone)
        assert wanted.shape[2:] == level.map_size
        top, left = level.top // STRIDE, level.left // STRIDE
        place = slice(top, top + level.map_size[0]), slice(left, left + level.map_size[1])
        torch.testing.assert_close(scores[place], wanted[0, 1], rtol=0, atol=1e-5)
        torch.testing.assert_close(shifts[:, place[0], place[1]], wanted_shifts[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("ours", "theirs", "size"), [(RefineNetwork, RNet, 24), (OutputNetwork, ONet, 48)])
@torch.inference_mode()
def test_patches_are_judged_as_by_the_original(ours, theirs, size):
    patches = torch.randn(9, 3, size, size, generator=torch.Generator().manual_seed(2))
    padded = torch.cat([patches, torch.zeros(9, 1, size, size)], dim=1)
    shifts, scores = ours("cpu")(padded.contiguous(memory_format=torch.channels_last))
    wanted = theirs().eval()(patches)
    torch.testing.assert_close(shifts, wanted[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(scores, wanted[-1][:, 1], rtol=0, atol=1e-5)
    assert ours.size == size


@pytest.mark.parametrize("height", range(3, 12))
@pytest.mark.parametrize("width", [3, 6, 9, 14])
def test_pooling_is_torchs(height, width):
    values = torch.randn(2, 16, height, width, generator=torch.Generator().manual_seed(height))
    for laid_out in (values, values.contiguous(memory_format=torch.channels_last)):
        before = laid_out.clone()
        assert torch.equal(halved(laid_out), max_pool2d(values, 2, 2, ceil_mode=True))
        assert torch.equal(thinned(laid_out), max_pool2d(values, 3, 2, ceil_mode=True))
        assert torch.equal(laid_out, before)


def test_convolutions_side_by_side_are_padded_with_nothing():
    layers = [torch.nn.Conv2d(3, 5, 3), torch.nn.Conv2d(3, 2, 3)]
    values = torch.randn(1, 3, 7, 8)
    padded = torch.cat([values, torch.full((1, 1, 7, 8), 9.0)], dim=1)
    found = Convolution(layers, 4, "cpu")(padded)
    assert found.shape == (1, 16, 5, 6)
    torch.testing.assert_close(found[:, :5], layers[0](values))
    torch.testing.assert_close(found[:, 5:7], layers[1](values))
    assert not found[:, 7:].any()
