"""Backbones: where their weights lie, what identifies them, and how they are read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from batchverify.embedding.download import PUBLISHED, find_weights, locate_weights
from batchverify.embedding.inception import ARCHITECTURE
from batchverify.errors import ArtifactError, UsageError

PACKAGED = "vggface2"
PACKAGED_FILE = "vggface2-int8.safetensors"
METADATA_KEY = "batchverify"
RANGES_KEY = "activation_ranges"
SCALE_SUFFIX = ".scale"

Tensors = dict[str, np.ndarray]


@dataclass(frozen=True)
class Backbone:
    """A backbone in memory.

    name: as the user gave it. tensors: float32, by name; fingerprint: theirs. ranges: the largest activations that
    8-bit layers take, by layer; empty where the file states none.
    """

    name: str
    tensors: Tensors
    fingerprint: str
    ranges: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Listed:
    """A line of `batchverify backbones`: `path` and `fingerprint` are None where the file is not here."""

    name: str
    note: str
    path: Path | None
    fingerprint: str | None

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {**vars(self), "path": str(self.path) if self.path else None}

    def lines(self) -> list[str]:
        """For people."""
        where = str(self.path) if self.path else "not on this machine; fetched when first used"
        return [
            f"{self.name}: {self.note}",
            f"  weights      {where}",
            f"  fingerprint  {self.fingerprint or '-'}",
        ]


def packaged_weights() -> Path:
    """The 8-bit vggface2 weights that are part of this package."""
    return Path(str(files("batchverify.embedding") / "weights" / PACKAGED_FILE))


def fingerprint(tensors: Tensors) -> str:
    """SHA-256 over the sorted (name, shape, dtype, bytes) of `tensors` and the architecture, in hex."""
    digest = hashlib.sha256(ARCHITECTURE.encode())
    for name in sorted(tensors):
        array = tensors[name]
        digest.update(f"\0{name}\0{array.shape}\0{array.dtype.str}\0".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def quantise(tensors: Tensors) -> Tensors:
    """8-bit form of the weights: for every matrix or kernel int8 (O, ...) and a scale (O,) float32.

    Symmetric, per output channel: weight = int8 * scale. Vectors (biases, batch-norm) stay float32.
    """
    stored: Tensors = {}
    for name, array in tensors.items():
        if array.ndim < 2:
            stored[name] = array
            continue
        stored[name], stored[name + SCALE_SUFFIX] = eight_bit(array)
    return stored


def eight_bit(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A float32 matrix or kernel (O, ...) as int8 of the same shape and scales (O,) float32, to be multiplied."""
    flat = weight.reshape(len(weight), -1)
    scale = np.maximum(np.abs(flat).max(axis=1) / np.float32(127), np.float32(1e-12)).astype(np.float32)
    return np.rint(flat / scale[:, None]).astype(np.int8).reshape(weight.shape), scale


def dequantise(stored: Tensors) -> Tensors:
    """The float32 tensors that `quantise` stored: one multiplication each, the same bytes on every machine.

    Tensors that are not int8 stay as they are. Raises `KeyError` for an int8 tensor without its scale,
    `ValueError` for a scale of another length.
    """
    scales = {name + SCALE_SUFFIX for name, array in stored.items() if array.dtype == np.int8}
    tensors: Tensors = {}
    for name, array in stored.items():
        if array.dtype == np.int8:
            scale = stored[name + SCALE_SUFFIX]
            array = array.astype(np.float32) * scale.reshape((len(array),) + (1,) * (array.ndim - 1))
        if name not in scales:
            tensors[name] = array
    return tensors


def load_backbone(
    name: str = PACKAGED,
    weights: Path | None = None,
    *,
    progress: Callable[[int, int | None], None] | None = None,
) -> Backbone:
    """Load a known backbone by name, or one of the user's own by path (`.pt` or `.safetensors`).

    Raises `UsageError` for an unknown name, `ArtifactError` for a file that is no such network,
    `DownloadError` when published weights are neither here nor to be had.
    """
    path = _weights_path(name, weights, progress)
    tensors = read_tensors(path)
    # A fifth of a second that most runs need not spend twice: a test holds the header to the packaged tensors.
    known = stored_fingerprint(path) if name == PACKAGED else fingerprint(tensors)
    return Backbone(name, tensors, known, stored_ranges(path))


def find_fingerprint(
    name: str, weights: Path | None = None, *, progress: Callable[[int, int | None], None] | None = None
) -> str:
    """The fingerprint of a backbone, fetched where it must be; raises as `load_backbone` does."""
    if name == PACKAGED and weights is None:
        return stored_fingerprint(packaged_weights())
    return load_backbone(name, weights, progress=progress).fingerprint


