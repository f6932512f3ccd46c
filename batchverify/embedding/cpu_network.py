"""The backbone in OpenVINO, for CPUs: models that are built from tensors without torch, or read from ONNX files.

8-bit layers take unsigned activations, whose ranges are in the weights file, and signed weights with one scale per
output channel. The sums from block to block stay floats.
"""

from __future__ import annotations

import platform
from functools import reduce
from typing import Any

import numpy as np

from batchverify.embedding import compact
from batchverify.embedding.backbone import Backbone, eight_bit
from batchverify.embedding.inception import (
    ARCHITECTURE,
    CPU_BATCH,
    LAYERS,
    Convolution,
    Pool,
    Reduction,
    Residual,
    fold,
)
from batchverify.embedding.network import Network, Ranges
from batchverify.embedding.onnx_backbone import OnnxBackbone
from batchverify.errors import ArtifactError, UsageError
from batchverify.fingerprint import FACE_SIZE
from batchverify.runtime.compiled_network import CompiledNetwork, capabilities

# With int8 the other layers compute in a float type, which depends on the machine and changes the vectors slightly.
DTYPES = ("float32", "bfloat16", "int8_float32", "int8_bfloat16")
# Values of an unsigned 8-bit activation.
_LEVELS = 256


def choose_dtype(dtype: str, backbone: Backbone | OnnxBackbone) -> str:
    """One of `DTYPES`: the requested one, or with `auto` the fastest. `int8` is completed by this CPU's float type.

    Raises `UsageError` for an unknown dtype, for int8 with weights that state no activation ranges, and for bfloat16
    on a CPU that does not multiply it.
    """
    has_bfloat16 = "BF16" in capabilities()
    floats = "bfloat16" if has_bfloat16 else "float32"
    if dtype == "auto":
        return f"int8_{floats}" if backbone.ranges and _is_faster(backbone, has_bfloat16) else floats
    if dtype == "int8":
        dtype = f"int8_{floats}"
    if dtype not in DTYPES:
        raise UsageError(f"--dtype must be auto, float32, bfloat16 or int8 with OpenVINO, got '{dtype}'")
    if dtype.startswith("int8") and not backbone.ranges:
        raise UsageError(f"--dtype int8: the weights of {backbone.name} state no activation ranges")
    if dtype.endswith("bfloat16") and not has_bfloat16:
        raise UsageError(f"--dtype {dtype}: this CPU does not multiply bfloat16")
    return dtype


def _is_faster(backbone: Backbone | OnnxBackbone, has_bfloat16: bool) -> bool:
    """Whether 8-bit layers are known to be faster here."""
    # Measured only on x86: elsewhere OpenVINO may compute them in floats. Those of the compact network were measured
    # only on CPUs that multiply bfloat16, all of which have instructions for sums of 8-bit products.
    is_x86 = platform.machine() in ("x86_64", "AMD64")
    return is_x86 and (has_bfloat16 or _is_inception(backbone))


def _is_inception(backbone: Backbone | OnnxBackbone) -> bool:
    return isinstance(backbone, Backbone) and backbone.architecture == ARCHITECTURE


def default_batch(backbone: Backbone | OnnxBackbone, dtype: str) -> int:
    """Faces in a batch on a CPU: few, unless the network is known to be faster with more."""
    if _is_inception(backbone):
        return CPU_BATCH
    return compact.SHORT_BATCH if dtype == "int8_bfloat16" else compact.CPU_BATCH


class CpuNetwork(Network):
    """The backbone in OpenVINO; see `Network`.

    streams: threads that may call it at the same time. threads: CPUs for each of them.
    Raises `ArtifactError` for weights of another network, `UsageError` as `choose_dtype` does.
    """

    runtime = "openvino"

    def __init__(
        self,
        backbone: Backbone | OnnxBackbone,
        *,
        dtype: str = "auto",
        flip: bool = False,
        batch_size: int | None = None,
        streams: int = 1,
        threads: int = 1,
    ) -> None:
        dtype = choose_dtype(dtype, backbone)
        model, size = _model(backbone, batch_size or default_batch(backbone, dtype), dtype.startswith("int8"))
        super().__init__(backbone.spec, dtype, size, flip)
        floats = dtype.removeprefix("int8_")
        self._compiled = CompiledNetwork(model, float_type=floats, streams=streams, threads=threads)

    def compute(self, pixels: np.ndarray) -> np.ndarray:
        """See `Network`."""
        return self._compiled(pixels)[0]


