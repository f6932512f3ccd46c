"""ONNX files, written message by message, as `onnx_file.py` reads them: the package needs no library for them.

Messages and numbers of fields: `onnx.proto` of ONNX 1.18. Operations: opset 13, which every runtime has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

IR_VERSION, OPSET = 8, 13
# Element and attribute types.
_FLOAT, _INT, _INTS = 1, 2, 7
# The free size of a batch, by name.
BATCH = "N"

# A message in parts, which are joined once: tensors are large.
Message = list[bytes]


def _varint(value: int) -> bytes:
    data = b""
    while value >= 0x80:
        data, value = data + bytes([value & 0x7F | 0x80]), value >> 7
    return data + bytes([value])


def _number(tag: int, *values: int) -> Message:
    """A field for each whole number, which is not negative."""
    return [_varint(tag << 3) + _varint(value) for value in values]


def _bytes(tag: int, *contents: Message | str) -> Message:
    """A field for each text or message."""
    message: Message = []
    for content in contents:
        parts = [content.encode()] if isinstance(content, str) else content
        message += [_varint(tag << 3 | 2) + _varint(sum(map(len, parts))), *parts]
    return message


def _attribute(name: str, value: int | Sequence[int]) -> Message:
    if isinstance(value, int):
        return _bytes(1, name) + _number(3, value) + _number(20, _INT)
    return _bytes(1, name) + _number(8, *value) + _number(20, _INTS)


def _floats(name: str, shape: Sequence[int | str]) -> Message:
    """An input or output of the graph, of float32; a text in its shape is any number."""
    sizes = [_bytes(2, size) if isinstance(size, str) else _number(1, size) for size in shape]
    return _bytes(1, name) + _bytes(2, _bytes(1, _number(1, _FLOAT) + _bytes(2, _bytes(1, *sizes))))


@dataclass
class OnnxGraph:
    """A graph that grows node by node. Each value has a name; nodes are named after what they give."""

    _nodes: list[Message] = field(default_factory=list)
    _tensors: dict[str, Message] = field(default_factory=dict)

    def tensor(self, name: str, array: np.ndarray) -> str:
        """Add a tensor, as float32; its name."""
        values = np.ascontiguousarray(array, "<f4")
        head = _number(1, *values.shape) + _number(2, _FLOAT) + _bytes(8, name)
        self._tensors[name] = head + _bytes(9, [values.tobytes()])
        return name

    def add(self, kind: str, name: str, inputs: Sequence[str], **attributes: int | Sequence[int]) -> str:
        """Add an operation that gives one value of this name; its name."""
        message = _bytes(1, *inputs) + _bytes(2, name) + _bytes(3, name) + _bytes(4, kind)
        message += _bytes(5, *(_attribute(*each) for each in attributes.items()))
        self._nodes.append(message)
        return name

    def model(
        self,
        given: tuple[str, Sequence[int]],
        found: tuple[str, Sequence[int]],
        metadata: Mapping[str, str],
        producer: tuple[str, str],
    ) -> bytes:
        """The whole file. given, found: name and shape, after the batch's size, of the input and of the output."""
        graph = _bytes(1, *self._nodes) + _bytes(2, "backbone") + _bytes(5, *self._tensors.values())
        for tag, (name, shape) in ((11, given), (12, found)):
            graph += _bytes(tag, _floats(name, [BATCH, *shape]))
        message = _number(1, IR_VERSION) + _bytes(2, producer[0]) + _bytes(3, producer[1])
        message += _bytes(7, graph) + _bytes(8, _number(2, OPSET))
        message += _bytes(14, *(_bytes(1, key) + _bytes(2, text) for key, text in metadata.items()))
        return b"".join(message)
