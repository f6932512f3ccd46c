"""The rearranged networks against facenet-pytorch's own, and torch's calls, for GPUs, against compiled ones."""

import numpy as np
import pytest
import torch
from facenet_pytorch.models.mtcnn import ONet, PNet, RNet
from torch.nn.functional import prelu

from batchverify.mtcnn import Convolution, Layer, OutputNetwork, ProposalNetwork, RefineNetwork, sloped
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


SLOPES = torch.linspace(-1.3, 1.3, 16)  # as the networks have: below zero and above one, too


@pytest.mark.parametrize("shape", [(3, 16, 5, 4), (1, 16, 1, 1), (7, 16)])
def test_slopes_are_torchs(shape):
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))
    if len(shape) == 4:
        values = values.contiguous(memory_format=torch.channels_last)
    wanted = prelu(values, SLOPES)
    assert torch.equal(sloped(values, SLOPES), wanted)


@pytest.mark.parametrize("window", [0, 2, 3])
@torch.inference_mode()
def test_torchs_calls_give_what_the_compiled_ones_give(window):
    """GPUs take torch's: here on a CPU."""
    areas = np.array([[0, 0, 7, 9], [8, 0, 5, 6], [0, 10, 13, 10]]) if window == 2 else None
    random = torch.Generator().manual_seed(1)
    tensors = {
        f"{name}.weight": torch.randn(*shape, generator=random) / 10
        for name, shape in (("conv1", (10, 3 if window else 16, 3, 3)), ("prelu1", (10,)))
    }
    tensors["conv1.bias"] = torch.linspace(-1, 1, 10)
    inputs = 3 if window else 16
    layer = Layer(tensors, 1, inputs, window, "cpu")
    values = torch.randn(2, inputs, 15, 22, generator=random).contiguous(memory_format=torch.channels_last)
    found = layer(values, areas)
    layer._compiled = None
    torch.testing.assert_close(found, layer(values, areas), rtol=0, atol=2e-5)


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
