"""The detectors by name: what all of them can do, and how one is built."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from batchverify.faces.detection import BatchSizes, Detections, FaceDetector
from batchverify.faces.retinaface import RetinaFaceDetector
from batchverify.fingerprint import EmbeddingSettings


class Detector(Protocol):
    """Finds the faces of images, for any number of threads. group: images that it is best given at once."""

    blocks: BatchSizes
    group: int

    def __call__(self, images: Sequence[np.ndarray], blocks: BatchSizes | None = None) -> list[Detections]:
        """The faces of each (H, W, 3) uint8 RGB image of any size. blocks: smaller ones than its own."""


def build_detector(
    settings: EmbeddingSettings, device: str, runtime: str, *, threads: int = 1, dtype: str = "float32"
) -> Detector | None:
    """The detector of some settings on a resolved device and runtime; None for crops that need none.

    With OpenVINO, threads: CPUs for each calling thread; dtype: of the backbone, one of `cpu_network.DTYPES`.
    """
    if not settings.detects:
        return None
    if settings.detector == "retinaface":
        bfloat16 = dtype.endswith("bfloat16")
        return RetinaFaceDetector.on(device, runtime, min_face=settings.min_face, threads=threads, bfloat16=bfloat16)
    return FaceDetector.on(device, runtime, min_face=settings.min_face, threads=threads)


def loops_of(settings: EmbeddingSettings) -> tuple[str, ...]:
    """The names of the loops of `kernels.loops` that crop faces by these settings."""
    if not settings.detects:
        return ()
    detecting = ("suppress",) if settings.detector == "retinaface" else ("integrate", "resample", "suppress")
    return (*detecting, "warp") if settings.crop == "align" else detecting
