"""What must be known of an ONNX file before a library opens it, read from its protobuf messages.

Its metadata, the names of its first nodes, and the files beside it that hold its tensors: these must lie in the
model's folder. Messages and numbers of fields: `onnx.proto` of ONNX 1.18. Tensors are skipped, not read.
"""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from batchverify.errors import ArtifactError

# Bytes of a model with the files beside it; a protobuf message ends there, too.
MOST_BYTES = 2 << 30
# Graphs inside one another: the branches of conditions and loops.
MOST_DEPTH = 16
# Nodes whose names are kept.
FIRST_NODES = 8
_CHUNK = 1 << 20
# The wire types of protobuf: a number, 8 bytes, a length and so many bytes, 4 bytes.
_NUMBER, _EIGHT, _BYTES, _FOUR = 0, 1, 2, 5
# Fields that lead to tensors, by message: the field's number and the message in it.
_MESSAGES = {
    "model": {7: "graph", 14: "metadata", 25: "function"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "inner node", 11: "attribute"},
    "node": {5: "attribute"},
    "inner node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "external"},
}
_NODE_NAME, _NODE_TYPE = 3, 4
_KEY, _VALUE = 1, 2


@dataclass
class OnnxFile:
    """An ONNX file.

    metadata: of the model, texts by name. first_nodes: name and type of the main graph's first nodes, at most
    `FIRST_NODES`. external: the files that hold tensors, by the names that the model gives them.
    """

    path: Path
    metadata: Mapping[str, str] = field(default_factory=dict)
    first_nodes: tuple[tuple[str, str], ...] = ()
    external: Mapping[str, Path] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> OnnxFile:
        """Read a file's messages.

        Raises `ArtifactError` for a file that is absent, too large or no ONNX model, and for tensors in files that
        are absent or outside of the model's folder.
        """
        try:
            size = path.stat().st_size
            if not path.is_file() or not size:
                raise ArtifactError(f"{path}: no ONNX model: {'an empty' if path.is_file() else 'no'} file")
            if size > MOST_BYTES:
                raise ArtifactError(f"{path}: {size:,} bytes, the limit is {MOST_BYTES:,}")
            reader = _Reader()
            with path.open("rb") as file:
                # Unmapped once nothing refers to it: an error may still do.
                data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            reader.read(memoryview(data), "model", 0)
        except OSError as exc:
            raise ArtifactError(f"{path}: the ONNX model cannot be read: {exc}") from exc
        except ValueError as exc:
            raise ArtifactError(f"{path}: not an ONNX model, or a damaged one: {exc}") from exc
        if not reader.graphs:
            raise ArtifactError(f"{path}: not an ONNX model: it holds no graph")
        external = {name: _beside(path, name) for name in sorted(reader.locations)}
        return cls(path, reader.metadata, tuple(reader.nodes), external)

    def digest(self) -> str:
        """SHA-256 over the bytes of the file and of those that hold its tensors, in hex."""
        total = hashlib.sha256()
        for name, path in {"": self.path, **self.external}.items():
            total.update(f"{name}\0".encode() + _digest(path))
        return total.hexdigest()


class _Reader:
    """Follows the messages of a model and keeps what is asked for."""

    def __init__(self) -> None:
        self.graphs = 0
        self.metadata: dict[str, str] = {}
        self.nodes: list[tuple[str, str]] = []
        self.locations: set[str] = set()

    def read(self, data: memoryview, kind: str, depth: int) -> None:
        """Read a message of a kind in `_MESSAGES`; `ValueError` if it is damaged."""
        if depth > 4 * MOST_DEPTH:
            raise ValueError(f"more than {MOST_DEPTH} graphs inside one another")
        inner = _MESSAGES[kind]
        names = {_NODE_NAME: "", _NODE_TYPE: ""}
        for number, content in _fields(data):
            if kind == "node" and number in names:
                names[number] = _text(content)
            if number not in inner or content is None:
                continue
            if inner[number] in ("metadata", "external"):
                key, value = _entry(content)
                if inner[number] == "metadata":
                    self.metadata[key] = value
                elif key == "location":
                    self.locations.add(value)
            else:
                self.graphs += inner[number] == "graph"
                self.read(content, inner[number], depth + 1)
        if kind == "node" and depth == _MAIN_NODES and len(self.nodes) < FIRST_NODES:
            self.nodes.append((names[_NODE_NAME], names[_NODE_TYPE]))


# A node of the main graph lies in a graph, which lies in the model.
_MAIN_NODES = 2


def _fields(data: memoryview) -> Iterator[tuple[int, memoryview | None]]:
    """The fields of a message: number, and content if that has a length. `ValueError` for damaged ones."""
    position = 0
    while position < len(data):
        tag, position = _varint(data, position)
        kind, content = tag & 7, None
        if kind == _NUMBER:
            _, position = _varint(data, position)
        elif kind == _BYTES:
            length, position = _varint(data, position)
            content = data[position : position + length]
            position += length
        elif kind in (_EIGHT, _FOUR):
            position += 8 if kind == _EIGHT else 4
        else:
            raise ValueError(f"a field of wire type {kind}")
        if position > len(data) or not tag >> 3:
            raise ValueError("a field that is cut short" if tag >> 3 else "a field with the number 0")
        yield tag >> 3, content


def _varint(data: memoryview, position: int) -> tuple[int, int]:
    """A number of seven bits a byte, and the position after it."""
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(data):
            raise ValueError("a number that is cut short")
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise ValueError("a number of more than ten bytes")


def _entry(data: memoryview) -> tuple[str, str]:
    """Key and value of an entry of two texts."""
    texts = {_KEY: "", _VALUE: ""}
    texts |= {number: _text(content) for number, content in _fields(data) if number in texts}
    return texts[_KEY], texts[_VALUE]


def _text(content: memoryview | None) -> str:
    return bytes(content or b"").decode("utf8")


def _beside(model: Path, name: str) -> Path:
    """The file `name` in the folder of a model; `ArtifactError` if it is not there or leads out of the folder."""
    parts, folder = PurePosixPath(name).parts, model.parent.resolve()
    # A star marks an address in memory for some libraries, a backslash another folder.
    is_plain = bool(parts) and name.isprintable() and not set(name) & set("*\\:") and ".." not in parts
    try:
        path = (folder / name).resolve()
        if not is_plain or PurePosixPath(name).is_absolute() or not path.is_relative_to(folder):
            raise ArtifactError(f"{model}: its tensors are in {name!r}, which is outside of its folder")
        if not path.is_file():
            raise ArtifactError(f"{model}: its tensors are in {name!r}, which is no file in its folder")
        if path.stat().st_size > MOST_BYTES:
            raise ArtifactError(f"{path}: more than {MOST_BYTES:,} bytes")
    except (OSError, ValueError, RuntimeError) as exc:  # names with zero bytes, links in a circle
        raise ArtifactError(f"{model}: its tensors are in {name!r}, which cannot be read: {exc}") from exc
    return path


def _digest(path: Path) -> bytes:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    except OSError as exc:
        raise ArtifactError(f"{path}: cannot be read: {exc}") from exc
    return digest.digest()
