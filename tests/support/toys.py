"""Small real classes at the seams: an embedder that counts its calls, and pictures that kill or fail."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from batchverify.embedding.embedder import Embedded
from batchverify.engine.base import WorkPlan
from batchverify.engine.stages import LoadPlan
from batchverify.fingerprint import EmbeddingFingerprint, EmbeddingSettings
from batchverify.records import Skipped
from batchverify.runtime.compute_path import ComputePath

POISON = (255, 0, 0)
SLEEP = (0, 0, 255)


class ToyEmbedder:
    """Vectors from the mean colour; each face embedded is a line of `log`.

    A red face kills the process, a blue one hangs it. pause: seconds that a chunk takes.
    """

    compute_path = ComputePath("toy")

    def __init__(self, log: Path, pause: float = 0.0) -> None:
        self._log, self._pause = log, pause

    def start_seconds(self) -> dict[str, float]:
        """Nothing to build."""
        return {}

    def find_faces(self, pictures: Sequence[np.ndarray]) -> list:
        """Never asked with pictures: the toy plan cuts no faces."""
        return [None] * len(pictures)

    def embed_faces(self, faces: Sequence) -> Embedded:
        """One unit vector a face."""
        count = len(faces)
        time.sleep(self._pause)
        means = np.array([face.pixels.mean(axis=(0, 1)) for face in faces])
        if (np.abs(means - SLEEP).max(axis=1) < 3).any():
            time.sleep(3600)
        if (np.abs(means - POISON).max(axis=1) < 3).any():
            os._exit(1)
        with self._log.open("a") as file:
            file.writelines(f"{mean.round(1).tolist()}\n" for mean in means)
        vectors = np.zeros((count, 512), np.float32)
        vectors[:, :3] = means + 1
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        boxes = np.array([face.box for face in faces], np.float32)
        skipped: list[Skipped | None] = [None] * count
        return Embedded(vectors, boxes, np.ones(count, np.float32), np.ones(count, np.int16), skipped)


@dataclass(frozen=True)
class ToyPlan(WorkPlan):
    """A work plan whose workers build the toy."""

    log: str = ""
    pause: float = 0.0

    def embedder(self, workers: int = 1, threads: int | None = None) -> ToyEmbedder:
        """The toy that logs to `log`."""
        return ToyEmbedder(Path(self.log), self.pause)

    def count(self) -> int:
        """How many faces were embedded so far, by all workers."""
        log = Path(self.log)
        return len(log.read_text().splitlines()) if log.exists() else 0


def toy_plan(folder: Path, *, cache: bool = True) -> ToyPlan:
    """A plan with the whole picture as crop, its cache and log below `folder`."""
    settings = EmbeddingSettings(crop="none")
    fingerprint = EmbeddingFingerprint.of("70" * 32, settings)
    load = LoadPlan(settings, fingerprint, cache=str(folder / "cache") if cache else None)
    return ToyPlan(load, "toy", log=str(folder / "embedded.log"))


def draw(path: Path, colour: tuple[int, int, int]) -> str:
    """A picture of one colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (32, 32), colour).save(path, "PNG")
    return str(path)


def colour(number: int) -> tuple[int, int, int]:
    """A colour of its own for each number below 60,000, never near the poison."""
    return (10 + number % 40 * 4, 10 + number // 40 % 50 * 4, 10 + number // 2000 * 4)
