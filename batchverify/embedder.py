"""Pictures in, unit vectors and reasons out: the detector and the backbone behind one call."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from threading import local
from typing import Any

import numpy as np
import torch
from PIL import Image

from batchverify.backbones import DIMENSION, PACKAGED, Backbone, build_network, fold_batch_norm, load_backbone
from batchverify.crops import FACE_SIZE, Face, box_face, fixed_face
from batchverify.detection import Detections, FaceDetector, choose_face
from batchverify.errors import BatchverifyError, UsageError
from batchverify.fingerprint import DEFAULT_MARGIN, DETECT_SIDE, EmbeddingFingerprint, EmbeddingSettings
from batchverify.fused import can_fuse, fuse
from batchverify.records import Reason, Skipped

log = logging.getLogger(__name__)

# Measured on two-core machines: 32 is the fastest CPU batch in bf16, and a small one to pad.
CPU_BATCH = 32
# A chunk's images: larger batches would be padded.
GPU_BATCH = 128
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


def resolve_device(device: str) -> str:
    """`auto`, `cpu` or `cuda` (`cuda:1`) to a device that is here.

    Raises `UsageError` for another word and for a GPU that is absent.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise UsageError(f"--device must be auto, cpu, cuda or cuda:N, got '{device}'")
    number = int(device.partition(":")[2] or 0)
    if device != "cpu" and number >= torch.cuda.device_count():
        raise UsageError(
            f"--device {device}: this machine has no such CUDA device that torch {torch.__version__} can use"
        )
    return device


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware (AVX512-BF16 or AMX)."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf8")
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


class Embedder:
    """Build once, call many times: `Embedder()(pictures)`.

    The backbone runs folded, channels last, in bfloat16 where the CPU has it (float16 on a GPU, else
    float32), always in batches of one fixed shape: a vector does not depend on its neighbours. In float32
    with batches below 32 its last bit depends on torch's number of threads.
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
        self.batch_size = batch_size or (GPU_BATCH if self.device.startswith("cuda") else CPU_BATCH)
        if not isinstance(backbone, Backbone):
            backbone = load_backbone(str(backbone), Path(weights) if weights else None)
        self.fingerprint = EmbeddingFingerprint.of(backbone.fingerprint, self.settings)
        self._dtype = _number_class(numbers, self.device)
        network = fold_batch_norm(build_network(backbone))
        self.path = "fused" if can_fuse(self.device, self._dtype) else "eager"
        if self.path == "fused":
            network = fuse(network, self._dtype)
        network = network.to(self.device, self._dtype)
        self._network = network.to(memory_format=torch.channels_last)
        self._detector = FaceDetector(min_face=min_face, device=self.device) if crop == "detect" else None
        self._streams = local()
        if self.device != "cpu":
            # Threads work on streams of their own; what is not there yet must not be used by them.
            torch.cuda.synchronize(self.device)
        self._starting = {"start": time.perf_counter() - started}
        log.info("embedding on %s: %s", self.compute_path, self._reason(numbers))

    def start_seconds(self) -> dict[str, float]:
        """The seconds that building took, as a stage: the first time it is asked for, nothing afterwards."""
        starting, self._starting = self._starting, {}
        return starting

    def _reason(self, numbers: str) -> str:
        """Why this path, for people."""
        kind = str(self._dtype).removeprefix("torch.")
        here = (
            "that is the fastest that this device multiplies in hardware" if numbers == "auto" else "as asked"
        )
        calls = "one oneDNN call a layer, no compiler needed" if self.path == "fused" else "torch's own calls"
        return f"{kind}, {here}; {calls}"

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
            reduced = [_reduced(picture) for picture in group]
            with self._stream():
                found = self._detector(reduced)
            faces += [self._chosen(*each) for each in zip(group, reduced, found, strict=True)]
        return faces

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
            try:
                rows.append(self._batch(pixels[done : done + self.batch_size]))
            except torch.cuda.OutOfMemoryError as exc:
                self._shrink(exc)
                continue
            done += len(rows[-1])
        return np.concatenate(rows) if rows else np.zeros((0, DIMENSION), np.float32)

    def _shrink(self, exc: Exception) -> None:
        """Halve the batch after the GPU ran out of memory; `BatchverifyError` where one face is too much."""
        if self.batch_size == 1:
            raise BatchverifyError(f"{self.device}: no memory for a single face: {exc}") from exc
        self.batch_size //= 2
        torch.cuda.empty_cache()
        log.warning("%s: out of memory; going on with batches of %d faces", self.device, self.batch_size)

    def _batch(self, pixels: np.ndarray) -> np.ndarray:
        """One batch, padded to the fixed shape; a GPU gets bytes, from memory that it copies by itself."""
        full = torch.zeros(
            self.batch_size, FACE_SIZE, FACE_SIZE, 3, dtype=torch.uint8, pin_memory=self.device != "cpu"
        )
        full.numpy()[: len(pixels)] = pixels
        with self._stream():
            inputs = full.to(self.device, non_blocking=True).permute(0, 3, 1, 2)  # (B, 3, 160, 160)
            inputs = inputs.float().sub_(127.5).div_(128).to(self._dtype)
            vectors = self._network(inputs).float()
            if self.settings.tta == "flip":
                vectors = vectors + self._network(inputs.flip(3)).float()
            rows = torch.nn.functional.normalize(vectors).cpu().numpy()[: len(pixels)]
        if not np.isfinite(rows).all():
            raise BatchverifyError(f"the backbone gave vectors that are not finite ({self.compute_path})")
        return rows

    def _stream(self) -> AbstractContextManager[Any]:
        """This thread's own stream on a GPU: its copies and small kernels hide behind another thread's work."""
        if self.device == "cpu":
            return nullcontext()
        if not hasattr(self._streams, "own"):
            self._streams.own = torch.cuda.Stream(self.device)
        return torch.cuda.stream(self._streams.own)

    def _chosen(self, picture: np.ndarray, reduced: np.ndarray, found: Detections) -> Face | Skipped:
        nothing = Skipped(Reason.NO_FACE, "the detector found no face")
        if not len(found):
            return nothing
        height, width = reduced.shape[:2]
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


def _reduced(picture: np.ndarray) -> np.ndarray:
    """The picture that faces are searched for in: (H, W, 3), the longer side at most `DETECT_SIDE`."""
    height, width = picture.shape[:2]
    shrink = DETECT_SIDE / max(height, width)
    if shrink >= 1:
        return picture
    size = max(1, round(width * shrink)), max(1, round(height * shrink))
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0))


def _number_class(numbers: str, device: str) -> torch.dtype:
    if numbers == "auto":
        if device.startswith("cuda"):
            return torch.float16
        return torch.bfloat16 if cpu_has_bf16() else torch.float32
    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if numbers not in kinds:
        raise UsageError(f"numbers must be auto, {' or '.join(kinds)}, got '{numbers}'")
    return kinds[numbers]
