"""What networks outside torch have in common: batches, mirrored faces, unit vectors, and a self-check."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import numpy as np
from PIL import Image

from batchverify.errors import ArtifactError, BatchverifyError, UsageError
from batchverify.fingerprint import BackboneSpec

# The lowest and the highest input of 8-bit layers, by layer.
Ranges = Mapping[str, tuple[float, float]]
# How far a number of a unit vector may move with the other faces of its batch, and how far apart those of two
# different faces are at least.
LARGEST_INFLUENCE = 2e-3
LEAST_DIFFERENCE = 1e-4


class Network(ABC):
    """(N, S, S, 3) uint8 RGB faces to (N, D) float32 unit rows, from any thread.

    All batches have one shape, so that a vector depends neither on its neighbours nor on the number of threads.
    dtype, runtime: what computes, as in `ComputePath`.
    """

    runtime = ""

    def __init__(self, spec: BackboneSpec, dtype: str, batch_size: int, flip: bool) -> None:
        self.spec, self.dtype, self.batch_size, self.flip = spec, dtype, batch_size, flip

    @abstractmethod
    def compute(self, pixels: np.ndarray) -> np.ndarray:
        """A full batch of faces, (B, S, S, 3) uint8 RGB, to (B, D) float32, of any length."""

    def vectors(self, pixels: np.ndarray) -> np.ndarray:
        """(N, S, S, 3) uint8 RGB to (N, D) float32 unit rows.

        Raises `UsageError` for other arrays, `BatchverifyError` for vectors that are not finite.
        """
        size = self.spec.size
        if pixels.dtype != np.uint8 or pixels.shape[1:] != (size, size, 3):
            raise UsageError(f"faces must be (N, {size}, {size}, 3) uint8, got {pixels.shape} {pixels.dtype}")
        rows = np.empty((len(pixels), self.spec.dimension), np.float32)
        for start in range(0, len(pixels), self.batch_size):
            batch = pixels[start : start + self.batch_size]
            rows[start : start + len(batch)] = self._batch(batch)
        return rows

    def _batch(self, pixels: np.ndarray) -> np.ndarray:
        if len(pixels) < self.batch_size:
            padded = np.zeros((self.batch_size, *pixels.shape[1:]), np.uint8)
            padded[: len(pixels)] = pixels
            return self._batch(padded)[: len(pixels)]
        vectors = self.compute(pixels)
        if self.flip:
            vectors = vectors + self.compute(pixels[:, :, ::-1])
        if not np.isfinite(vectors).all():
            raise BatchverifyError(f"the backbone gave vectors that are not finite ({self.dtype}, {self.runtime})")
        lengths = np.sqrt((vectors * vectors).sum(axis=1, keepdims=True))
        return np.asarray(vectors / np.maximum(lengths, np.float32(1e-12)))


def check_network(network: Network, name: str) -> None:
    """Try a network of another project; raise `ArtifactError` that names it if its vectors cannot be right.

    They must be finite and not zero, differ between faces, and not depend on the other faces of a batch.
    """
    faces = _blobs(network.spec.size)
    try:
        together = network.vectors(faces)
        alone = np.concatenate([network.vectors(face[None]) for face in faces])
    except BatchverifyError as exc:
        raise ArtifactError(f"{name}: its self-check failed: {exc}") from exc
    if not (np.abs(np.linalg.norm(together, axis=1) - 1) < 0.01).all():
        raise ArtifactError(f"{name}: its self-check failed: the vector of a face is zero")
    if np.abs(together[0] - together[1]).max() < LEAST_DIFFERENCE:
        raise ArtifactError(f"{name}: its self-check failed: two different faces have the same vector")
    influence = float(np.abs(together - alone).max())
    if influence > LARGEST_INFLUENCE:
        raise ArtifactError(
            f"{name}: its self-check failed: a face's vector depends on the other faces of its batch (its numbers "
            f"move by up to {influence:.2g}); --batch-size 1 computes each face alone"
        )


def _blobs(size: int) -> np.ndarray:
    """Two faces of soft blobs, (2, size, size, 3) uint8, nothing alike."""
    cells = np.random.default_rng(0).integers(0, 256, (2, 5, 5, 3)).astype(np.uint8)
    blobs = [Image.fromarray(face).resize((size, size), Image.Resampling.BILINEAR) for face in cells]
    return np.stack([np.asarray(blob) for blob in blobs])
