"""ONNX files on a GPU: what is handed to ONNX Runtime, whose place OpenVINO takes, and what is said without it."""

import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from textwrap import dedent
from typing import Any

import numpy as np
import pytest
from onnx_files import expected, node, tensor, value, weights, write_model

from batchverify.embedding import embedder
from batchverify.embedding.cpu_network import CpuNetwork
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
    with pytest.raises(ArtifactError, match=r"pip install 'batchverify\[onnx-gpu\]', or compute on the CPU with"):
        OnnxRuntimeNetwork(backbone, "cuda")


CROWD = [
    node("ReduceMean", ["vectors"], ["crowd"], axes=[0], keepdims=1),
    node("Sub", ["vectors", "crowd"], ["embedding"]),
]


@pytest.mark.usefixtures("library")
def test_the_self_check_is_not_blunted_by_what_fills_a_batch_up(tmp_path):
    """In a batch of 128 a single other face moves the mean by less than a hundredth."""
    path = write_model(tmp_path / "model.onnx", PLAIN, after=CROWD)
    options = {"dtype": "auto", "flip": False, "batch_size": None}
    with pytest.raises(ArtifactError, match="depends on the other faces of its batch"):
        embedder._network(OnnxBackbone.load(str(path)), "cuda:1", "auto", 1, 1, options)


# The library itself, on a CPU, wherever it is installed: `pip install onnxruntime`.
real = pytest.mark.skipif(find_spec("onnxruntime") is None, reason="ONNX Runtime is not installed")
TO_FLOAT = [node("Cast", ["pixels"], ["faces"], to=1)]
LENGTH = [
    node("ReduceL2", ["vectors"], ["norm"], axes=[1], keepdims=1),
    node("Div", ["vectors", "norm"], ["embedding"]),
]
MODELS: dict[str, dict[str, Any]] = {
    "channels last": {"layout": "NHWC"},
    "one face at a time": {"batch": 1},
    "four at a time, channels last": {"batch": 4, "layout": "NHWC"},
    "bytes": {"before": TO_FLOAT, "kind": 2},
    "halves": {"before": TO_FLOAT, "kind": 10},
    "two outputs": {"after": LENGTH, "outputs": [value("norm", ["N", 1]), value("embedding", ["N", 96])]},
    "maps of one pixel": {
        "after": [node("Reshape", ["vectors", "shape"], ["embedding"])],
        "extra": [tensor("shape", np.array([-1, 96, 1, 1]))],
        "outputs": [value("embedding", ["N", 96, 1, 1])],
    },
}


@real
@pytest.mark.parametrize("size", [None, 3])
@pytest.mark.parametrize("name", MODELS)
def test_it_gives_what_openvino_gives(tmp_path, name, size):
    raw = {"mean": 0, "scale": 1} if name == "bytes" else {}
    about = {**PLAIN, **raw} | ({"output": "embedding"} if name == "two outputs" else {})
    backbone = OnnxBackbone.load(str(write_model(tmp_path / "model.onnx", about, **MODELS[name])))
    network = OnnxRuntimeNetwork(backbone, "cpu", batch_size=size, flip=True)
    assert network.batch_size == (backbone.batch or size or 128)
    check_network(network, name)
    pixels = np.random.default_rng(0).integers(0, 256, (5, 112, 112, 3), dtype=np.uint8)
    wanted = CpuNetwork(backbone, batch_size=size, flip=True).vectors(pixels)
    np.testing.assert_allclose(network.vectors(pixels), wanted, atol=1e-6)


@real
def test_it_says_why_it_cannot(tmp_path):
    path = write_model(tmp_path / "model.onnx", PLAIN)
    backbone = OnnxBackbone.load(str(path))
    crowd = OnnxBackbone.load(str(write_model(tmp_path / "crowd.onnx", PLAIN, after=CROWD)))
    network = OnnxRuntimeNetwork(crowd, "cpu", batch_size=2)
    with pytest.raises(ArtifactError, match="self-check failed: a face's vector depends"):
        check_network(network, "crowd")
    endless = np.full((48, 96), np.nan, np.float32)
    nan = OnnxBackbone.load(str(write_model(tmp_path / "nan.onnx", PLAIN, matrix=endless)))
    network = OnnxRuntimeNetwork(nan, "cpu")
    with pytest.raises(ArtifactError, match="self-check failed: the backbone gave vectors that are not finite"):
        check_network(network, "nan")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ArtifactError, match=r"ONNX Runtime cannot read it: .*parsing failed"):
        OnnxRuntimeNetwork(backbone, "cpu")


@real
@pytest.mark.weights
def test_a_real_model_gives_what_openvino_gives(shared, tmp_path):
    path = tmp_path / "omz0095.onnx"
    path.write_bytes((shared / "weights" / "compact" / "omz-0095" / path.name).read_bytes())
    path.with_suffix(".json").write_text('{"preset": "0095"}')
    backbone = OnnxBackbone.load(str(path))
    pixels = np.random.default_rng(0).integers(0, 256, (6, 128, 128, 3), dtype=np.uint8)
    network = OnnxRuntimeNetwork(backbone, "cpu", batch_size=4)
    np.testing.assert_allclose(network.vectors(pixels), CpuNetwork(backbone).vectors(pixels), atol=1e-5)