def read_tensors(path: Path) -> Tensors:
    """Read the embedding tensors, float32, of a `.safetensors` file or a torch state dict (never a pickle).

    Raises `ArtifactError` for a file that cannot be read or holds weights that are not finite.
    """
    if not path.is_file():
        raise ArtifactError(f"{path}: no such weights file")
    tensors = _read_safetensors(path) if path.suffix == ".safetensors" else _read_state_dict(path)
    kept = {
        name: array
        for name, array in tensors.items()
        if not name.startswith("logits.") and not name.endswith("num_batches_tracked")
    }
    try:
        kept = {name: array.astype(np.float32, copy=False) for name, array in dequantise(kept).items()}
    except (KeyError, ValueError, TypeError) as exc:
        raise ArtifactError(f"{path}: 8-bit weights need a scale for every output channel: {exc}") from exc
    for name, array in kept.items():
        if not np.isfinite(array).all():
            raise ArtifactError(f"{path}: tensor '{name}' holds values that are not finite")
    return kept


def list_backbones(weights: Path | None = None) -> list[Listed]:
    """The known backbones; nothing is downloaded."""
    packaged = packaged_weights()
    lines = [Listed(PACKAGED, "in the package, 8-bit; the default", packaged, stored_fingerprint(packaged))]
    for name, published in PUBLISHED.items():
        path = find_weights(published, weights)
        known = fingerprint(read_tensors(path)) if path else None
        lines.append(Listed(name, published.url, path, known))
    return lines


def stored_fingerprint(path: Path) -> str:
    """The fingerprint that the packaged file's header states; a test holds it to the tensors."""
    return str(_stated(path)["fingerprint"])


def stored_ranges(path: Path) -> dict[str, float]:
    """The activation ranges that a weights file states, by layer; empty where it states none.

    Raises `ArtifactError` for ranges that are not positive numbers.
    """
    if path.suffix != ".safetensors":
        return {}
    try:
        ranges = {str(name): float(value) for name, value in _stated(path).get(RANGES_KEY, {}).items()}
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as exc:
        raise ArtifactError(f"{path}: its {METADATA_KEY} metadata is damaged: {exc}") from exc
    for name, value in ranges.items():
        if not 0 < value < np.inf:
            raise ArtifactError(f"{path}: the activation range of '{name}' is {value}, not a positive number")
    return ranges


def _stated(path: Path) -> dict[str, Any]:
    """What batchverify wrote into a safetensors file's header; nothing where another program made it."""
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        stated: dict[str, Any] = json.loads((file.metadata() or {}).get(METADATA_KEY, "{}"))
    return stated


def _weights_path(
    name: str, weights: Path | None, progress: Callable[[int, int | None], None] | None
) -> Path:
    if name == PACKAGED:
        if weights is not None:
            raise UsageError(
                f"--weights goes with --backbone {' or '.join(PUBLISHED)}; "
                f"'{PACKAGED}' is part of the package (for a file of your own: --backbone PATH)"
            )
        return packaged_weights()
    if name in PUBLISHED:
        return locate_weights(PUBLISHED[name], weights, progress=progress)
    if Path(name).suffix in {".pt", ".pth", ".safetensors"}:
        if weights is not None:
            raise UsageError(
                f"--weights goes with --backbone {' or '.join(PUBLISHED)}, not with a file: {name}"
            )
        return Path(name)
    raise UsageError(
        f"unknown backbone '{name}': {', '.join([PACKAGED, *PUBLISHED])} or a .pt/.safetensors path"
    )


def _read_safetensors(path: Path) -> Tensors:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as exc:
        raise ArtifactError(f"{path}: not a safetensors file: {exc}") from exc
    except (KeyError, TypeError) as exc:  # bfloat16 and the 8-bit floats, by version
        raise ArtifactError(f"{path}: a number format that numpy does not know: {exc}; use float32") from exc


def _read_state_dict(path: Path) -> Tensors:
    import pickle
    import struct

    import torch

    # What torch raises, by chance, for other, cut and overwritten files.
    damaged = (pickle.UnpicklingError, RuntimeError, EOFError, LookupError, TypeError, ValueError)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        return {str(name): tensor.detach().float().numpy() for name, tensor in state.items()}
    except OSError as exc:
        raise ArtifactError(f"{path}: cannot be read: {exc}") from exc
    except (*damaged, AttributeError, AssertionError, struct.error) as exc:
        raise ArtifactError(
            f"{path}: not a torch state dict (tensors by name and nothing else; no pickle is run), or damaged"
        ) from exc
