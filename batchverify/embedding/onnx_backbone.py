"""A backbone in an ONNX file of another project, with the description of what it takes.

OpenVINO reads the file. Its faces, their scaling and the order of colours become part of the model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from batchverify.documents import MOST_METADATA, read_document
from batchverify.embedding.description import Description, form
from batchverify.embedding.network import Ranges
from batchverify.embedding.onnx_file import OnnxFile
from batchverify.errors import ArtifactError
from batchverify.fingerprint import DIMENSIONS, BackboneSpec
from batchverify.runtime.compiled_network import core, unavailable

SUFFIX = ".onnx"
METADATA_KEY = "batchverify"
# Axes of an input: the channels', and those of the face's rows and columns.
_AXES = {"NCHW": (1, (2, 3)), "NHWC": (3, (1, 2))}
_INPUT_TYPES = {"f32": np.float32, "f16": np.float16, "u8": np.uint8}


@dataclass(frozen=True)
class OnnxBackbone:
    """An ONNX file and its description, both checked.

    name: the file, as the user gave it. fingerprint: of the bytes of all its files and of the description. layout:
    `NCHW` or `NHWC`. batch: the only number of faces that it takes at once, None for any. output: the number of the
    output with the vectors. dimension: their numbers. ranges: none, as for `Backbone`.
    """

    name: str
    path: Path
    description: Description
    fingerprint: str
    layout: str
    batch: int | None
    output: int
    dimension: int
    ranges: ClassVar[Ranges] = {}

    @classmethod
    def load(cls, name: str) -> OnnxBackbone:
        """Read a file and its description.

        Raises `ArtifactError` for a file that is no ONNX model or does not fit its description, and for one without a
        description: the message holds one to fill in.
        """
        path = Path(name)
        file = OnnxFile.read(path)
        model = read_model(path)
        taken = _input(path, model)
        layout = _layout(path, taken)
        document, source = _document(file)
        if document is None:
            raise ArtifactError(_missing(path, taken, layout, model.outputs))
        description = Description.parse(document, source, file.first_nodes)
        _require_raw(path, taken, description)
        _check_size(path, taken, layout, description.size)
        output = _output(path, description, model.outputs)
        first = taken.get_partial_shape()[0]
        batch = first.get_length() if first.is_static else None
        _, dimension = _face_model(path, model, description, layout, output, batch or 1)
        if not DIMENSIONS[0] <= dimension <= DIMENSIONS[1]:
            raise ArtifactError(
                f"{path}: output '{output_name(model.outputs[output])}' has {dimension:,} numbers a face; a backbone "
                f"gives {DIMENSIONS[0]} to {DIMENSIONS[1]:,}"
            )
        identity = f"onnx\0{file.digest()}\0{description.identity}\0{output}"
        fingerprint = hashlib.sha256(identity.encode()).hexdigest()
        return cls(name, path, description, fingerprint, layout, batch, output, dimension)

    @cached_property
    def spec(self) -> BackboneSpec:
        """The faces that it takes and the vectors that it gives."""
        about = self.description
        return BackboneSpec(self.fingerprint, about.size, self.dimension, about.normalisation, about.settings)

    def model(self, batch: int) -> tuple[Any, int]:
        """An `openvino.Model` from (B, S, S, 3) uint8 RGB to (B, D) float32, not normalised, and its B.

        B is `batch`, unless the file takes another number alone.
        """
        sizes = [batch] if self.batch in (None, batch) else [batch, self.batch]
        for size in sizes:
            model = read_model(self.path)
            try:
                made, dimension = _face_model(self.path, model, self.description, self.layout, self.output, size)
            except ArtifactError:
                if size == sizes[-1]:
                    raise
                continue
            if dimension == self.dimension:
                return made, size
        raise ArtifactError(f"{self.path}: a batch of {batch} faces gives vectors of another length")


def read_model(path: Path) -> Any:
    """The file as an `openvino.Model`; `ArtifactError` if OpenVINO is absent or cannot read it."""
    if why := unavailable():
        raise ArtifactError(f"{path}: OpenVINO, which reads ONNX files, cannot be used here: {why}")
    try:
        return core().read_model(str(path))
    except RuntimeError as exc:
        raise ArtifactError(f"{path}: OpenVINO cannot read this model: {_reason(exc)}") from exc


def output_name(output: Any) -> str:
    """The name of a model's output; `no name` if it has none."""
    return min(output.get_names(), default="no name")


def _document(file: OnnxFile) -> tuple[Any, str]:
    """The description and where it is; None without one. The file beside the model goes before its metadata."""
    beside = file.path.with_suffix(".json")
    source, text = str(beside), None
    try:
        if beside.exists():
            text = _text(beside)
        elif METADATA_KEY in file.metadata:
            source, text = f"{file.path}: metadata '{METADATA_KEY}'", file.metadata[METADATA_KEY]
        return (None if text is None else read_document(text)), source
    except OSError as exc:
        raise ArtifactError(f"{source}: the description cannot be read: {exc}") from exc
    except ValueError as exc:
        raise ArtifactError(f"{source}: the description is not JSON: {exc}") from exc


def _text(path: Path) -> str:
    with path.open("rb") as file:
        return file.read(MOST_METADATA + 1).decode("utf8")


