"""A backbone in an ONNX file on a GPU, by ONNX Runtime, which is installed with the extra `onnx-gpu`."""

from __future__ import annotations

from typing import Any

import numpy as np

from batchverify.embedding.network import Network
from batchverify.embedding.onnx_backbone import OnnxBackbone
from batchverify.errors import ArtifactError, BatchverifyError, UsageError, first_line

# Faces in a batch, unless the model takes another number alone.
GPU_BATCH = 128
# What computes on a kind of device. On a CPU OpenVINO runs these files: ONNX Runtime does so only to be tested.
PROVIDERS = {"cuda": "CUDAExecutionProvider", "cpu": "CPUExecutionProvider"}
_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(uint8)": np.uint8}


class OnnxRuntimeNetwork(Network):
    """See `Network`; the model computes in its own types.

    Raises `UsageError` for a dtype, `ArtifactError` if ONNX Runtime is absent, has no CUDA or cannot read the file.
    """

    runtime = "onnxruntime"

    def __init__(
        self,
        backbone: OnnxBackbone,
        device: str,
        *,
        dtype: str = "auto",
        flip: bool = False,
        batch_size: int | None = None,
    ) -> None:
        if dtype not in ("auto", "float32"):
            raise UsageError(f"--dtype {dtype}: on a GPU {backbone.name} computes in its own types; omit the option")
        super().__init__(backbone.spec, "float32", backbone.batch or batch_size or GPU_BATCH, flip)
        self._about, self._channels_first = backbone.description, backbone.layout == "NCHW"
        self._session = _session(backbone, device)
        taken = self._session.get_inputs()[0]
        self._input, self._type = taken.name, _TYPES[taken.type]
        self._output = self._session.get_outputs()[backbone.output].name

    def compute(self, pixels: np.ndarray) -> np.ndarray:
        """See `Network`."""
        faces = pixels[..., ::-1] if self._about.colour == "BGR" else pixels
        mean, scale = (np.array(values, np.float32) for values in (self._about.mean, self._about.scale))
        scaled = ((faces.astype(np.float32) - mean) / scale).astype(self._type)
        inputs = np.ascontiguousarray(scaled.transpose(0, 3, 1, 2) if self._channels_first else scaled)
        try:
            [vectors] = self._session.run([self._output], {self._input: inputs})
        except Exception as exc:  # the library has no root of its errors
            raise BatchverifyError(
                f"ONNX Runtime failed with a batch of {len(pixels)} faces (--batch-size): {first_line(exc)}"
            ) from exc
        return np.asarray(vectors, np.float32).reshape(len(pixels), -1)


def _session(backbone: OnnxBackbone, device: str) -> Any:
    kind, _, number = device.partition(":")
    provider, settings = PROVIDERS[kind], {"device_id": int(number or 0)} if kind == "cuda" else {}
    try:
        import onnxruntime
    except ImportError as exc:
        raise ArtifactError(
            f"{backbone.name}: on a GPU ONNX files need ONNX Runtime: pip install 'batchverify[onnx-gpu]', or "
            f"compute on the CPU with --device cpu ({first_line(exc)})"
        ) from exc
    if provider not in onnxruntime.get_available_providers():
        raise ArtifactError(
            f"{backbone.name}: this ONNX Runtime has no {provider}: pip install 'batchverify[onnx-gpu]' in place of "
            "onnxruntime, or compute on the CPU with --device cpu"
        )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        providers = [(provider, settings)]
        session = onnxruntime.InferenceSession(str(backbone.path), options, providers=providers)
    except Exception as exc:  # the library has no root of its errors
        raise ArtifactError(f"{backbone.name}: ONNX Runtime cannot read it: {first_line(exc)}") from exc
    # Without the libraries of CUDA it computes on the CPU, with no more than a line in its log.
    if provider not in session.get_providers():
        raise ArtifactError(f"{backbone.name}: ONNX Runtime cannot use this GPU; add --device cpu")
    return session
