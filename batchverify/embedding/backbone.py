"""Backbones: their weights files, how these are read, and the fingerprint that identifies them."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from batchverify.documents import read_document
from batchverify.embedding import compact, inception
from batchverify.embedding.download import PUBLISHED, Progress, find_weights, locate_weights
from batchverify.embedding.inception import ARCHITECTURE
from batchverify.embedding.network import Ranges
from batchverify.embedding.onnx_backbone import SUFFIX as ONNX
from batchverify.embedding.onnx_backbone import OnnxBackbone
from batchverify.embedding.plugin import PluginBackbone, installed
from batchverify.errors import ArtifactError, UsageError
from batchverify.faces.alignment import TEMPLATES
from batchverify.fingerprint import MOST_FUSED, BackboneSpec, EmbeddingSettings

PACKAGED = "vggface2"
COMPACT = "compact"
# The files in the package, with the architecture of each and a note for people.
PACKAGED_FILES = {
    PACKAGED: ("vggface2-int8.safetensors", ARCHITECTURE, "in the package, 8-bit; the default"),
    COMPACT: ("compact.safetensors", compact.ARCHITECTURE, "in the package, 16-bit; small and fast"),
}
ARCHITECTURES = (ARCHITECTURE, compact.ARCHITECTURE)
WEIGHTS = (".pt", ".pth", ".safetensors")
METADATA_KEY = "batchverify"
RANGES_KEY = "activation_ranges"
SETTINGS_KEY = "settings"
# The settings that a file may state: those of the faces that its network learned from.
FACE_SETTINGS = ("crop", "margin", "detector", "template")
SCALE_SUFFIX = ".scale"

# Values of all tensors of a weights file: 1 GiB as float32, nine times as many as the network has.
MOST_VALUES = 1 << 28

Tensors = dict[str, np.ndarray]


@dataclass(frozen=True)
class Backbone:
    """A backbone in memory.

    name: as the user gave it. tensors: float32, by name. fingerprint: of the tensors. ranges: the smallest and the
    largest activation of 8-bit layers, by layer; empty if the file states none. architecture: of the network.
    settings: how the faces that it learned from were cut out, where the file states it.
    """

    name: str
    tensors: Tensors
    fingerprint: str
    ranges: Ranges = field(default_factory=dict)
    architecture: str = ARCHITECTURE
    settings: EmbeddingSettings | None = None

    @property
    def spec(self) -> BackboneSpec:
        """The faces that it takes and the vectors that it gives."""
        spec = spec_of(self.architecture, self.fingerprint)
        return spec if self.settings is None else replace(spec, defaults=self.settings)

    @property
    def is_compact(self) -> bool:
        """Whether the network is that of `compact.py`; otherwise it is that of `inception.py`."""
        return self.architecture == compact.ARCHITECTURE

    def check_tensors(self) -> None:
        """Raise `ArtifactError` if the tensors are not those of the architecture."""
        expected = (compact if self.is_compact else inception).tensor_shapes()
        given = {name: array.shape for name, array in self.tensors.items()}
        wrong = sorted(name for name in expected.keys() | given.keys() if expected.get(name) != given.get(name))
        if wrong:
            raise ArtifactError(
                f"{self.name}: not the weights of {self.architecture}: {len(wrong)} tensors are missing, unknown or "
                f"of another shape, such as '{wrong[0]}'"
            )


AnyBackbone = Backbone | OnnxBackbone | PluginBackbone


@dataclass(frozen=True)
class BackboneInfo:
    """An entry of `batchverify backbones`. path, fingerprint: None if the file is not on this machine."""

    name: str
    note: str
    path: Path | None = None
    fingerprint: str | None = None

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {**vars(self), "path": str(self.path) if self.path else None}

    def lines(self) -> list[str]:
        """For people."""
        where = str(self.path) if self.path else "not on this machine; downloaded when first used"
        return [
            f"{self.name}: {self.note}",
            f"  weights      {where}",
            f"  fingerprint  {self.fingerprint or '-'}",
        ]


def packaged_weights(name: str = PACKAGED) -> Path:
    """The weights of a backbone that are part of this package."""
    return Path(str(files("batchverify.embedding") / "weights" / PACKAGED_FILES[name][0]))


def spec_of(architecture: str, known: str) -> BackboneSpec:
    """What the network of an architecture takes and gives, with the fingerprint of its tensors."""
    if architecture == compact.ARCHITECTURE:
        return BackboneSpec(known, compact.SIZE, compact.DIMENSION, compact.NORMALISATION, compact.SETTINGS)
    return BackboneSpec(known)


def fingerprint(tensors: Tensors, architecture: str = ARCHITECTURE) -> str:
    """SHA-256 over the sorted (name, shape, dtype, bytes) of `tensors` and the architecture, in hex."""
    digest = hashlib.sha256(architecture.encode())
    for name, array in sorted(tensors.items()):
        digest.update(f"\0{name}\0{array.shape}\0{array.dtype.str}\0".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def quantise(tensors: Tensors) -> Tensors:
    """The weights in 8 bits: for every matrix or kernel an int8 tensor (O, ...) and a float32 scale (O,).

    Symmetric, per output channel: weight = int8 * scale. Vectors (biases, batch normalisation) stay float32.
    """
    stored: Tensors = {}
    for name, array in tensors.items():
        if array.ndim < 2:
            stored[name] = array
            continue
        stored[name], stored[name + SCALE_SUFFIX] = eight_bit(array)
    return stored


def eight_bit(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A float32 matrix or kernel (O, ...) as int8 of the same shape and float32 scales (O,) to multiply it with."""
    flat = weight.reshape(len(weight), -1)
    scale = np.maximum(np.abs(flat).max(axis=1) / np.float32(127), np.float32(1e-12)).astype(np.float32)
    return np.rint(flat / scale[:, None]).astype(np.int8).reshape(weight.shape), scale


