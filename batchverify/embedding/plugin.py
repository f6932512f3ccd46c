"""Backbones written in Python by other packages, which name them in the entry-point group `batchverify.backbones`.

The name of the entry point is the value of `--backbone`. What it points to is called without arguments and returns an
object with these:

    fingerprint   a text that changes whenever the vectors do: a version, or the hash of the weights
    size          side of the square faces in pixels
    dimension     numbers of a vector
    crop          how a face is cut out by default, as `--crop`; `detect` if absent
    template      of `align`, by name
    load(device)  build the network on `cpu`, `cuda` or `cuda:N`: a function from (N, S, S, 3) uint8 RGB to (N, D)
                  floats of any length. N is always the same. Several threads may call it at once.

A plug-in is code of its author, which runs once it is named.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any, ClassVar

import numpy as np

from batchverify.embedding.description import SIZES
from batchverify.embedding.network import Network, Ranges
from batchverify.errors import ArtifactError, BatchverifyError, UsageError, first_line
from batchverify.faces.alignment import TEMPLATES
from batchverify.fingerprint import CROPS, DEFAULT_TEMPLATE, DIMENSIONS, BackboneSpec, EmbeddingSettings

GROUP = "batchverify.backbones"
BATCH = 32


@dataclass(frozen=True)
class PluginBackbone:
    """A backbone of another package. plugin: the object described above."""

    name: str
    spec: BackboneSpec
    plugin: Any
    ranges: ClassVar[Ranges] = {}

    @classmethod
    def load(cls, name: str) -> PluginBackbone | None:
        """The installed plug-in of this name, None without one. Raises `ArtifactError` for one that does not fit."""
        point = installed().get(name)
        if point is None:
            return None
        try:
            plugin = point.load()()
            spec = _spec(name, plugin)
        except Exception as exc:  # code of others
            raise ArtifactError(
                f"backbone '{name}' ({point.value}): {type(exc).__name__}: {first_line(exc)}"
            ) from exc
        return cls(name, spec, plugin)


class PluginNetwork(Network):
    """A plug-in's function; see `Network`. Raises `ArtifactError` if it cannot be built."""

    runtime = "plugin"

    def __init__(
        self,
        backbone: PluginBackbone,
        device: str,
        *,
        dtype: str = "auto",
        flip: bool = False,
        batch_size: int | None = None,
    ) -> None:
        if dtype != "auto":
            raise UsageError(f"--dtype {dtype}: the plug-in '{backbone.name}' chooses it itself; omit the option")
        super().__init__(backbone.spec, "own", batch_size or BATCH, flip)
        self._name = backbone.name
        try:
            self._function: Callable[[np.ndarray], Any] = backbone.plugin.load(device)
        except Exception as exc:  # code of others
            raise ArtifactError(f"backbone '{self._name}': {type(exc).__name__}: {first_line(exc)}") from exc

    def compute(self, pixels: np.ndarray) -> np.ndarray:
        """See `Network`."""
        try:
            vectors = np.asarray(self._function(pixels), np.float32)
        except Exception as exc:  # code of others
            raise BatchverifyError(f"backbone '{self._name}': {type(exc).__name__}: {first_line(exc)}") from exc
        expected = (len(pixels), self.spec.dimension)
        if vectors.shape != expected:
            raise BatchverifyError(f"backbone '{self._name}': vectors {vectors.shape}, not {expected}")
        return vectors


def installed() -> dict[str, EntryPoint]:
    """The plug-ins of the installed packages by name."""
    return {point.name: point for point in entry_points(group=GROUP)}


def _spec(name: str, plugin: Any) -> BackboneSpec:
    """What a plug-in says of itself. Raises `ValueError` and `AttributeError` for what makes no sense."""
    crop = getattr(plugin, "crop", "detect")
    numbers = ("size", SIZES), ("dimension", DIMENSIONS)
    for key, (least, most) in numbers:
        if type(getattr(plugin, key)) is not int or not least <= getattr(plugin, key) <= most:
            raise ValueError(f"{key} must be a whole number from {least} to {most:,}, got {getattr(plugin, key)!r}")
    template = getattr(plugin, "template", DEFAULT_TEMPLATE)
    for key, value, choices in (("crop", crop, CROPS), ("template", template, TEMPLATES)):
        if value not in list(choices):
            raise ValueError(f"{key} must be one of {', '.join(choices)}, got {value!r}")
    if not isinstance(plugin.fingerprint, str) or not plugin.fingerprint:
        raise ValueError(f"fingerprint must be a text, got {plugin.fingerprint!r}")
    identity = hashlib.sha256(f"plugin\0{name}\0{plugin.fingerprint}".encode()).hexdigest()
    detector = "retinaface" if crop == "align" else "mtcnn"
    defaults = EmbeddingSettings(crop, detector=detector, template=template)
    return BackboneSpec(identity, plugin.size, plugin.dimension, "by the plug-in", defaults)
