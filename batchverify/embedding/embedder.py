"""Pictures in, unit vectors and reasons out: the detector and the backbone behind one call."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from batchverify.embedding.backbone import PACKAGED, Backbone, load_backbone
from batchverify.embedding.inception import DIMENSION
from batchverify.errors import BatchverifyError, UsageError
from batchverify.faces.crops import Face, box_face, fixed_face
from batchverify.faces.detection import Detections, FaceDetector, choose_face, reduced
from batchverify.fingerprint import DEFAULT_MARGIN, DETECT_SIDE, EmbeddingFingerprint, EmbeddingSettings
from batchverify.records import Reason, Skipped
from batchverify.runtime.compute_path import ComputePath
from batchverify.runtime.devices import available_cpus, resolve_device, resolve_runtime

log = logging.getLogger(__name__)

# Pictures whose candidates are in memory at once.
DETECT_GROUP = 16
DETECT_PIXELS = 8_000_000


@dataclass(frozen=True)
class Embedded:
    """What an `Embedder` makes of N pictures, row by row.

    vectors: (N, 512) float32, unit rows, zero where skipped. boxes: (N, 4) float32, x0 y0 x1 y1 in pixels
    of the picture. confidence: (N,) float32. faces: (N,) int16, how many were found. skipped: N entries,
    None where there is a vector.
    """

    vectors: np.ndarray
    boxes: np.ndarray
    confidence: np.ndarray
    faces: np.ndarray
    skipped: list[Skipped | None]

    def __len__(self) -> int:
        return len(self.skipped)


class Embedder:
    """Build once, call many times, from any thread: `Embedder()(pictures)`.

    On a CPU the networks run in OpenVINO (`cpu_network.py`), on a GPU or without OpenVINO in torch (`forward.py`),
    always in batches of one fixed shape: a vector does not depend on its neighbours. In torch on a CPU its last bits
    depend on the batch size and the number of threads, in OpenVINO on neither.
    dtype: what the backbone computes in: `auto`, `float32`, `bfloat16`, `int8` (OpenVINO) or `float16` (torch).
    workers: threads that will call at once; threads: CPUs for each of them, by default all CPUs shared out.
    Raises `UsageError` for settings that make no sense, `ArtifactError` for weights that do not fit.
    """

    def __init__(
        self,
        backbone: str | Path | Backbone = PACKAGED,
        *,
        crop: str = "detect",
        margin: int = DEFAULT_MARGIN,
        tta: str = "none",
        face: str = "center",
        min_face: int | None = None,
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
        self.settings = EmbeddingSettings(crop, margin, tta, face=face, min_face=min_face)
        self.device = resolve_device(device)
        self.runtime = resolve_runtime(runtime, self.device)
        if not isinstance(backbone, Backbone):
            backbone = load_backbone(str(backbone), Path(weights) if weights else None)
        self.fingerprint = EmbeddingFingerprint.of(backbone.fingerprint, self.settings)
        cpus = threads or max(1, available_cpus() // workers)
        options: dict[str, Any] = {"dtype": dtype, "flip": tta == "flip", "batch_size": batch_size}
        self._network: Any
        if self.runtime == "openvino":
            from batchverify.embedding.cpu_network import CpuNetwork

            self._network = CpuNetwork(backbone, streams=workers, threads=cpus, **options)
        else:
            from batchverify.embedding.forward import TorchNetwork

            self._network = TorchNetwork(backbone, self.device, threads=threads, **options)
        self._detector = (
            FaceDetector.on(self.device, self.runtime, min_face=min_face, threads=cpus)
            if crop == "detect"
            else None
        )
        self._starting = {"start": time.perf_counter() - started}
        log.info("embedding on %s", self.compute_path)

    def start_seconds(self) -> dict[str, float]:
        """The seconds that building took, as a stage: the first time it is asked for, nothing afterwards."""
        starting, self._starting = self._starting, {}
        return starting

    @property
    def batch_size(self) -> int:
        """Faces in a batch; on a GPU without memory it falls."""
        return int(self._network.batch_size)

    @property
    def compute_path(self) -> ComputePath:
        """Device, dtype, runtime and batch size."""
        return ComputePath(self.device, self._network.dtype, self.runtime, self.batch_size)

    def __call__(self, pictures: Sequence[np.ndarray]) -> Embedded:
        """Embed pictures, each (H, W, 3) uint8 RGB, upright, of any size; `UsageError` for other arrays."""
        for index, picture in enumerate(pictures):
            if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or not picture.size:
                raise UsageError(
                    f"picture {index}: must be (H, W, 3) uint8 RGB, got {picture.shape} {picture.dtype}"
                )
        return self.embed_faces(self.find_faces(pictures))

    def find_faces(self, pictures: Sequence[np.ndarray]) -> list[Face | Skipped]:
        """Crop one face from each (H, W, 3) uint8 RGB picture, or say why there is none."""
        if self._detector is None:
            return [fixed_face(picture, self.settings.crop) for picture in pictures]
        faces: list[Face | Skipped] = []
        for group in _groups(pictures):
            smaller = [reduced(picture) for picture in group]
            found = self._detected(self._detector, smaller)
            faces += [self._chosen(*each) for each in zip(group, smaller, found, strict=True)]
        return faces

    def _detected(self, detector: FaceDetector, pictures: list[np.ndarray]) -> list[Detections]:
        """All faces of some pictures, in smaller blocks where a GPU's memory is short."""
        if self.runtime == "openvino":
            return detector(pictures)

        def detect() -> list[Detections]:
            with self._network.computing():
                return detector(pictures, blocks)

        blocks = detector.blocks
        while (found := self._network.within_memory(detect)) is None:
            if blocks.smallest:
                raise BatchverifyError(f"{self.device}: no memory to find a face")
            blocks = blocks.halved()
        return list(found)

    def embed_faces(self, faces: Sequence[Face | Skipped]) -> Embedded:
        """Embed cropped faces; what was skipped before stays skipped, in its place."""
        count = len(faces)
        whole = Embedded(
            np.zeros((count, DIMENSION), np.float32),
            np.zeros((count, 4), np.float32),
            np.full(count, np.nan, np.float32),
            np.zeros(count, np.int16),
            [face if isinstance(face, Skipped) else None for face in faces],
        )
        kept = [(row, face) for row, face in enumerate(faces) if isinstance(face, Face)]
        for row, face in kept:
            whole.boxes[row], whole.confidence[row], whole.faces[row] = face.box, face.confidence, face.faces
        if kept:
            pixels = np.stack([face.pixels for _, face in kept])
            whole.vectors[[row for row, _ in kept]] = self.vectors(pixels)
        return whole

    def vectors(self, pixels: np.ndarray) -> np.ndarray:
        """The backbone alone: (N, 160, 160, 3) uint8 RGB faces to (N, 512) float32 unit rows.

        Raises `BatchverifyError` where the number type overflows: never a vector that is no number.
        """
        rows: np.ndarray = self._network.vectors(pixels)
        return rows

    def _chosen(self, picture: np.ndarray, smaller: np.ndarray, found: Detections) -> Face | Skipped:
        nothing = Skipped(Reason.NO_FACE, "the detector found no face")
        if not len(found):
            return nothing
        height, width = smaller.shape[:2]
        index = choose_face(found, height, width, self.settings.face)
        scale = max(picture.shape[:2]) / max(height, width)
        x0, y0, x1, y1 = (float(value) * scale for value in found.boxes[index])
        score = float(found.scores[index])
        return box_face(picture, (x0, y0, x1, y1), self.settings.margin, score, len(found)) or nothing


def _groups(pictures: Sequence[np.ndarray]) -> Iterator[list[np.ndarray]]:
    """Pictures whose tables of sums are in memory at once: some, and of large ones few."""
    group: list[np.ndarray] = []
    for picture in pictures:
        if group and (
            len(group) == DETECT_GROUP or sum(map(_table_pixels, (*group, picture))) > DETECT_PIXELS
        ):
            yield group
            group = []
        group.append(picture)
    if group:
        yield group


def _table_pixels(picture: np.ndarray) -> int:
    height, width = picture.shape[:2]
    shrink = min(1.0, DETECT_SIDE / max(height, width))
    return int(height * width * shrink * shrink)
