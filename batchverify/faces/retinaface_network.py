"""RetinaFace's network (Deng et al. 2019, arXiv 1905.00641) on MobileNet 0.25, and how it runs in OpenVINO."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from threading import local
from typing import Any, Protocol

import numpy as np

from batchverify.runtime.compiled_network import CompiledNetwork

WEIGHTS_FILE = "retinaface.safetensors"
# Pixels of the image per cell of each output level, and the sides of the two square anchors of a cell.
STRIDES = (8, 16, 32)
ANCHORS = ((16, 32), (64, 128), (256, 512))
# Values of an anchor: the logit of a face, four of the box, two for each of five landmarks.
VALUES = 15
# What is subtracted from red, green and blue.
MEANS = (123.0, 117.0, 104.0)
# Of the leaky rectifiers.
SLOPE = 0.1
# Strides of the first convolution and of the depthwise separable ones, stage by stage.
_STAGES = ((2, 1, 2, 1, 2, 1), (2, 1, 1, 1, 1, 1), (2, 1))
# Subtracted from logits in bfloat16, which rounds numbers near zero more finely: those of clear faces are 3 to 10.
OFFSET = 7.0
# Compiled networks that a thread keeps, one for each size of canvas.
SIZES_KEPT = 16

Tensors = dict[str, np.ndarray]


class Network(Protocol):
    """The network on some device, for any number of threads."""

    def __call__(self, canvases: np.ndarray) -> np.ndarray:
        """(B, H, W, 3) uint8 RGB, sides multiples of 64, to (B, A, 15) float32: `VALUES` of each anchor.

        Anchors are ordered by level, row, column and size.
        """


class Operations(Protocol):
    """What the network is made of, in OpenVINO's graph or in torch."""

    def convolution(self, values: Any, name: str, stride: int = 1, slope: float = 1.0) -> Any:
        """The convolution with the weights `name`, padded to keep the size; negative outputs times `slope`."""

    def doubled(self, values: Any) -> Any:
        """Twice as many rows and columns: every value four times."""

    def add(self, first: Any, second: Any) -> Any:
        """The sum."""

    def join(self, values: list[Any]) -> Any:
        """All channels, those below zero as zero."""


def weights_path() -> Path:
    """The packaged weights, with batch normalisation folded in."""
    return Path(str(files("batchverify.faces") / "weights" / WEIGHTS_FILE))


@cache
def retinaface_weights() -> Mapping[str, np.ndarray]:
    """The float32 tensors by name, read once for all threads."""
    from safetensors.numpy import load_file

    return {name: array.astype(np.float32) for name, array in load_file(weights_path()).items()}


def network(operations: Operations, values: Any) -> list[Any]:
    """Add the network's layers. values: (B, 3, H, W) less `MEANS`. Returns (B, 2 * 15, h, w) for each level."""
    convolution = operations.convolution
    stages = []
    for stage, strides in enumerate(_STAGES, 1):
        for number, stride in enumerate(strides):
            name = f"stage{stage}.{number}"
            if name == "stage1.0":
                values = convolution(values, name, stride, SLOPE)
            else:
                values = convolution(values, f"{name}.depthwise", stride, SLOPE)
                values = convolution(values, f"{name}.pointwise", 1, SLOPE)
        stages.append(values)
    first, second, third = (convolution(each, f"lateral{level}", 1, SLOPE) for level, each in enumerate(stages, 1))
    second = convolution(operations.add(second, operations.doubled(third)), "merge2", 1, SLOPE)
    first = convolution(operations.add(first, operations.doubled(second)), "merge1", 1, SLOPE)
    levels = enumerate((first, second, third), 1)
    return [convolution(_context(operations, each, f"context{level}"), f"head{level}") for level, each in levels]


def _context(operations: Operations, values: Any, name: str) -> Any:
    """The context module of SSH (Najibi et al. 2017, arXiv 1708.03979): windows of 3, 5 and 7 pixels."""
    convolution = operations.convolution
    near = convolution(values, f"{name}.near")
    middle = convolution(values, f"{name}.middle1", 1, SLOPE)
    far = convolution(convolution(middle, f"{name}.far1", 1, SLOPE), f"{name}.far2")
    return operations.join([near, convolution(middle, f"{name}.middle2"), far])


