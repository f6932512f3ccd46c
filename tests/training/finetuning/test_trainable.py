"""The two parts of a backbone: together they are the network, and only what is unfrozen may change."""

import copy
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from onnx_files import write_model
from torch.nn.functional import normalize

from batchverify.embedding.backbone import COMPACT, load_backbone
from batchverify.embedding.forward import TorchNetwork
from batchverify.embedding.layers import NormalisedConvolution
from batchverify.errors import ArtifactError, UsageError
from batchverify.training.finetuning.trainable import BLOCKS, TrainedPart, trainable

NAMES = {
    "vggface2": ("last_linear", "block8", "repeat_3", "mixed_7a", "repeat_2", "mixed_6a", "repeat_1", "all"),
    COMPACT: ("embedding", "head_depthwise", "head", "stage2", "stage1", "stage0", "all"),
}
CASES = [(name, block) for name, known in NAMES.items() for block in known]


@pytest.fixture(scope="module")
def backbones():
    return {name: load_backbone(name) for name in NAMES}


@pytest.fixture(scope="module")
def faces(backbones):
    """Four faces of noise for each backbone, with the vectors that the folded network gives."""
    found = {}
    for name, backbone in backbones.items():
        size = backbone.spec.size
        pixels = np.random.default_rng(0).integers(0, 256, (4, size, size, 3), dtype=np.uint8)
        rows = TorchNetwork(backbone, "cpu", dtype="float32", batch_size=4).vectors(pixels)
        found[name] = torch.from_numpy(pixels), torch.from_numpy(rows)
    return found


def test_blocks_are_listed_from_the_output_on(backbones):
    for name, backbone in backbones.items():
        assert BLOCKS[backbone.architecture] == NAMES[name]


@pytest.mark.parametrize(("name", "block"), CASES)
def test_both_parts_together_are_the_network(backbones, faces, name, block):
    pixels, expected = faces[name]
    part = TrainedPart(backbones[name], block).eval()
    activations = part.frozen(pixels)
    assert activations.dtype == torch.float32 and not activations.requires_grad
    assert part.frozen.is_empty == (block == "all")
    with torch.no_grad():
        vectors = normalize(part(activations))
    assert (vectors * expected).sum(1).min() > 0.999999


@pytest.mark.parametrize(("name", "block"), CASES)
def test_groups_hold_every_parameter_once_nearest_the_output_first(backbones, name, block):
    part = TrainedPart(backbones[name], block)
    groups = part.groups()
    assert [each for each, _ in groups] == list(NAMES[name][: NAMES[name].index(block) + 1])
    grouped = [id(parameter) for _, parameters in groups for parameter in parameters]
    assert sorted(grouped) == sorted(map(id, part.parameters())) and len(set(grouped)) == len(grouped)
    assert all(parameters and parameter.requires_grad for _, parameters in groups for parameter in parameters)


def learn(part: TrainedPart, pixels: torch.Tensor) -> None:
    """One large step."""
    optimiser = torch.optim.SGD(part.parameters(), lr=1e-3)
    part(part.frozen(pixels)).square().mean().backward()
    optimiser.step()


@pytest.mark.parametrize(("name", "block"), [("vggface2", "block8"), (COMPACT, "head"), (COMPACT, "all")])
def test_what_is_frozen_stays_to_the_bit_and_all_else_learns(backbones, faces, name, block):
    backbone, (pixels, _) = backbones[name], faces[name]
    part = TrainedPart(backbone, block)
    assert_same(part.tensors(), backbone.tensors)
    learn(part, pixels)
    tensors = part.tensors()
    assert list(tensors) == list(backbone.tensors)
    assert all(array.dtype == np.float32 for array in tensors.values())
    changed = {each for each in tensors if not np.array_equal(tensors[each], backbone.tensors[each])}
    assert changed == {each for each, _ in part.layers.named_parameters()}
    # The vectors of the file that these tensors make are those of the two parts.
    network = TorchNetwork(replace(backbone, tensors=tensors), "cpu", dtype="float32", batch_size=4)
    with torch.no_grad():
        vectors = normalize(part.eval()(part.frozen(pixels))).numpy()
    assert (network.vectors(pixels.numpy()) * vectors).sum(1).min() > 0.999999


