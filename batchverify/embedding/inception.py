"""InceptionResnetV1 as data: its layers in the order of the forward pass, and the tensors that belong to it.

Source: facenet-pytorch's `inception_resnet_v1.py`, after Szegedy et al. 2016 (arXiv 1602.07261).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from batchverify.fingerprint import DIMENSION

ARCHITECTURE = "InceptionResnetV1"
# Faces in a batch on CPUs. Measured on two-core machines: larger batches are no faster, and need more padding.
CPU_BATCH = 32
# What every batch normalisation adds to the variance.
EPSILON = 1e-3
# Channels after the last block.
FEATURES = 1792

_BATCH_NORM = ("weight", "bias", "running_mean", "running_var")


@dataclass(frozen=True)
class Convolution:
    """A convolution with batch normalisation and ReLU. padded: with a stride of 1 the image keeps its size."""

    name: str
    inputs: int
    outputs: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    padded: bool = False

    @property
    def padding(self) -> tuple[int, int]:
        """Rows of zeros above and below, columns of zeros left and right."""
        return (self.kernel[0] // 2, self.kernel[1] // 2) if self.padded else (0, 0)


@dataclass(frozen=True)
class Pool:
    """Max pooling with 3 x 3 windows and a stride of 2."""


@dataclass(frozen=True)
class Residual:
    """Parallel branches, then a 1 x 1 convolution with bias over all of them; scaled and added to the input."""

    name: str
    branches: tuple[tuple[Convolution, ...], ...]
    scale: float
    relu: bool = True

    @property
    def projection(self) -> Convolution:
        """The convolution over the concatenated branches; it has a bias and no batch normalisation."""
        joined = sum(branch[-1].outputs for branch in self.branches)
        return Convolution(f"{self.name}.conv2d", joined, self.branches[0][0].inputs)


@dataclass(frozen=True)
class Reduction:
    """Parallel branches and a max pooling, concatenated; height and width are halved."""

    name: str
    branches: tuple[tuple[Convolution, ...], ...]


Layer = Convolution | Pool | Residual | Reduction
_Kernel = tuple[int, int]


def _chain(name: str, inputs: int, *sizes: tuple[int, _Kernel, int, bool]) -> tuple[Convolution, ...]:
    """A sequence of convolutions, each given by its outputs, kernel, stride and padding."""
    chain: list[Convolution] = []
    for number, (outputs, kernel, stride, padded) in enumerate(sizes):
        own_name = f"{name}.{number}" if len(sizes) > 1 else name
        chain.append(Convolution(own_name, inputs, outputs, kernel, stride, padded))
        inputs = outputs
    return tuple(chain)


def _one(outputs: int) -> tuple[int, _Kernel, int, bool]:
    return outputs, (1, 1), 1, False


def _same(outputs: int, kernel: _Kernel = (3, 3)) -> tuple[int, _Kernel, int, bool]:
    return outputs, kernel, 1, True


def _half(outputs: int) -> tuple[int, _Kernel, int, bool]:
    return outputs, (3, 3), 2, False


def _block35(name: str) -> Residual:
    branches = (
        _chain(f"{name}.branch0", 256, _one(32)),
        _chain(f"{name}.branch1", 256, _one(32), _same(32)),
        _chain(f"{name}.branch2", 256, _one(32), _same(32), _same(32)),
    )
    return Residual(name, branches, 0.17)


def _block17(name: str) -> Residual:
    lines = _one(128), _same(128, (1, 7)), _same(128, (7, 1))
    branches = _chain(f"{name}.branch0", 896, _one(128)), _chain(f"{name}.branch1", 896, *lines)
    return Residual(name, branches, 0.10)


def _block8(name: str, scale: float = 0.20, relu: bool = True) -> Residual:
    lines = _one(192), _same(192, (1, 3)), _same(192, (3, 1))
    branches = _chain(f"{name}.branch0", FEATURES, _one(192)), _chain(f"{name}.branch1", FEATURES, *lines)
    return Residual(name, branches, scale, relu)


def _layers() -> Iterator[Layer]:
    yield Convolution("conv2d_1a", 3, 32, (3, 3), 2)
    yield Convolution("conv2d_2a", 32, 32, (3, 3))
    yield Convolution("conv2d_2b", 32, 64, (3, 3), padded=True)
    yield Pool()
    yield Convolution("conv2d_3b", 64, 80)
    yield Convolution("conv2d_4a", 80, 192, (3, 3))
    yield Convolution("conv2d_4b", 192, 256, (3, 3), 2)
    yield from (_block35(f"repeat_1.{number}") for number in range(5))
    yield Reduction(
        "mixed_6a",
        (
            _chain("mixed_6a.branch0", 256, _half(384)),
            _chain("mixed_6a.branch1", 256, _one(192), _same(192), _half(256)),
        ),
    )
    yield from (_block17(f"repeat_2.{number}") for number in range(10))
    yield Reduction(
        "mixed_7a",
        (
            _chain("mixed_7a.branch0", 896, _one(256), _half(384)),
            _chain("mixed_7a.branch1", 896, _one(256), _half(256)),
            _chain("mixed_7a.branch2", 896, _one(256), _same(256), _half(256)),
        ),
    )
    yield from (_block8(f"repeat_3.{number}") for number in range(5))
    yield _block8("block8", 1.0, relu=False)


# Then follow the mean over the image, a linear layer without bias to 512 values, and batch normalisation.
LAYERS: tuple[Layer, ...] = tuple(_layers())


def tensor_shapes() -> dict[str, tuple[int, ...]]:
    """The shapes of the network's tensors by facenet-pytorch's names."""
    shapes: dict[str, tuple[int, ...]] = {"last_linear.weight": (DIMENSION, FEATURES)}
    shapes |= {f"last_bn.{part}": (DIMENSION,) for part in _BATCH_NORM}
    for layer in LAYERS:
        if isinstance(layer, Residual):
            projection = layer.projection
            shapes[f"{projection.name}.weight"] = (projection.outputs, projection.inputs, 1, 1)
            shapes[f"{projection.name}.bias"] = (projection.outputs,)
        for conv in _convolutions(layer):
            shapes[f"{conv.name}.conv.weight"] = (conv.outputs, conv.inputs, *conv.kernel)
            shapes |= {f"{conv.name}.bn.{part}": (conv.outputs,) for part in _BATCH_NORM}
    return shapes


def _convolutions(layer: Layer) -> Iterator[Convolution]:
    if isinstance(layer, Convolution):
        yield layer
    elif isinstance(layer, Residual | Reduction):
        for branch in layer.branches:
            yield from branch


Folded = dict[str, tuple[np.ndarray, np.ndarray]]


def fold(tensors: Mapping[str, np.ndarray]) -> Folded:
    """Weight and bias of every layer by name, with batch normalisation and scales folded in.

    The last, linear layer is named `last_linear`.
    """
    layers = {"last_linear": _folded(tensors, "last_linear.weight", "last_bn")}
    for layer in LAYERS:
        for conv in _convolutions(layer):
            layers[conv.name] = _folded(tensors, f"{conv.name}.conv.weight", f"{conv.name}.bn")
        if isinstance(layer, Residual):
            name, scale = layer.projection.name, np.float32(layer.scale)
            layers[name] = tensors[f"{name}.weight"] * scale, tensors[f"{name}.bias"] * scale
    return layers


def _folded(tensors: Mapping[str, np.ndarray], name: str, norm: str) -> tuple[np.ndarray, np.ndarray]:
    weight = tensors[name]
    scale, shift, mean, variance = (tensors[f"{norm}.{part}"] for part in _BATCH_NORM)
    scale = (scale / np.sqrt(variance + np.float32(EPSILON))).astype(np.float32)
    return weight * scale.reshape(-1, *[1] * (weight.ndim - 1)), shift - mean * scale