def _model(backbone: Backbone | OnnxBackbone, batch: int, eight_bits: bool) -> tuple[Any, int]:
    """An `openvino.Model` from (B, S, S, 3) uint8 RGB to (B, D) float32, not normalised, and its B."""
    if isinstance(backbone, OnnxBackbone):
        return backbone.model(batch)
    return build_model(backbone, batch, backbone.ranges if eight_bits else {}), batch


def build_model(backbone: Backbone, batch: int, ranges: Ranges) -> Any:
    """A network of ours from (batch, S, S, 3) uint8 RGB to (batch, D) float32, not normalised.

    ranges: by the name of a layer or block, of the compact network of a layer without groups; layers without one
    compute in floats. Raises `ArtifactError` for tensors of another network.
    """
    backbone.check_tensors()
    builder = _CompactBuilder if backbone.is_compact else _InceptionBuilder
    return builder(backbone, ranges).model(batch)


class _Builder:
    """Adds layers to an OpenVINO graph."""

    def __init__(self, backbone: Backbone, ranges: Ranges) -> None:
        import openvino
        from openvino import opset13

        self._openvino, self._ops = openvino, opset13
        self._architecture, self._tensors = backbone.architecture, backbone.tensors
        self._ranges, self._unknown = ranges, set(ranges)

    def _model(self, values: Any, pixels: Any) -> Any:
        """The whole model. Raises `ArtifactError` for ranges of layers that were not added."""
        if self._unknown:
            raise ArtifactError(
                f"activation ranges for '{min(self._unknown)}', which is no layer of {self._architecture}"
            )
        return self._openvino.Model([self._ops.result(values)], [pixels], "backbone")

    def _rounded(self, values: Any, reader: str | None) -> Any:
        """Round activations for the layer `reader`, to 1/255 of its range; unchanged if it has none."""
        if reader is None or reader not in self._ranges:
            return values
        low, high = self._ranges[reader]
        if low < 0:
            # Moved by less than a step, so that zero stays zero.
            step = (high - low) / (_LEVELS - 1)
            below = round(-low / step)
            low, high = -below * step, (_LEVELS - 1 - below) * step
        ends = [self._constant(np.float32(end)) for end in (low, high)]
        return self._ops.fake_quantize(values, *ends, *ends, _LEVELS)

    def _kernel(self, weight: np.ndarray, range_name: str) -> Any:
        """The weights of a layer, in 8 bits if its inputs are. range_name: of the range of its inputs."""
        self._unknown.discard(range_name)
        if range_name not in self._ranges:
            return self._constant(weight)
        # Signed 8-bit integers and a scale per output channel, in the form that OpenVINO recognises.
        steps, scale = eight_bit(weight)
        scales = self._constant(scale.reshape(-1, *[1] * (weight.ndim - 1)))
        return self._ops.multiply(self._ops.convert(self._ops.constant(steps), "f32"), scales)

    def _constant(self, array: Any) -> Any:
        return self._ops.constant(np.ascontiguousarray(array, np.float32))


class _CompactBuilder(_Builder):
    """Adds the layers of the compact network."""

    def model(self, batch: int) -> Any:
        ops, size = self._ops, compact.SIZE
        pixels = ops.parameter([batch, size, size, 3], np.uint8, "pixels")
        values = ops.transpose(ops.convert(pixels, "f32"), ops.constant(np.array([0, 3, 1, 2])))
        values = ops.gather(values, ops.constant(np.array([2, 1, 0])), ops.constant(np.array(1)))
        values = ops.multiply(values, self._channels("input.scale"))
        values = ops.add(values, self._channels("input.shift"))
        for layer in compact.LAYERS:
            values = self._layer(values, layer)
        shape = ops.constant(np.array([batch, compact.DIMENSION]))
        return self._model(ops.reshape(values, shape, False), pixels)

    def _layer(self, values: Any, layer: compact.Layer) -> Any:
        if isinstance(layer, compact.Convolution):
            return self._convolution(values, layer)
        projected = reduce(self._convolution, layer.convolutions, values)
        mean = self._ops.reduce_mean(projected, self._ops.constant(np.array([2, 3])), True)
        weights = self._ops.sigmoid(reduce(self._convolution, layer.weighting, mean))
        weighted = self._ops.multiply(projected, weights)
        return self._ops.add(weighted, values) if layer.residual else weighted

    def _convolution(self, values: Any, layer: compact.Convolution) -> Any:
        ops, weight = self._ops, self._tensors[f"{layer.name}.weight"]
        strides, padding = [layer.stride] * 2, [layer.padding] * 2
        if layer.depthwise:
            kernel = self._constant(weight[:, None])
            values = ops.group_convolution(values, kernel, strides, padding, padding, [1, 1])
        else:
            kernel = self._kernel(weight, layer.name)
            values = ops.convolution(self._rounded(values, layer.name), kernel, strides, padding, padding, [1, 1])
            # jobs/make_weights.py finds the inputs of a layer by this name.
            values.set_friendly_name(layer.name)
        if layer.biased:
            values = ops.add(values, self._channels(f"{layer.name}.bias"))
        return ops.prelu(values, ops.constant(self._tensors[f"{layer.name}.slope"])) if layer.activated else values

    def _channels(self, name: str) -> Any:
        return self._ops.constant(self._tensors[name].reshape(1, -1, 1, 1))