def dequantise(stored: Tensors) -> Tensors:
    """The inverse of `quantise`: float32 tensors, the same bytes on every machine.

    Tensors that are not int8 are unchanged. Raises `KeyError` for an int8 tensor without a scale, `ValueError` for a
    scale of another length.
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


def is_file(name: str) -> bool:
    """Whether `--backbone` names a file, by its suffix."""
    return Path(name).suffix in (*WEIGHTS, ONNX)


def fused_names(name: str) -> list[str]:
    """The backbones that `--backbone` names: several are joined by `+`.

    A `+` in the name of a plug-in, or of a file that exists, joins nothing. Raises `UsageError` for an empty name, a
    name that appears twice, and too many names.
    """
    words, names = name.split("+"), []
    while words:
        count = next((n for n in range(len(words), 1, -1) if _exists("+".join(words[:n]))), 1)
        names.append("+".join(words[:count]))
        words = words[count:]
    if len(names) > 1 and not all(names):
        raise UsageError(f"--backbone {name}: + joins the names of backbones, and one of them is empty")
    for each in names:
        if names.count(each) > 1:
            raise UsageError(f"--backbone {name}: {each} appears twice")
    if len(names) > MOST_FUSED:
        raise UsageError(f"--backbone {name}: at most {MOST_FUSED} backbones can be fused")
    return names


def _exists(name: str) -> bool:
    return (is_file(name) and Path(name).is_file()) or name in installed()


def load_backbone(
    name: str = PACKAGED, weights: Path | None = None, *, progress: Progress | None = None
) -> AnyBackbone:
    """Load a known backbone by name, a file of the user's (weights, or an ONNX model) by path, or a plug-in by name.

    Raises `UsageError` for an unknown name, `ArtifactError` for a file or plug-in that is no backbone,
    `DownloadError` if published weights are neither on this machine nor available from the network.
    """
    return _other_backbone(name, weights) or load_weights(name, weights, progress=progress)


def load_weights(name: str = PACKAGED, weights: Path | None = None, *, progress: Progress | None = None) -> Backbone:
    """Load the weights of one of our networks; see `load_backbone`."""
    path = _weights_path(name, weights, progress)
    tensors, architecture = read_tensors(path), stored_architecture(path)
    # The header saves a fifth of a second; a test checks it against the packaged tensors.
    is_packaged = name in PACKAGED_FILES
    known = stored_fingerprint(path) if is_packaged else fingerprint(tensors, architecture)
    return Backbone(name, tensors, known, stored_ranges(path), architecture, stored_settings(path))


def _other_backbone(name: str, weights: Path | None) -> OnnxBackbone | PluginBackbone | None:
    """The ONNX file or plug-in that is meant, None for weights of a network of ours."""
    if name in PACKAGED_FILES or name in PUBLISHED:
        return None
    backbone = OnnxBackbone.load(name) if Path(name).suffix == ONNX else PluginBackbone.load(name)
    if backbone is not None and weights is not None:
        raise _weights_error(name)
    return backbone


def find_spec(name: str, weights: Path | None = None, *, progress: Progress | None = None) -> BackboneSpec:
    """What a backbone takes and gives; downloaded if necessary. Raises as `load_backbone` does."""
    if name in PACKAGED_FILES and weights is None:
        return spec_of(PACKAGED_FILES[name][1], stored_fingerprint(packaged_weights(name)))
    return load_backbone(name, weights, progress=progress).spec


def read_tensors(path: Path) -> Tensors:
    """Read the float32 tensors of the embedding from a `.safetensors` file or a torch state dict.

    Pickled code is never run. Raises `ArtifactError` for a file that cannot be read or holds weights that are not
    finite.
    """
    if not path.is_file():
        raise ArtifactError(f"{path}: no such weights file")
    tensors = _read_safetensors(path) if path.suffix == ".safetensors" else _read_state_dict(path)
    stored = {
        name: array
        for name, array in tensors.items()
        if not name.startswith("logits.") and not name.endswith("num_batches_tracked")
    }
    try:
        floats = {name: array.astype(np.float32, copy=False) for name, array in dequantise(stored).items()}
    except (KeyError, ValueError, TypeError) as exc:
        raise ArtifactError(f"{path}: 8-bit weights need a scale for every output channel: {exc}") from exc
    for name, array in floats.items():
        if not np.isfinite(array).all():
            raise ArtifactError(f"{path}: tensor '{name}' holds values that are not finite")
    return floats


def list_backbones(weights: Path | None = None) -> list[BackboneInfo]:
    """The known backbones; nothing is downloaded, and no plug-in is run."""
    infos = []
    for name, (_, _, note) in PACKAGED_FILES.items():
        packaged = packaged_weights(name)
        infos.append(BackboneInfo(name, note, packaged, stored_fingerprint(packaged)))
    for name, published in PUBLISHED.items():
        path = find_weights(published, weights)
        known = fingerprint(read_tensors(path)) if path else None
        infos.append(BackboneInfo(name, published.url, path, known))
    return infos + [BackboneInfo(name, f"a plug-in, {point.value}") for name, point in installed().items()]


def stored_fingerprint(path: Path) -> str:
    """The fingerprint in the header of a packaged file; a test checks it against the tensors."""
    return str(_metadata(path)["fingerprint"])


def stored_architecture(path: Path) -> str:
    """The architecture in the header of a weights file, InceptionResnetV1 if there is none.

    Raises `ArtifactError` for another one.
    """
    known = _metadata(path).get("architecture", ARCHITECTURE)
    if known not in ARCHITECTURES:
        raise ArtifactError(f"{path}: weights of an unknown architecture: {str(known)[:60]!r}")
    return str(known)


def stored_ranges(path: Path) -> dict[str, tuple[float, float]]:
    """The activation ranges in the header of a weights file, by layer; empty if there are none.

    A range is stored as two numbers about zero, or as the positive one alone where the other is zero. Raises
    `ArtifactError` for others.
    """
    try:
        ranges = {name: _range(value) for name, value in _metadata(path).get(RANGES_KEY, {}).items()}
    except (ValueError, TypeError, AttributeError, OverflowError) as exc:
        raise ArtifactError(f"{path}: its {METADATA_KEY} metadata is damaged: {exc}") from exc
    for name, (low, high) in ranges.items():
        if not -np.inf < low <= 0 < high < np.inf:
            raise ArtifactError(f"{path}: the activation range of '{name}' is {low} to {high}, not about zero")
    return ranges


def _range(stored: Any) -> tuple[float, float]:
    """The lowest and the highest activation."""
    low, high = stored if isinstance(stored, list) else (0.0, stored)
    return float(low), float(high)


def stored_settings(path: Path) -> EmbeddingSettings | None:
    """How faces are to be cut out, by the header of a weights file; None if it does not say.

    Raises `ArtifactError` for settings that do not exist.
    """
    stored = _metadata(path).get(SETTINGS_KEY)
    if stored is None:
        return None
    try:
        if unknown := sorted(set(map(str, stored)) - set(FACE_SETTINGS)):
            raise UsageError(f"{', '.join(unknown)} is not one of {', '.join(FACE_SETTINGS)}")
        settings = EmbeddingSettings(**stored)
        if settings.template not in TEMPLATES:
            raise UsageError(f"template must be one of {', '.join(TEMPLATES)}, got {settings.template!r}")
    except (UsageError, TypeError) as exc:
        raise ArtifactError(f"{path}: its {METADATA_KEY} metadata states wrong settings: {exc}") from exc
    return settings


def stored_texts(path: Path) -> tuple[str, str]:
    """Licence and source in the header of a weights file; empty where it states none, or states them otherwise."""
    known = _metadata(path)
    licence, source = known.get("licence", ""), known.get("source", "")
    return (licence if isinstance(licence, str) else ""), (source if isinstance(source, str) else "")


def _metadata(path: Path) -> dict[str, Any]:
    """What batchverify wrote into the header of a safetensors file; empty for files of other programs and kinds.

    Raises `ArtifactError` if it is damaged.
    """
    if path.suffix != ".safetensors":
        return {}
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        text = (file.metadata() or {}).get(METADATA_KEY, "{}")
    try:
        return dict(read_document(text).items())
    except (ValueError, AttributeError) as exc:
        raise ArtifactError(f"{path}: its {METADATA_KEY} metadata is damaged: {exc}") from exc


def _weights_path(name: str, weights: Path | None, progress: Progress | None) -> Path:
    if name in PUBLISHED:
        return locate_weights(PUBLISHED[name], weights, progress=progress)
    if name not in PACKAGED_FILES and Path(name).suffix not in WEIGHTS:
        known = [*PACKAGED_FILES, *PUBLISHED, *installed()]
        raise UsageError(f"unknown backbone '{name}': {', '.join(known)} or a .onnx/.pt/.safetensors path")
    if weights is not None:
        raise _weights_error(name)
    return packaged_weights(name) if name in PACKAGED_FILES else Path(name)


def _weights_error(name: str) -> UsageError:
    return UsageError(
        f"--weights goes with --backbone {' or '.join(PUBLISHED)}, not with '{name}' (for your own file use "
        "--backbone PATH)"
    )


def _read_safetensors(path: Path) -> Tensors:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        _require_fits(path, path.stat().st_size // 4)
        return load_file(path)
    except (SafetensorError, OSError) as exc:
        raise ArtifactError(f"{path}: not a safetensors file: {exc}") from exc
    except (KeyError, TypeError) as exc:  # bfloat16 and the 8-bit floats, by version
        raise ArtifactError(f"{path}: a dtype that numpy does not have: {exc}; use float32") from exc


def _read_state_dict(path: Path) -> Tensors:
    import pickle
    import struct

    import torch

    # What torch raises for files of other kinds and for truncated or overwritten ones.
    damaged = (pickle.UnpicklingError, RuntimeError, EOFError, LookupError, TypeError, ValueError)
    try:
        _require_stored(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
        # A tensor may show a few numbers of its file many times over.
        _require_fits(path, sum(tensor.numel() for tensor in state.values()))
        if any(tensor.is_complex() for tensor in state.values()):
            raise ArtifactError(f"{path}: holds complex numbers; use float32")
        return {str(name): tensor.detach().float().numpy() for name, tensor in state.items()}
    except ArtifactError:
        raise
    except OSError as exc:
        raise ArtifactError(f"{path}: cannot be read: {exc}") from exc
    except (*damaged, AttributeError, AssertionError, struct.error) as exc:
        raise ArtifactError(
            f"{path}: damaged, or not a torch state dict (only tensors by name; pickled code is not run)"
        ) from exc


def _require_stored(path: Path) -> None:
    """Raise `ArtifactError` for a compressed zip file: torch writes none, and it could fill the memory."""
    import zipfile

    # torch says what is wrong with a damaged one.
    with suppress(zipfile.BadZipFile), zipfile.ZipFile(path) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise ArtifactError(f"{path}: a compressed file, which torch does not write; save it again")


def _require_fits(path: Path, values: int) -> None:
    """Raise `ArtifactError` for more values than a backbone has."""
    if values > MOST_VALUES:
        raise ArtifactError(f"{path}: {values:,} values, the limit is {MOST_VALUES:,}")
