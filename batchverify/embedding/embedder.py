"""From images to unit vectors or reasons: the detector and the backbone behind one call."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from batchverify.embedding.backbone import PACKAGED, AnyBackbone, Backbone, load_backbone
from batchverify.embedding.network import Network, check_network
from batchverify.embedding.onnx_backbone import OnnxBackbone
from batchverify.embedding.plugin import PluginBackbone, PluginNetwork
from batchverify.errors import BatchverifyError, UsageError
from batchverify.faces.crops import Face, detected_face, fixed_face
from batchverify.faces.detection import Detections, choose_face, reduced
from batchverify.faces.detectors import Detector, build_detector
from batchverify.fingerprint import DETECT_SIDE, EmbeddingFingerprint
from batchverify.records import Reason, Skipped
from batchverify.runtime.compute_path import ComputePath
from batchverify.runtime.devices import available_cpus, resolve_device, resolve_runtime

log = logging.getLogger(__name__)

# Faces are searched for in groups of images with at most so many pixels, which bounds the memory.
DETECT_PIXELS = 8_000_000


@dataclass(frozen=True)
class Embedded:
    """What an `Embedder` returns for N images, row by row.

    vectors: (N, D) float32, unit rows, zero where skipped. boxes: (N, 4) float32, x0 y0 x1 y1 in pixels of the
    image. confidence: (N,) float32. faces: (N,) int16, how many were found. skipped: N entries, None where there is
    a vector.
    """

    vectors: np.ndarray
    boxes: np.ndarray
    confidence: np.ndarray
    faces: np.ndarray
    skipped: list[Skipped | None]

    def __len__(self) -> int:
        return len(self.skipped)


class Embedder:
    """Embeds the faces of images. Build once, call often, from any thread: `Embedder()(images)`.

    On a CPU the networks run in OpenVINO (`cpu_network.py`), on a GPU or without OpenVINO in torch (`forward.py`),
    always in batches of one fixed shape, so that a vector does not depend on its neighbours. In torch on a CPU its
    last bits depend on the batch size and the number of threads.
    crop, margin, detector: the backbone's own by default. dtype: of the backbone: `auto`, `float32`, `bfloat16`,
    `int8` (OpenVINO) or `float16` (torch). workers: threads that will call at the same time. threads: CPUs for each,
    by default an equal share of all.
    Raises `UsageError` for invalid settings, `ArtifactError` for weights that do not fit.
    """

    def __init__(
        self,
        backbone: str | Path | AnyBackbone = PACKAGED,
        *,
        crop: str | None = None,
        margin: int | None = None,
        tta: str = "none",
        face: str = "center",
        min_face: int | None = None,
        detector: str | None = None,
        weights: str | Path | None = None,
        device: str = "auto",
        runtime: str = "auto",
        batch_size: int | None = None,
        dtype: str = "auto",
        workers: int = 1,
        threads: int | None = None,
    ) -> None:
        if batch_size is not None and batch_size < 1:
            raise UsageError(f"batch_size must be at least 1, got {batch_size}")
        started = time.perf_counter()
        self.device = resolve_device(device)
        requested, self.runtime = runtime, resolve_runtime(runtime, self.device)
        if isinstance(backbone, str | Path):
            backbone = load_backbone(str(backbone), Path(weights) if weights else None)
        spec = backbone.spec
        self.settings = spec.settings(
            crop=crop, margin=margin, tta=tta, face=face, min_face=min_face, detector=detector
        )
        self.fingerprint = EmbeddingFingerprint.of(spec, self.settings)
        cpus = threads or max(1, available_cpus() // workers)
        options: dict[str, Any] = {"dtype": dtype, "flip": tta == "flip", "batch_size": batch_size}
        if self.runtime == "torch" and isinstance(backbone, Backbone):
            from batchverify.embedding.forward import TorchNetwork

            self._network: Any = TorchNetwork(backbone, self.device, threads=threads, **options)
        else:
            self._network = _network(backbone, self.device, requested, workers, cpus, options)
        self._detector = build_detector(
            self.settings, self.device, self.runtime, threads=cpus, dtype=self._network.dtype
        )
        self._torch = _torch_device(self._network, self.device, self.runtime, threads)
        self._start_seconds = {"start": time.perf_counter() - started}
        log.info("embedding on %s", self.compute_path)

    def start_seconds(self) -> dict[str, float]:
        """The seconds that the constructor took, as a stage; empty after the first call."""
        seconds, self._start_seconds = self._start_seconds, {}
        return seconds

    @property
    def batch_size(self) -> int:
        """Faces in a batch; it falls if a GPU runs out of memory."""
        return int(self._network.batch_size)

    @property
    def compute_path(self) -> ComputePath:
        """Device, dtype, runtime and batch size."""
        return ComputePath(self.device, self._network.dtype, self._network.runtime, self.batch_size)

    def __call__(self, images: Sequence[np.ndarray]) -> Embedded:
        """Embed images, each (H, W, 3) uint8 RGB, upright, of any size; `UsageError` for anything else."""
        return self.embed_faces(self.find_faces(_checked(images)))

    def find_faces(self, images: Sequence[np.ndarray]) -> list[Face | Skipped]:
        """Crop one face from each (H, W, 3) uint8 RGB image, or return the reason why there is none."""
        if self._detector is None:
            return [fixed_face(image, self.settings.crop, self.fingerprint.size) for image in images]
        faces: list[Face | Skipped] = []
        for group in _groups(images, self._detector.group):
            smaller = [reduced(image) for image in group]
            detections = self._detect(self._detector, smaller)
            faces += map(self._crop, group, smaller, detections)
        return faces

    def _detect(self, detector: Detector, images: list[np.ndarray]) -> list[Detections]:
        """All faces of some images, in smaller blocks if a GPU runs out of memory."""
        if self._torch is None:
            return detector(images)

        def detect() -> list[Detections]:
            with self._torch.computing():
                return detector(images, blocks)

        blocks = detector.blocks
        while (detections := self._torch.within_memory(detect)) is None:
            if blocks.smallest:
                raise BatchverifyError(f"{self.device}: no memory to find a face")
            blocks = blocks.halved()
        return list(detections)

    def _crop(self, image: np.ndarray, smaller: np.ndarray, detections: Detections) -> Face | Skipped:
        """The chosen face, cut from `image`; the detections are those of the smaller copy."""
        nothing = Skipped(Reason.NO_FACE, "the detector found no face")
        if not len(detections):
            return nothing
        height, width = smaller.shape[:2]
        index = choose_face(detections, height, width, self.settings.face)
        scale = max(image.shape[:2]) / max(height, width)
        size = self.fingerprint.size
        return detected_face(image, detections, index, scale, self.settings, size) or nothing

    def embed_faces(self, faces: Sequence[Face | Skipped]) -> Embedded:
        """Embed cropped faces; skipped ones stay skipped, in their rows."""
        count = len(faces)
        result = Embedded(
            np.zeros((count, self.fingerprint.dimension), np.float32),
            np.zeros((count, 4), np.float32),
            np.full(count, np.nan, np.float32),
            np.zeros(count, np.int16),
            [face if isinstance(face, Skipped) else None for face in faces],
        )
        cropped = {row: face for row, face in enumerate(faces) if isinstance(face, Face)}
        for row, face in cropped.items():
            result.boxes[row], result.confidence[row] = face.box, face.confidence
            result.faces[row] = face.faces
        if cropped:
            result.vectors[list(cropped)] = self.vectors(np.stack([face.pixels for face in cropped.values()]))
        return result

    def vectors(self, pixels: np.ndarray) -> np.ndarray:
        """The backbone alone: (N, S, S, 3) uint8 RGB faces to (N, D) float32 unit rows.

        Raises `BatchverifyError` if the dtype overflows: vectors are always finite.
        """
        rows: np.ndarray = self._network.vectors(pixels)
        return rows


def _network(
    backbone: AnyBackbone,
    device: str,
    runtime: str,
    workers: int,
    threads: int,
    options: Mapping[str, Any],
) -> Network:
    """The network of a backbone that does not run in torch; those of other projects are tried out.

    runtime: as the user gave it. workers, threads: see `Embedder`. options: dtype, flip and batch_size.
    """
    if isinstance(backbone, PluginBackbone):
        network: Network = PluginNetwork(backbone, device, **options)
        check_network(network, backbone.name)
        return network
    if isinstance(backbone, OnnxBackbone):
        # Tried with few faces: a large network takes long for a whole batch, and what fills it up would hide how much
        # faces change each other's vectors.
        few = {**options, "batch_size": min(options["batch_size"] or 2, 2)}
        if device != "cpu":
            from batchverify.embedding.onnx_runtime import OnnxRuntimeNetwork

            check_network(OnnxRuntimeNetwork(backbone, device, **few), backbone.name)
            return OnnxRuntimeNetwork(backbone, device, **options)
        if runtime == "torch":
            raise UsageError(f"--runtime torch: {backbone.name} is an ONNX file, which OpenVINO runs on a CPU")
    from batchverify.embedding.cpu_network import CpuNetwork

    if isinstance(backbone, OnnxBackbone):
        check_network(CpuNetwork(backbone, threads=threads, **few), backbone.name)
    return CpuNetwork(backbone, streams=workers, threads=threads, **options)


def _torch_device(network: Any, device: str, runtime: str, threads: int | None) -> Any:
    """What torch's detector computes on: the backbone's network if that is in torch, too. None without torch."""
    if runtime != "torch":
        return None
    from batchverify.embedding.forward import TorchDevice

    return network if isinstance(network, TorchDevice) else TorchDevice(device, threads)


def _checked(images: Any) -> list[np.ndarray]:
    """The images as a list, each (H, W, 3) uint8; `UsageError` for paths, Pillow's images and other arrays."""
    if isinstance(images, str | bytes) or not isinstance(images, Iterable):
        raise UsageError(f"images must be a list of (H, W, 3) uint8 RGB arrays, got {type(images).__name__}")
    images = list(images)
    for index, image in enumerate(images):
        given = type(image).__name__
        if isinstance(image, np.ndarray):
            if image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3 and image.size:
                continue
            given = f"{image.shape} {image.dtype}"
        raise UsageError(f"image {index}: must be (H, W, 3) uint8 RGB, got {given}")
    return images


def _groups(images: Sequence[np.ndarray], most: int) -> Iterator[list[np.ndarray]]:
    """The images in groups of at most `most` images and `DETECT_PIXELS` pixels."""
    group: list[np.ndarray] = []
    total = 0
    for image in images:
        height, width = image.shape[:2]
        shrink = min(1.0, DETECT_SIDE / max(height, width))
        # Of the copy that faces are searched for in.
        pixels = int(height * width * shrink * shrink)
        if group and (len(group) == most or total + pixels > DETECT_PIXELS):
            yield group
            group, total = [], 0
        group.append(image)
        total += pixels
    if group:
        yield group
