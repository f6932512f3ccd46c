"""Our backbones as ONNX files with a description, for other runtimes; `--backbone FILE.onnx` reads them back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np

from batchverify.documents import MOST_METADATA, read_document
from batchverify.embedding import compact, inception
from batchverify.embedding.backbone import (
    COMPACT,
    PACKAGED,
    Backbone,
    fused_names,
    is_file,
    load_weights,
    stored_texts,
)
from batchverify.embedding.description import Description
from batchverify.embedding.download import PUBLISHED
from batchverify.embedding.inception import Pool, Residual
from batchverify.embedding.onnx_backbone import METADATA_KEY, SUFFIX
from batchverify.embedding.onnx_writer import OnnxGraph
from batchverify.embedding.plugin import installed
from batchverify.errors import ArtifactError, BatchverifyError, UsageError
from batchverify.storage.location import Location
from batchverify.version import __version__

INPUT, OUTPUT = "faces", "embedding"
UNKNOWN_LICENCE = "not stated"
# Licence and source of the backbones that have names.
_KNOWN = {
    PACKAGED: ("MIT", f"{PUBLISHED['vggface2-float'].url}, with 8 bits a weight"),
    COMPACT: ("Apache-2.0", "Open Model Zoo, face-reidentification-retail-0095, FP16"),
    **{name: ("MIT", published.url) for name, published in PUBLISHED.items()},
}


@dataclass(frozen=True)
class Exported:
    """What an export wrote. fingerprint: of the backbone that the file was made of; the file has one of its own."""

    onnx: str
    description: str
    backbone: str
    fingerprint: str

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)

    def lines(self) -> list[str]:
        """For people."""
        return [f"{self.onnx}: {self.backbone} as ONNX", f"{self.description}: the faces that it takes"]


def export(name: str, output: Path, weights: Path | None = None) -> Exported:
    """Write the backbone `name` to the ONNX file `output`, with a description in a `.json` file beside it.

    Vectors are those of the backbone in float32, not normalised. Earlier files are replaced. weights: as for
    `load_weights`. Raises `UsageError` for a backbone of another project, for another suffix, and if a file that is
    no description is in the way, `ArtifactError` for weights that do not fit, `BatchverifyError` if the disk fails.
    """
    if output.suffix != SUFFIX:
        raise UsageError(f"-o must end in {SUFFIX}, got {output}")
    _require_ours(name)
    backbone = load_weights(name, weights)
    description = _description(backbone)
    beside = output.with_suffix(".json")
    text = json.dumps(description, indent=1)
    data = onnx_bytes(backbone, {METADATA_KEY: text})
    try:
        _require_description(beside)
        # At no time does an old description stand beside a new model.
        Location.parse(beside).remove()
        Location.parse(output).write_bytes(data)
        Location.parse(beside).write_bytes(text.encode())
    except OSError as exc:
        raise BatchverifyError(f"{output}: cannot be written: {exc.strerror or exc}") from exc
    return Exported(str(output), str(beside), name, backbone.fingerprint)


def _require_ours(name: str) -> None:
    """Raise `UsageError` for what cannot be one of our networks."""
    if len(fused_names(name)) > 1:
        raise UsageError(f"{name}: several backbones; export each by itself")
    if name in installed():
        raise UsageError(f"{name}: a plug-in; only weights of our networks can be exported")
    if Path(name).suffix == SUFFIX:
        raise UsageError(f"{name}: an ONNX file already")


def onnx_bytes(backbone: Backbone, metadata: Mapping[str, str]) -> bytes:
    """A backbone as an ONNX file, with metadata: scaled faces N x 3 x S x S to vectors N x D, not normalised.

    Batch normalisation is folded in. Raises `ArtifactError` for tensors of another network.
    """
    backbone.check_tensors()
    build = _Compact if backbone.is_compact else _Inception
    graph, size = OnnxGraph(), backbone.spec.size
    build(graph, backbone).build()
    return graph.model(
        (INPUT, [3, size, size]),
        (OUTPUT, [backbone.spec.dimension]),
        metadata,
        ("batchverify", __version__),
    )


def _description(backbone: Backbone) -> dict[str, Any]:
    """The faces that a backbone takes, as `Description` reads it."""
    settings, spec = backbone.spec.defaults, backbone.spec
    crop = {"template": settings.template} if settings.crop == "align" else {"margin": settings.margin}
    # The compact network scales pixels itself.
    scaled = (
        {"colour": "BGR", "mean": 0, "scale": 1}
        if backbone.is_compact
        else {"colour": "RGB", "mean": 127.5, "scale": 128}
    )
    licence, source = origin_of(backbone.name)
    source = f"{source}; written by batchverify {__version__}, fingerprint {backbone.fingerprint}"
    texts = {"licence": licence, "source": source}
    return {"crop": settings.crop, **crop, "size": spec.size, **scaled, "output": OUTPUT, **texts}


def origin_of(name: str) -> tuple[str, str]:
    """Licence and source of a backbone."""
    if name in _KNOWN:
        return _KNOWN[name]
    licence, source = stored_texts(Path(name)) if is_file(name) else ("", "")
    return licence or UNKNOWN_LICENCE, source or Path(name).name


def _require_description(path: Path) -> None:
    """Raise `UsageError` for a file of something else where the description is to lie. Raises OSError."""
    if not path.exists():
        return
    try:
        with path.open("rb") as file:
            Description.parse(read_document(file.read(MOST_METADATA + 1)), str(path))
    except (ValueError, ArtifactError) as exc:
        raise UsageError(f"{path}: would be replaced, but it is no description of a model; give another -o") from exc


class _Inception:
    """Adds InceptionResnetV1 to a graph; see `inception.py`."""

    def __init__(self, graph: OnnxGraph, backbone: Backbone) -> None:
        self._graph, self._folded = graph, inception.fold(backbone.tensors)

    def build(self) -> None:
        """Add all layers, from `INPUT` to `OUTPUT`."""
        values = INPUT
        for number, layer in enumerate(inception.LAYERS):
            values = self._layer(values, layer, f"layer{number}")
        add = self._graph.add
        mean = add("Flatten", "mean", [add("GlobalAveragePool", "pooled", [values])], axis=1)
        add("Gemm", OUTPUT, [mean, *self._tensors("last_linear")], transB=1)

    def _layer(self, values: str, layer: inception.Layer, name: str) -> str:
        add = self._graph.add
        if isinstance(layer, Pool):
            return add("MaxPool", name, [values], kernel_shape=[3, 3], strides=[2, 2])
        if isinstance(layer, inception.Convolution):
            return self._activated(values, layer)
        branches = [reduce(self._activated, branch, values) for branch in layer.branches]
        if not isinstance(layer, Residual):
            pooled = add("MaxPool", f"{name}.pool", [values], kernel_shape=[3, 3], strides=[2, 2])
            return add("Concat", name, [*branches, pooled], axis=1)
        joined = add("Concat", f"{name}.joined", branches, axis=1)
        total = add("Add", f"{name}.sum", [values, self._convolution(joined, layer.projection)])
        return add("Relu", name, [total]) if layer.relu else total

    def _activated(self, values: str, layer: inception.Convolution) -> str:
        return self._graph.add("Relu", layer.name, [self._convolution(values, layer)])

    def _convolution(self, values: str, layer: inception.Convolution) -> str:
        return self._graph.add(
            "Conv",
            f"{layer.name}.conv",
            [values, *self._tensors(layer.name)],
            kernel_shape=layer.kernel,
            strides=[layer.stride] * 2,
            pads=[*layer.padding, *layer.padding],
        )

    def _tensors(self, name: str) -> list[str]:
        weight, bias = self._folded[name]
        return [self._graph.tensor(f"{name}.weight", weight), self._graph.tensor(f"{name}.bias", bias)]


class _Compact:
    """Adds the compact network to a graph; see `compact.py`."""

    def __init__(self, graph: OnnxGraph, backbone: Backbone) -> None:
        self._graph, self._arrays = graph, backbone.tensors

    def build(self) -> None:
        """Add all layers, from `INPUT` to `OUTPUT`."""
        add = self._graph.add
        values = add("Mul", "scaled", [INPUT, self._tensor("input.scale", 1, 3, 1, 1)])
        values = add("Add", "shifted", [values, self._tensor("input.shift", 1, 3, 1, 1)])
        for layer in compact.LAYERS:
            if isinstance(layer, compact.Convolution):
                values = self._convolution(values, layer)
            else:
                values = self._bottleneck(values, layer)
        add("Flatten", OUTPUT, [values], axis=1)

    def _bottleneck(self, values: str, layer: compact.Bottleneck) -> str:
        add = self._graph.add
        projected = reduce(self._convolution, layer.convolutions, values)
        mean = add("GlobalAveragePool", f"{layer.name}.mean", [projected])
        weights = add("Sigmoid", f"{layer.name}.weights", [reduce(self._convolution, layer.weighting, mean)])
        weighted = add("Mul", f"{layer.name}.weighted", [projected, weights])
        return add("Add", layer.name, [weighted, values]) if layer.residual else weighted

    def _convolution(self, values: str, layer: compact.Convolution) -> str:
        name, biased = layer.name, layer.biased
        values = self._graph.add(
            "Conv",
            f"{name}.conv",
            [values, self._tensor(f"{name}.weight"), *([self._tensor(f"{name}.bias")] if biased else [])],
            kernel_shape=[layer.kernel] * 2,
            strides=[layer.stride] * 2,
            pads=[layer.padding] * 4,
            group=layer.inputs if layer.depthwise else 1,
        )
        if not layer.activated:
            return values
        return self._graph.add("PRelu", name, [values, self._tensor(f"{name}.slope", 1, 1, 1)])

    def _tensor(self, name: str, *shape: int) -> str:
        array: np.ndarray = self._arrays[name]
        return self._graph.tensor(name, array.reshape(shape) if shape else array)
