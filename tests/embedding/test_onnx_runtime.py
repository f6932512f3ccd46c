"""ONNX files on a GPU: what is handed to ONNX Runtime, whose place OpenVINO takes, and what is said without it."""

import sys
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

import numpy as np
import pytest
from onnx_files import expected, weights, write_model

from batchverify.embedding.network import check_network
from batchverify.embedding.onnx_backbone import OnnxBackbone
from batchverify.embedding.onnx_runtime import OnnxRuntimeNetwork
from batchverify.errors import ArtifactError, BatchverifyError

# The few calls of ONNX Runtime that are made, by OpenVINO on the CPU.
STANDIN = """
    import numpy as np
    import openvino

    KINDS = {"f32": "tensor(float)", "f16": "tensor(float16)", "u8": "tensor(uint8)"}
    PROVIDERS = ["CUDAExecutionProvider", "CPUExecutionProvider"]

    class SessionOptions:
        pass

    def get_available_providers():
        return PROVIDERS

    class Value:
        def __init__(self, port):
            self.name, self.type = port.any_name, KINDS[port.get_element_type().get_type_name()]

    class InferenceSession:
        def __init__(self, path, options, providers):
            assert providers == [("CUDAExecutionProvider", {"device_id": 1})] and options.log_severity_level == 3
            self.model = openvino.Core().read_model(path)
            self.compiled = openvino.Core().compile_model(self.model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

        def get_providers(self):
            return PROVIDERS

        def get_inputs(self):
            return [Value(port) for port in self.model.inputs]

        def get_outputs(self):
            return [Value(port) for port in self.model.outputs]

        def run(self, outputs, inputs):
            [(name, values)] = inputs.items()
            if values.shape[0] > 128:
                raise ValueError("out of memory")
            found = self.compiled({name: values})
            return [found[name] for name in outputs]
"""
PLAIN = {"crop": "none", "size": 112, "colour": "BGR", "mean": [120, 127.5, 100], "scale": 128}


@pytest.fixture
def library(tmp_path: Path, monkeypatch) -> Iterator[Path]:
    """A module called onnxruntime."""
    module = tmp_path / "library" / "onnxruntime.py"
    module.parent.mkdir()
    module.write_text(dedent(STANDIN))
    monkeypatch.syspath_prepend(str(module.parent))
    monkeypatch.delitem(sys.modules, "onnxruntime", raising=False)
    yield module
    sys.modules.pop("onnxruntime", None)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize(("layout", "batch", "size"), [("NCHW", "N", 128), ("NHWC", "N", 4), ("NCHW", 1, 1)])
def test_faces_are_scaled_and_ordered_as_the_description_says(tmp_path, layout, batch, size):
    path = write_model(tmp_path / "model.onnx", PLAIN, layout=layout, batch=batch)
    given = None if size == 128 else size
    network = OnnxRuntimeNetwork(OnnxBackbone.load(str(path)), "cuda:1", batch_size=given)
    assert network.batch_size == size and network.runtime == "onnxruntime"
    check_network(network, "model")
    pixels = np.random.default_rng(0).integers(0, 256, (5, 112, 112, 3), dtype=np.uint8)
    wanted = expected(pixels, weights(96), "BGR", PLAIN["mean"], 128)
    np.testing.assert_allclose(network.vectors(pixels), wanted, atol=1e-5)


def test_what_the_library_cannot_do_is_said(tmp_path, library):
    backbone = OnnxBackbone.load(str(write_model(tmp_path / "model.onnx", PLAIN)))
    network = OnnxRuntimeNetwork(backbone, "cuda:1", batch_size=200)
    with pytest.raises(BatchverifyError, match=r"a batch of 200 faces \(--batch-size\): out of memory"):
        network.vectors(np.zeros((1, 112, 112, 3), np.uint8))
    with pytest.raises(ArtifactError, match="ONNX Runtime cannot read it"):
        OnnxRuntimeNetwork(backbone, "cuda:0")
    library.write_text(dedent(STANDIN).replace('"CUDAExecutionProvider", "CPU', '"CPU'))
    sys.modules.pop("onnxruntime")
    with pytest.raises(ArtifactError, match="this ONNX Runtime has no CUDAExecutionProvider: pip install"):
        OnnxRuntimeNetwork(backbone, "cuda:1")


def test_without_the_library_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    backbone = OnnxBackbone.load(str(write_model(tmp_path / "model.onnx", PLAIN)))
    with pytest.raises(
        ArtifactError, match=r"pip install 'batchverify\[onnx-gpu\]', or compute on the CPU with"
    ):
        OnnxRuntimeNetwork(backbone, "cuda")
