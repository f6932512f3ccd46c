"""Small ONNX files, written message by message: the package needs no library for them, and neither do its tests.

The network means the pixels over a grid of 4 x 4 cells and multiplies the 48 means by a matrix.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

CELLS = 4
MEANS = 3 * CELLS * CELLS
FLOAT = 1
_TYPES = {np.dtype(np.float32): 1, np.dtype(np.uint8): 2, np.dtype(np.int64): 7, np.dtype(np.float16): 10}
Shape = Sequence[int | str]


def number(value: int) -> bytes:
    """A varint."""
    value, data = value & (1 << 64) - 1, b""
    while value >= 0x80:
        data, value = data + bytes([value & 0x7F | 0x80]), value >> 7
    return data + bytes([value])


def field(tag: int, *values: int | str | bytes) -> bytes:
    """One field for each value."""
    data = b""
    for value in values:
        if isinstance(value, int):
            data += number(tag << 3) + number(value)
        else:
            content = value.encode() if isinstance(value, str) else value
            data += number(tag << 3 | 2) + number(len(content)) + content
    return data


def entry(key: str, value: str) -> bytes:
    """Two texts."""
    return field(1, key) + field(2, value)


def tensor(name: str, array: np.ndarray, *, location: str | None = None) -> bytes:
    """A tensor; with a location its bytes are in another file."""
    head = field(1, *array.shape) + field(2, _TYPES[array.dtype]) + field(8, name)
    if location is None:
        return head + field(9, array.tobytes())
    return head + field(13, entry("location", location)) + field(14, 1)


def node(kind: str, inputs: Sequence[str], outputs: Sequence[str], name: str = "", **attributes: Any) -> bytes:
    """An operation; attributes are whole numbers or lists of them."""
    data = field(1, *inputs) + field(2, *outputs) + field(3, name) + field(4, kind)
    for key, value in attributes.items():
        content = field(3, value) + field(20, 2) if isinstance(value, int) else field(8, *value) + field(20, 7)
        data += field(5, field(1, key) + content)
    return data


def value(name: str, shape: Shape, kind: int = FLOAT) -> bytes:
    """An input or output of a graph; a text in the shape is any number."""
    dims = [field(1, field(2 if isinstance(size, str) else 1, size)) for size in shape]
    return field(1, name) + field(2, field(1, field(1, kind) + field(2, b"".join(dims))))


def model(
    nodes: Sequence[bytes],
    tensors: Sequence[bytes],
    inputs: Sequence[bytes],
    outputs: Sequence[bytes],
    metadata: Mapping[str, str] | None = None,
) -> bytes:
    """A whole file."""
    graph = field(1, *nodes) + field(2, "graph") + field(5, *tensors) + field(11, *inputs) + field(12, *outputs)
    props = [entry(key, text) for key, text in (metadata or {}).items()]
    return field(1, 8) + field(7, graph) + field(8, field(2, 13)) + field(14, *props)


def weights(dimension: int) -> np.ndarray:
    """The matrix, (48, dimension) float32."""
    return np.random.default_rng(dimension).normal(size=(MEANS, dimension)).astype(np.float32)


def write_model(
    path: Path,
    description: Mapping[str, Any] | None,
    *,
    size: int = 112,
    dimension: int = 96,
    batch: int | str = "N",
    layout: str = "NCHW",
    before: Sequence[bytes] = (),
    after: Sequence[bytes] = (),
    outputs: Sequence[bytes] | None = None,
    extra: Sequence[bytes] = (),
    matrix: np.ndarray | None = None,
    location: str | None = None,
    kind: int = FLOAT,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write a network and its description.

    before: nodes from `pixels` to `faces` (NCHW). after: nodes from `vectors` to `embedding`. extra: their tensors.
    """
    matrix = weights(dimension) if matrix is None else matrix
    start = "pixels" if not before else "faces"
    head = [node("Transpose", ["pixels"], ["faces"], perm=[0, 3, 1, 2])] if layout == "NHWC" else [*before]
    start = "faces" if head else "pixels"
    nodes = [
        *head,
        node("AveragePool", [start], ["pooled"], kernel_shape=[size // CELLS] * 2, strides=[size // CELLS] * 2),
        node("Flatten", ["pooled"], ["flat"]),
        node("MatMul", ["flat", "matrix"], ["vectors" if after else "embedding"]),
        *after,
    ]
    shape = [batch, 3, size, size] if layout == "NCHW" else [batch, size, size, 3]
    found = [value("embedding", [batch, matrix.shape[1]])] if outputs is None else outputs
    tensors = [tensor("matrix", matrix, location=location), *extra]
    path.write_bytes(model(nodes, tensors, [value("pixels", shape, kind)], found, metadata))
    if description is not None:
        path.with_suffix(".json").write_text(json.dumps(description))
    return path


def expected(pixels: np.ndarray, matrix: np.ndarray, colour: str, mean: Any, scale: Any) -> np.ndarray:
    """What the network gives for (N, S, S, 3) uint8 RGB: (N, D) unit rows, computed in float64."""
    faces = pixels[..., ::-1] if colour == "BGR" else pixels
    values = (faces - np.asarray(mean, np.float64)) / np.asarray(scale, np.float64)
    side = values.shape[1] // CELLS
    cells = values.reshape(len(values), CELLS, side, CELLS, side, 3).mean(axis=(2, 4))
    vectors = cells.transpose(0, 3, 1, 2).reshape(len(values), -1) @ matrix
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
