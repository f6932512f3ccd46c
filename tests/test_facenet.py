"""facenet-pytorch's parts without its package: the same classes and weights, and no torchvision."""

import subprocess
import sys

import pytest
import torch
from facenet_pytorch.models import inception_resnet_v1
from facenet_pytorch.models.mtcnn import ONet, PNet, RNet

from batchverify.facenet import inception, mtcnn_weights


def test_the_module_is_imported_once_and_leaves_the_real_package_alone():
    module = inception()
    assert inception() is module
    assert sys.modules["facenet_pytorch.models.inception_resnet_v1"] is inception_resnet_v1
    assert module.__file__ == inception_resnet_v1.__file__
    assert issubclass(module.InceptionResnetV1, torch.nn.Module)


@pytest.mark.parametrize(("name", "network"), [("pnet", PNet), ("rnet", RNet), ("onet", ONet)])
def test_weights_are_those_of_the_packages_networks(name, network):
    wanted = network().state_dict()
    found = mtcnn_weights(name)
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert torch.equal(found[key], tensor)
        assert found[key].is_contiguous()


def test_an_embedder_is_built_without_torchvision():
    program = (
        "import sys; from batchverify.embedder import Embedder; Embedder(); "
        "assert 'torchvision' not in sys.modules; "
        "import facenet_pytorch; assert facenet_pytorch.MTCNN and 'torchvision' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