def _missing(path: Path, taken: Any, layout: str, outputs: Sequence[Any]) -> str:
    sides = [taken.get_partial_shape()[axis] for axis in _AXES[layout][1]]
    size = sides[0].get_length() if sides[0].is_static else None
    beside = path.with_suffix(".json")
    return (
        f"{path}: no description: {beside.name} beside it, or '{METADATA_KEY}' in its metadata, must say which crop, "
        "size, colour (RGB or BGR), mean and scale the model takes, as (pixel - mean) / scale; nothing is guessed. "
        f"Fill this in and write it to {beside} (or only a preset: docs/backbones.md):\n"
        f"{form(size, [output_name(output) for output in outputs])}"
    )


def _input(path: Path, model: Any) -> Any:
    """The one input of a model."""
    if len(model.inputs) != 1:
        names = ", ".join(min(each.get_names(), default="no name") for each in model.inputs)
        raise ArtifactError(f"{path}: a backbone has one input, this model has {len(model.inputs)}: {names}")
    kind = model.inputs[0].get_element_type().get_type_name()
    if kind not in _INPUT_TYPES:
        raise ArtifactError(f"{path}: its input holds {kind}, not {' or '.join(_INPUT_TYPES)}")
    return model.inputs[0]


def _require_raw(path: Path, taken: Any, description: Description) -> None:
    is_raw = not any(description.mean) and set(description.scale) == {1.0}
    if taken.get_element_type().get_type_name() == "u8" and not is_raw:
        raise ArtifactError(f"{path}: its input holds bytes, so its description must say mean 0 and scale 1")


def _layout(path: Path, taken: Any) -> str:
    """Which axis of the input holds the three colours."""
    shape = taken.get_partial_shape()
    if shape.rank.is_static and len(shape) == 4:
        for layout, (channels, _) in _AXES.items():
            if shape[channels].is_static and shape[channels].get_length() == 3:
                return layout
    raise ArtifactError(f"{path}: its input has the shape {shape}, neither N x 3 x H x W nor N x H x W x 3")


def _check_size(path: Path, taken: Any, layout: str, size: int) -> None:
    sides = [taken.get_partial_shape()[axis] for axis in _AXES[layout][1]]
    if any(side.is_static and side.get_length() != size for side in sides):
        raise ArtifactError(
            f"{path}: takes faces of {sides[0]} x {sides[1]} pixels, but its description says size {size}"
        )


def _output(path: Path, description: Description, outputs: Sequence[Any]) -> int:
    """The number of the output with the vectors."""
    wanted, names = description.output, [output_name(output) for output in outputs]
    if wanted is None and len(outputs) == 1:
        return 0
    if isinstance(wanted, int) and wanted < len(outputs):
        return wanted
    for number, output in enumerate(outputs):
        if wanted in output.get_names():
            return number
    listed = ", ".join(names)
    if wanted is None:
        raise ArtifactError(
            f"{path}: has {len(outputs)} outputs ({listed}): name the one with the vectors as `output` in its "
            "description"
        )
    raise ArtifactError(f"{path}: has no output {wanted!r}; its outputs are {listed}")


def _face_model(
    path: Path, model: Any, description: Description, layout: str, output: int, batch: int
) -> tuple[Any, int]:
    """See `OnnxBackbone.model`; also the numbers of a vector. The given model is changed."""
    import openvino
    from openvino import opset13 as ops

    size = description.size
    shape = [batch, 3, size, size] if layout == "NCHW" else [batch, size, size, 3]
    try:
        model.reshape(openvino.PartialShape(shape))
        taken, given = model.inputs[0], model.outputs[output]
        pixels = ops.parameter([batch, size, size, 3], np.uint8, "pixels")
        faces = _scaled(ops, pixels, description)
        if layout == "NCHW":
            faces = ops.transpose(faces, ops.constant(np.array([0, 3, 1, 2])))
        faces = ops.convert(faces, taken.get_element_type())
        for target in taken.get_target_inputs():
            target.replace_source_output(faces.output(0))
        found = given.get_node().input_value(0)
        if not found.get_partial_shape().is_static or found.get_shape()[0] != batch:
            raise ArtifactError(
                f"{path}: for {batch} faces output '{output_name(given)}' has the shape {found.get_partial_shape()}"
            )
        dimension = int(np.prod(found.get_shape()[1:]))
        vectors = ops.convert(ops.reshape(found, ops.constant(np.array([batch, dimension])), False), "f32")
        return openvino.Model([ops.result(vectors)], [pixels], "backbone"), dimension
    except RuntimeError as exc:
        raise ArtifactError(f"{path}: does not take a batch of {batch} faces: {_reason(exc)}") from exc


def _scaled(ops: Any, pixels: Any, description: Description) -> Any:
    """The pixels in the model's order of colours, as (pixel - mean) / scale."""
    values = ops.convert(pixels, "f32")
    if description.colour == "BGR":
        values = ops.gather(values, ops.constant(np.array([2, 1, 0])), ops.constant(np.array(3)))
    if any(description.mean):
        values = ops.subtract(values, ops.constant(np.array(description.mean, np.float32)))
    if any(scale != 1 for scale in description.scale):
        values = ops.divide(values, ops.constant(np.array(description.scale, np.float32)))
    return values


def _reason(exc: RuntimeError) -> str:
    """What OpenVINO says last, which is what went wrong."""
    lines = [line.strip() for line in str(exc).splitlines() if line.strip()]
    return (lines[-1] if lines else type(exc).__name__)[:300]
