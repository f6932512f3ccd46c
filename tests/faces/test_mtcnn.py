"""MTCNN's networks in OpenVINO and in torch against facenet-pytorch's own."""

import numpy as np
import pytest
import torch
from facenet_pytorch.models.mtcnn import ONet, PNet, RNet

from batchverify.faces.mtcnn import OpenvinoNetworks, mtcnn_weights
from batchverify.faces.mtcnn_torch import TorchNetworks
from batchverify.faces.pyramid import integral, pyramid


@pytest.fixture(scope="module", params=["openvino", "torch"])
def networks(request):
    return OpenvinoNetworks() if request.param == "openvino" else TorchNetworks("cpu")


@pytest.mark.parametrize(("height", "width"), [(250, 250), (61, 60), (131, 77), (97, 241), (20, 300)])
@torch.inference_mode()
def test_proposals_on_the_canvas_are_those_of_each_level(height, width, networks):
    pixels = np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8)
    scales = pyramid(height, width, 20)
    canvas = scales.canvas(integral(pixels))
    answers, empty = networks.propose(np.concatenate([canvas, np.zeros_like(canvas)]), scales)
    assert not np.allclose(answers, empty)
    network = PNet().eval()
    for level, (top, left, rows, columns) in zip(scales.levels, scales.cells.tolist(), strict=True):
        alone = canvas[:, level.top : level.top + level.height, level.left : level.left + level.width]
        wanted_shifts, wanted = network(torch.from_numpy(alone).permute(0, 3, 1, 2))
        assert wanted.shape[2:] == (rows, columns)
        found = answers[top : top + rows, left : left + columns]
        scores = torch.softmax(torch.from_numpy(found[..., :2]), dim=2)[..., 1]
        torch.testing.assert_close(scores, wanted[0, 1], rtol=0, atol=1e-5)
        shifts = torch.from_numpy(found[..., 2:6]).permute(2, 0, 1)
        torch.testing.assert_close(shifts, wanted_shifts[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("ours", "theirs", "size"), [("refine", RNet, 24), ("output", ONet, 48)])
@torch.inference_mode()
def test_patches_are_judged_as_by_the_original(ours, theirs, size, networks):
    patches = np.random.default_rng(2).standard_normal((9, size, size, 3)).astype(np.float32)
    shifts, scores = getattr(networks, ours)(patches)
    wanted = theirs().eval()(torch.from_numpy(patches).permute(0, 3, 1, 2))
    np.testing.assert_allclose(shifts, wanted[0], rtol=0, atol=1e-5)
    np.testing.assert_allclose(scores, wanted[-1][:, 1], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("name", "network"), [("pnet", PNet), ("rnet", RNet), ("onet", ONet)])
def test_the_packaged_weights_are_facenet_pytorchs(name, network):
    wanted, found = network().state_dict(), mtcnn_weights(name)
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert np.array_equal(found[key], tensor.numpy())


def test_many_sizes_of_pictures_take_no_more_memory():
    """A compiled network keeps something for every size: after some it is compiled anew, with the same answers."""
    networks = OpenvinoNetworks(sizes_kept=3)
    pixels = np.random.default_rng(3).integers(0, 256, (90, 80, 3), dtype=np.uint8)
    compiled, answers = [], []
    for number in (0, 1, 2, 3, 4, 0):
        picture = pixels[: 60 + 6 * number]
        scales = pyramid(*picture.shape[:2], 20)
        assert scales
        answers.append(networks.propose(scales.canvas(integral(picture)), scales))
        compiled.append(networks._proposal)
        assert len(networks._sizes) <= 3
    assert len({id(each) for each in compiled}) > 1
    assert np.array_equal(answers[0], answers[-1])