class _InceptionBuilder(_Builder):
    """Adds the layers of InceptionResnetV1, with batch normalisation folded into the weights."""

    def __init__(self, backbone: Backbone, ranges: Ranges) -> None:
        super().__init__(backbone, ranges)
        self._layers = fold(backbone.tensors)

    def model(self, batch: int) -> Any:
        ops = self._ops
        pixels = ops.parameter([batch, FACE_SIZE, FACE_SIZE, 3], np.uint8, "pixels")
        # Exact in every dtype: bytes, halves of odd numbers, and these divided by a power of two.
        values = ops.subtract(ops.convert(pixels, "f32"), self._constant(np.float32(127.5)))
        values = ops.multiply(values, self._constant(np.float32(1 / 128)))
        values = ops.transpose(values, ops.constant(np.array([0, 3, 1, 2])))
        for number, layer in enumerate(LAYERS):
            following = LAYERS[number + 1 : number + 3]
            values = self._layer(values, layer, _reader(following))
        values = ops.reduce_mean(values, ops.constant(np.array([2, 3])), False)
        weight, bias = self._layers["last_linear"]
        values = ops.matmul(values, self._constant(weight), False, True)
        return self._model(ops.add(values, self._constant(bias[None])), pixels)

    def _layer(self, values: Any, layer: Any, reader: str | None) -> Any:
        """Add a layer of `inception.LAYERS`. reader: the one layer that reads its output, which is rounded for it."""
        if isinstance(layer, Pool):
            return self._pool(values)
        if isinstance(layer, Convolution):
            return self._rounded(self._ops.relu(self._sum(values, layer, layer.name)), reader)
        rounded = self._rounded(values, layer.name)
        if isinstance(layer, Reduction):
            outputs = [self._branch(rounded, branch, layer.name, None) for branch in layer.branches]
            return self._ops.concat([*outputs, self._pool(values)], 1)
        return self._residual(values, rounded, layer)

    def _residual(self, values: Any, rounded: Any, layer: Residual) -> Any:
        projection = layer.projection
        outputs = [self._branch(rounded, branch, layer.name, projection.name) for branch in layer.branches]
        total = self._ops.add(self._sum(self._ops.concat(outputs, 1), projection, projection.name), values)
        return self._ops.relu(total) if layer.relu else total

    def _branch(self, values: Any, branch: tuple[Convolution, ...], block: str, reader: str | None) -> Any:
        # The first convolutions of a block share its input and its range.
        range_names = [block, *(layer.name for layer in branch[1:])]
        for layer, own, following in zip(branch, range_names, [*range_names[1:], reader], strict=True):
            values = self._rounded(self._ops.relu(self._sum(values, layer, own)), following)
        return values

    def _sum(self, values: Any, layer: Convolution, range_name: str) -> Any:
        """Add a convolution and its bias. range_name: of the range that the input was rounded to."""
        weight, bias = self._layers[layer.name]
        kernel = self._kernel(weight, range_name)
        strides, padding = [layer.stride] * 2, list(layer.padding)
        product = self._ops.convolution(values, kernel, strides, padding, padding, [1, 1])
        # jobs/make_weights.py finds the inputs of a layer by this name.
        product.set_friendly_name(range_name)
        return self._ops.add(product, self._constant(bias.reshape(1, -1, 1, 1)))

    def _pool(self, values: Any) -> Any:
        return self._ops.max_pool(values, [2, 2], [1, 1], [0, 0], [0, 0], [3, 3], "floor").output(0)


def _reader(following: tuple[Any, ...]) -> str | None:
    """The name of the convolution that reads a layer's output, directly or after a pooling; None for a block."""
    readers = [layer for layer in following if not isinstance(layer, Pool)]
    return readers[0].name if readers and isinstance(readers[0], Convolution) else None