def assert_same(found, expected):
    """The same names and bits."""
    assert found.keys() == expected.keys()
    assert all(found[name].tobytes() == expected[name].tobytes() for name in expected)


def test_statistics_change_only_if_asked(backbones, faces):
    pixels, _ = faces["vggface2"]
    for asked in (False, True):
        part = TrainedPart(backbones["vggface2"], "last_linear", train_statistics=asked)
        before = part.tensors()["last_bn.running_mean"]
        part.train()(part.frozen(pixels))
        assert np.array_equal(part.tensors()["last_bn.running_mean"], before) != asked
        part.eval()
        before = part.tensors()["last_bn.running_mean"]
        part(part.frozen(pixels))
        assert np.array_equal(part.tensors()["last_bn.running_mean"], before)
    with pytest.raises(UsageError, match="--train-statistics: compact has no batch normalisation"):
        TrainedPart(backbones[COMPACT], "head", train_statistics=True)


@pytest.mark.parametrize(("name", "block"), [("vggface2", "last_linear"), (COMPACT, "embedding")])
def test_values_are_dropped_while_it_learns_only(backbones, faces, name, block):
    pixels, _ = faces[name]
    part = TrainedPart(backbones[name], block, dropout=0.5)
    activations = part.frozen(pixels)
    with torch.no_grad():
        assert not torch.equal(part.train()(activations), part(activations))
        assert torch.equal(part.eval()(activations), part(activations))


def test_copies_and_pickles_compute_the_same_and_are_apart(backbones, faces):
    pixels, _ = faces[COMPACT]
    part = TrainedPart(backbones[COMPACT], "head").eval()
    for other in (copy.deepcopy(part), pickle.loads(pickle.dumps(part))):
        with torch.no_grad():
            assert torch.equal(other(other.frozen(pixels)), part(part.frozen(pixels)))
        learn(other, pixels)
        assert_same(part.tensors(), backbones[COMPACT].tensors)
    assert not any(name.startswith("frozen") for name in part.state_dict())


def test_the_network_is_that_of_facenet_pytorch(backbones, faces):
    from facenet_pytorch import InceptionResnetV1

    pixels, _ = faces["vggface2"]
    part = TrainedPart(backbones["vggface2"], "all").eval()
    theirs = InceptionResnetV1().eval()
    theirs.load_state_dict(part.layers.state_dict(), strict=False)
    with torch.no_grad():
        activations = part.frozen(pixels)
        assert (normalize(part(activations)) * theirs(activations)).sum(1).min() > 0.999999


def test_a_folded_layer_is_folded_once():
    from batchverify.embedding.inception import Convolution

    layer = NormalisedConvolution(Convolution("x", 3, 4)).eval()
    layer.load_state_dict({**layer.state_dict(), "bn.running_mean": torch.arange(4.0)})
    values = torch.rand(1, 3, 2, 2)
    expected = layer(values)
    for _ in range(2):
        layer.fold()
        assert torch.allclose(layer(values), expected, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_unknown_blocks_are_refused_with_the_known_ones(backbones, name):
    known = ", ".join(NAMES[name])
    with pytest.raises(UsageError, match=f"--unfreeze must be one of {known} for {name}, got 'block9'"):
        TrainedPart(backbones[name], "block9")


def test_networks_of_others_are_refused(tmp_path):
    about = {"crop": "none", "size": 112, "colour": "RGB", "mean": 0, "scale": 1}
    other = load_backbone(str(write_model(tmp_path / "other.onnx", about)))
    with pytest.raises(UsageError, match=r"--backbone .*other\.onnx: only vggface2, compact and weights of"):
        trainable(other)


def test_weights_of_another_network_are_refused(backbones):
    tensors = {**backbones["vggface2"].tensors}
    del tensors["block8.conv2d.bias"]
    with pytest.raises(ArtifactError, match=r"not the weights of InceptionResnetV1: 1 tensors .*block8"):
        TrainedPart(replace(backbones["vggface2"], tensors=tensors), "last_linear")
