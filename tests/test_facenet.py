"""facenet-pytorch's network without its package: the same classes, and no torchvision."""

import subprocess
import sys

import torch
from facenet_pytorch.models import inception_resnet_v1

from batchverify.facenet import inception


def test_the_module_is_imported_once_and_leaves_the_real_package_alone():
    module = inception()
    assert inception() is module
    assert sys.modules["facenet_pytorch.models.inception_resnet_v1"] is inception_resnet_v1
    assert module.__file__ == inception_resnet_v1.__file__
    assert issubclass(module.InceptionResnetV1, torch.nn.Module)


def test_an_embedder_is_built_without_torchvision():
    program = (
        "import sys; from batchverify.embedder import Embedder; Embedder(runtime='torch'); "
        "assert 'torchvision' not in sys.modules; "
        "import facenet_pytorch; assert facenet_pytorch.MTCNN and 'torchvision' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
