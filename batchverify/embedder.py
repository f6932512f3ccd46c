"""Pictures in, unit vectors and reasons out: the detector and the backbone behind one call."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Lock, local
from typing import Any, TypeVar

import numpy as np
import torch

from batchverify.backbones import DIMENSION, PACKAGED, Backbone, build_network, fold_batch_norm, load_backbone
from batchverify.crops import Face, box_face, fixed_face
from batchverify.detection import Detections, FaceDetector, choose_face, reduced
from batchverify.devices import full_float32, number_class, resolve_device
from batchverify.errors import BatchverifyError, UsageError
from batchverify.fingerprint import DEFAULT_MARGIN, DETECT_SIDE, EmbeddingFingerprint, EmbeddingSettings
from batchverify.forward import Forward, GpuForward, Pass, faces_per_second, fastest_size, is_out_of_memory
from batchverify.fused import fuse, kind_of_network
from batchverify.records import Reason, Skipped

log = logging.getLogger(__name__)

# Measured on two-core machines: 32 is the fastest CPU batch in bf16, and a small one to pad.
CPU_BATCH = 32
# Tried in this order; the largest is `engine.GPU_CHUNK`: larger ones would be padded.
GPU_BATCHES = (128, 256, 512)
# Pictures whose candidates are in memory at once.
DETECT_GROUP = 16
DETECT_PIXELS = 8_000_000

Found = TypeVar("Found")


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
    """Build once, call many times: `Embedder()(pictures)`.

    The backbone runs folded, channels last, in bfloat16 where the device multiplies it (else float16 on a
    GPU, float32 on a CPU), always in batches of one fixed shape: a vector does not depend on its neighbours.
    In float32 with batches below 32 its last bit depends on torch's number of threads. On a GPU the batch is
    found by trying and halved where memory runs out.
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
        batch_size: int | None = None,
        numbers: str = "auto",
    ) -> None:
        if batch_size is not None and batch_size < 1:
            raise UsageError(f"batch_size must be at least 1, got {batch_size}")
        started = time.perf_counter()
        self.settings = EmbeddingSettings(crop, margin, tta, face=face, min_face=min_face)
        self.device = resolve_device(device)
        if not isinstance(backbone, Backbone):
            backbone = load_backbone(str(backbone), Path(weights) if weights else None)
        self.fingerprint = EmbeddingFingerprint.of(backbone.fingerprint, self.settings)
        self._dtype = number_class(numbers, self.device)
        network = fold_batch_norm(build_network(backbone))
        self.path = kind_of_network(self.device, self._dtype)
        if self.path != "eager":
            network = fuse(network, self._dtype)
        network = network.to(self.device, self._dtype)
        self._network = network.to(memory_format=torch.channels_last)
        self._detector = FaceDetector(min_face=min_face, device=self.device) if crop == "detect" else None
        self._of_thread, self._shrinking = local(), Lock()
        if self.on_gpu:
            full_float32()
            # Threads work on streams of their own; what is not there yet must not be used by them.
            torch.cuda.synchronize(self.device)
        self.batch_size = batch_size or self._best_batch()
        self._starting = {"start": time.perf_counter() - started}
        log.info("embedding on %s", self.compute_path)

    def start_seconds(self) -> dict[str, float]:
        """The seconds that building took, as a stage: the first time it is asked for, nothing afterwards."""
        starting, self._starting = self._starting, {}
        return starting

    @property
    def on_gpu(self) -> bool:
        """Whether the device is one."""
        return self.device != "cpu"

    @torch.inference_mode()
    def _best_batch(self) -> int:
        if not self.on_gpu:
            return CPU_BATCH
        best = fastest_size(GPU_BATCHES, lambda size: faces_per_second(GpuForward(self._pass, size)))
        torch.cuda.empty_cache()
        return best

    @property
    def compute_path(self) -> str:
        """Device, number format and batch shape, as they stand in the run record."""
        numbers = str(self._dtype).removeprefix("torch.")
        return f"{self.device} {numbers} {self.path}, batches of {self.batch_size}"

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

        def detect() -> list[Detections]:
            with self._stream():
                return detector(pictures, blocks)

        blocks = detector.blocks
        while (found := self._within_memory(detect)) is None:
            if blocks.smallest:
                raise BatchverifyError(f"{self.device}: no memory to find a face")
            blocks = blocks.halved()
        return found

    def _stream(self) -> AbstractContextManager[Any]:
        """This thread's own stream on a GPU: its copies and small kernels hide behind another thread's work."""
        if not self.on_gpu:
            return nullcontext()
        if not hasattr(self._of_thread, "stream"):
            self._of_thread.stream = torch.cuda.Stream(self.device)
        return torch.cuda.stream(self._of_thread.stream)

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

    @torch.inference_mode()
    def vectors(self, pixels: np.ndarray) -> np.ndarray:
        """The backbone alone: (N, 160, 160, 3) uint8 RGB faces to (N, 512) float32 unit rows.

        Raises `BatchverifyError` where the number format overflows: never a vector that is no number.
        """
        rows: list[np.ndarray] = []
        done = 0
        while done < len(pixels):
            size = self.batch_size
            found = self._within_memory(partial(self._batch, size, pixels[done : done + size]))
            if found is None:
                self._shrink(size)
                continue
            rows.append(found)
            done += len(found)
        return np.concatenate(rows) if rows else np.zeros((0, DIMENSION), np.float32)

    def _within_memory(self, work: Callable[[], Found]) -> Found | None:
        """What the work gives; None, all that it held being free again, where a GPU's memory was too small."""
        try:
            return work()
        except RuntimeError as exc:
            if not is_out_of_memory(exc):
                raise
            log.info("%s: %s", self.device, exc)
        self._of_thread.forward = None
        torch.cuda.empty_cache()
        return None

    def _shrink(self, size: int) -> None:
        """Halve the batch that was too large, unless another thread has; `BatchverifyError` where it was one face."""
        with self._shrinking:
            if self.batch_size < size:
                return
            if size == 1:
                raise BatchverifyError(f"{self.device}: no memory for a single face")
            self.batch_size = size // 2
        log.warning("%s: out of memory; going on with batches of %d faces", self.device, self.batch_size)

    def _batch(self, size: int, pixels: np.ndarray) -> np.ndarray:
        rows = self._forward(size)(pixels)
        if not np.isfinite(rows).all():
            raise BatchverifyError(f"the backbone gave vectors that are not finite ({self.compute_path})")
        return rows

    def _forward(self, size: int) -> Forward:
        """The forward pass at a batch size; on a GPU this thread's own."""
        if not self.on_gpu:
            return Forward(self._pass, size)
        kept: Forward | None = getattr(self._of_thread, "forward", None)
        if kept is None or kept.size != size:
            # The old one's memory first.
            self._of_thread.forward = kept = None
            self._of_thread.forward = kept = GpuForward(self._pass, size)
        return kept

    @property
    def _pass(self) -> Pass:
        return Pass(self._network, self.device, self._dtype, self.settings.tta == "flip")

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