class OpenvinoNetwork:
    """The network on this machine's CPU; see `Network`.

    threads: CPUs for each calling thread. float_type: `float32` or `bfloat16`. Every thread compiles its own
    networks, one for each size of canvases.
    """

    def __init__(self, threads: int = 1, *, float_type: str = "float32", sizes_kept: int = SIZES_KEPT) -> None:
        self._threads, self._float_type, self._sizes_kept = threads, float_type, sizes_kept
        self._offset = OFFSET if float_type == "bfloat16" else 0.0
        self._of_thread = local()

    def __call__(self, canvases: np.ndarray) -> np.ndarray:
        """See `Network`."""
        values: np.ndarray = self._compiled(canvases.shape)(canvases)[0]
        if self._offset:
            values[..., 0] += self._offset
        return values

    def _compiled(self, shape: tuple[int, ...]) -> CompiledNetwork:
        if not hasattr(self._of_thread, "networks"):
            self._of_thread.networks = {}
        networks: dict[tuple[int, ...], CompiledNetwork] = self._of_thread.networks
        if shape not in networks:
            if len(networks) == self._sizes_kept:
                del networks[next(iter(networks))]
            networks[shape] = CompiledNetwork(
                _model(shape, self._offset), float_type=self._float_type, threads=self._threads
            )
        return networks[shape]


class _Graph:
    """`Operations` in OpenVINO. offset: subtracted from the logits."""

    def __init__(self, offset: float) -> None:
        from openvino import opset13

        self.ops, self._tensors = opset13, dict(retinaface_weights())
        if offset:
            for name in (f"head{level}.bias" for level in range(1, len(STRIDES) + 1)):
                self._tensors[name] = self._tensors[name].copy()
                self._tensors[name][::VALUES] -= offset

    def convolution(self, values: Any, name: str, stride: int = 1, slope: float = 1.0) -> Any:
        weight, bias = self._tensors[f"{name}.weight"], self._tensors[f"{name}.bias"]
        side = weight.shape[-1] // 2
        sizes = [stride] * 2, [side] * 2, [side] * 2, [1, 1]
        if name.endswith("depthwise"):
            product = self.ops.group_convolution(values, self.constant(weight[:, None]), *sizes)
        else:
            product = self.ops.convolution(values, self.constant(weight), *sizes)
        total = self.ops.add(product, self.constant(bias.reshape(1, -1, 1, 1)))
        return total if slope == 1 else self.ops.prelu(total, self.constant([slope]))

    def doubled(self, values: Any) -> Any:
        scales = self.constant([2, 2])
        axes = self.ops.constant(np.array([2, 3]))
        return self.ops.interpolate(values, scales, "nearest", "scales", axes=axes)

    def add(self, first: Any, second: Any) -> Any:
        return self.ops.add(first, second)

    def join(self, values: list[Any]) -> Any:
        return self.ops.relu(self.ops.concat(values, 1))

    def constant(self, array: Any) -> Any:
        return self.ops.constant(np.ascontiguousarray(array, np.float32))


def _model(shape: tuple[int, ...], offset: float = 0.0) -> Any:
    """The `openvino.Model` for canvases of one shape. offset: subtracted from the logits."""
    from openvino import Model

    graph = _Graph(offset)
    ops = graph.ops
    canvases = ops.parameter(list(shape), np.uint8, "canvases")
    # From whole lines: faster than from three values at a time, see docs/performance.md.
    lines = ops.reshape(canvases, ops.constant(np.array([-1, shape[2] * shape[3]])), False)
    values = ops.subtract(ops.convert(lines, "f32"), graph.constant(np.tile(MEANS, shape[2])[None]))
    values = ops.reshape(values, ops.constant(np.array(shape)), False)
    values = ops.transpose(values, ops.constant(np.array([0, 3, 1, 2])))
    order, rows = ops.constant(np.array([0, 2, 3, 1])), ops.constant(np.array([shape[0], -1, VALUES]))
    levels = [ops.reshape(ops.transpose(level, order), rows, False) for level in network(graph, values)]
    return Model([ops.result(ops.concat(levels, 1))], [canvases], "retinaface")
