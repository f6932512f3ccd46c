"""The pair head: two embeddings to the probability that they show two people, and its artifact."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch

from batchverify.errors import ArtifactError, UsageError
from batchverify.features import FEATURES, cosine
from batchverify.fingerprint import EmbeddingFingerprint
from batchverify.locations import Location

METADATA_KEY = "batchverify"
FORMAT = 1
# Pairs per block, always padded to it: a pair's score does not depend on its neighbours.
BLOCK = 1024


@dataclass(frozen=True)
class Head:
    """A linear head on pair features with a calibrated slope.

    feature: a name of `features.FEATURES`. weights: (F,) float32. bias: the linear layer's.
    calibration: slope and offset of the logit. about: the artifact's metadata, among them
    `embedding` (the fingerprint it was trained for) and `thresholds`.
    """

    feature: str
    weights: np.ndarray
    bias: float
    calibration: tuple[float, float] = (1.0, 0.0)
    about: Mapping[str, Any] = field(default_factory=dict)

    @torch.inference_mode()
    def __call__(self, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Score N pairs of (N, 512) float16 or float32 embeddings.

        Returns (probability, similarity), each (N,) float32: P(different) and the cosine.
        Raises `UsageError` for arrays of other shapes.
        """
        if a.shape != b.shape or a.shape[1:] != self.weights.shape:
            raise UsageError(
                f"the head takes two arrays (N, {len(self.weights)}), got {a.shape} and {b.shape}"
            )
        probability, similarity = np.empty(len(a), np.float32), np.empty(len(a), np.float32)
        for start in range(0, len(a), BLOCK):
            rows = slice(start, start + BLOCK)
            scores = self._block(_padded(a[rows]), _padded(b[rows]))
            count = len(a[rows])
            probability[rows], similarity[rows] = (each[:count].numpy() for each in scores)
        return probability, similarity

    def _block(self, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        terms = FEATURES[self.feature](a, b)  # (B, F)
        slope, offset = self.calibration
        logit = (terms * self._weights).sum(dim=1) + self.bias
        return torch.sigmoid(slope * logit + offset), cosine(a, b)

    @cached_property
    def _weights(self) -> torch.Tensor:
        return torch.from_numpy(self.weights)

    @cached_property
    def embedding(self) -> EmbeddingFingerprint:
        """The embeddings that this head was trained for."""
        return EmbeddingFingerprint(self.about["embedding"])

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the artifact's bytes, in hex: the head's identity in the run record."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def check(self, embedding: EmbeddingFingerprint) -> None:
        """Refuse embeddings of another fingerprint with an `ArtifactError` that says what differs."""
        if self.embedding.id != embedding.id:
            raise ArtifactError(
                f"the head was trained for other embeddings: {self.embedding.difference(embedding)} "
                "(the head's against this run's); give a head for these settings with --head"
            )

    def threshold(self, threshold: float | None = None, at_far: float | None = None) -> float:
        """The threshold of a run: given, or stored at a false accept rate, or the one of best F1 on dev."""
        if threshold is not None and at_far is not None:
            raise UsageError("--threshold and --at-far exclude each other")
        if threshold is not None:
            if not 0 <= threshold <= 1:
                raise UsageError(f"--threshold must lie between 0 and 1, got {threshold}")
            return threshold
        stored = self.about["thresholds"]
        if at_far is None:
            return float(stored["best_f1"])
        for entry in stored["far"]:
            if entry["far"] == at_far:
                return float(entry["threshold"])
        rates = ", ".join(f"{entry['far']:g}" for entry in stored["far"]) or "none"
        raise UsageError(
            f"--at-far {at_far:g}: the head stores no threshold for this rate; its "
            f"{stored['different_pairs']:,} different pairs support: {rates}"
        )

    def to_bytes(self) -> bytes:
        """The artifact: one safetensors file, the same bytes for the same head."""
        from safetensors.numpy import save

        about = {
            **self.about,
            "format": FORMAT,
            "feature": self.feature,
            "layers": [len(self.weights), 1],
            "calibration": {"slope": self.calibration[0], "offset": self.calibration[1]},
        }
        tensors = {"weights": self.weights, "bias": np.array([self.bias], np.float32)}
        return save(tensors, metadata={METADATA_KEY: json.dumps(about, sort_keys=True)})

    @classmethod
    def load(cls, location: str | Path | Location) -> Head:
        """Read an artifact from a path or URI; `ArtifactError` for a file that is no head."""
        place = location if isinstance(location, Location) else Location.parse(str(location))
        try:
            with place.filesystem.open_input_file(place.path) as file:
                return cls.from_bytes(file.read(), str(place))
        except OSError as exc:
            raise ArtifactError(f"{place}: the head cannot be read: {exc}") from exc

    @classmethod
    def from_bytes(cls, data: bytes, name: str) -> Head:
        """Parse an artifact; `name` stands in errors."""
        from safetensors import SafetensorError
        from safetensors.numpy import load

        try:
            tensors = load(data)
            about = json.loads(_metadata(data))
            weights, bias = np.array(tensors["weights"], np.float32), float(tensors["bias"].item())
            if about["format"] != FORMAT or about["feature"] not in FEATURES:
                raise ArtifactError(f"{name}: a head of another version of batchverify ({about['version']})")
            calibration = (float(about["calibration"]["slope"]), float(about["calibration"]["offset"]))
            _check_about(about, weights)
        except (SafetensorError, LookupError, ValueError, TypeError) as exc:
            raise ArtifactError(f"{name}: not a head of batchverify: {exc}") from exc
        if not np.isfinite([*weights, bias, *calibration]).all():
            raise ArtifactError(f"{name}: the head holds numbers that are not finite")
        return cls(about["feature"], weights, bias, calibration, about)


def default_head(embedding: EmbeddingFingerprint) -> Head:
    """The shipped head for these embeddings; `ArtifactError` when there is none."""
    path = Path(str(files("batchverify") / "weights" / default_head_name(embedding)))
    if not path.is_file():
        raise ArtifactError(
            "no head is shipped for these settings (backbone, crop, margin, tta): give one with --head; "
            "`jobs/make_heads.py` shows how one is fitted"
        )
    return Head.load(path)


def find_head(path: str | None, embedding: EmbeddingFingerprint) -> Head:
    """The head at `path`, refused for other embeddings, or without one the shipped head."""
    if path is None:
        return default_head(embedding)
    head = Head.load(path)
    head.check(embedding)
    return head


def default_head_name(embedding: EmbeddingFingerprint) -> str:
    """The shipped head's file name."""
    return f"head-{embedding.id}.safetensors"


def _padded(rows: np.ndarray) -> torch.Tensor:
    """(n, F) any float to (BLOCK, F) float32."""
    full = np.zeros((BLOCK, rows.shape[1]), np.float32)
    full[: len(rows)] = rows
    return torch.from_numpy(full)


def _metadata(data: bytes) -> str:
    """The JSON in a safetensors header: 8 bytes of length, then the header."""
    length = int.from_bytes(data[:8], "little")
    return str(json.loads(data[8 : 8 + length])["__metadata__"][METADATA_KEY])


def _check_about(about: dict[str, Any], weights: np.ndarray) -> None:
    """Look up everything that a run will ask of the metadata: a head fails when it is read or not at all."""
    if weights.shape != (about["embedding"]["dimension"],):
        raise ValueError(f"its weights are {weights.shape}, its embeddings {about['embedding']['dimension']}")
    stored = about["thresholds"]
    rates = [(float(each["far"]), float(each["threshold"])) for each in stored["far"]]
    if not np.isfinite([float(stored["best_f1"]), int(stored["different_pairs"]), *sum(rates, ())]).all():
        raise ValueError("its thresholds are not finite")
