"""The pair head: two embeddings to the probability that they show two people, and its artifact."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from batchverify.errors import ArtifactError, UsageError
from batchverify.fingerprint import EmbeddingFingerprint
from batchverify.heads.features import product
from batchverify.heads.scorer import Scorer, from_tensors, to_tensors
from batchverify.kernels.distances import distances
from batchverify.storage.location import Location

if TYPE_CHECKING:
    import torch

METADATA_KEY = "batchverify"
FORMAT = 2
# What reading JSON of any shape, and numbers of any size, can raise.
MALFORMED = (LookupError, ValueError, TypeError, OverflowError, RecursionError)
# Pairs per block, always padded to it: a pair's score does not depend on its neighbours. Measured: the
# features of larger blocks fall out of the CPU's cache.
BLOCK = 512
# Pairs whose vectors are copied together, some blocks of the head: more would leave the CPU's cache again. As
# many distances are scored together.
GATHERED = 4096


@dataclass(frozen=True)
class Head:
    """One scorer or an ensemble of them, with a calibrated slope.

    scorers: the logit is the mean of theirs. calibration: slope and offset of that logit. about: the
    artifact's metadata, among them `embedding` (the fingerprint it was trained for) and `thresholds`.
    """

    scorers: tuple[Scorer, ...]
    calibration: tuple[float, float] = (1.0, 0.0)
    about: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Score N pairs of (N, 512) float16 or float32 embeddings.

        Returns (probability, similarity), each (N,) float32: P(different) and the cosine.
        Raises `UsageError` for arrays of other shapes.
        """
        if a.shape != b.shape or a.ndim != 2 or a.shape[1] != self.dimension:
            raise UsageError(f"the head takes two arrays (N, {self.dimension}), got {a.shape} and {b.shape}")
        if not self.needs_torch:
            return self._of_distances(*distances(a, b, *[np.arange(len(a))] * 2))
        import torch

        with torch.inference_mode():
            return self._of_vectors(a, b)

    def _of_vectors(self, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        import torch

        probability, similarity = np.empty(len(a), np.float32), np.empty(len(a), np.float32)
        left, right = torch.zeros(2, BLOCK, self.dimension).unbind()
        for start in range(0, len(a), BLOCK):
            rows = slice(start, start + BLOCK)
            count = len(a[rows])
            left[:count].copy_(_tensor(a[rows]))
            right[:count].copy_(_tensor(b[rows]))
            logits = [scorer.logits(left, right) for scorer in self.scorers]
            logit = torch.stack(logits).mean(dim=0) if len(logits) > 1 else logits[0]
            slope, offset = self.calibration
            probability[rows] = logit.mul_(slope).add_(offset).sigmoid_()[:count].numpy()
            similarity[rows] = product(left, right).sum(dim=1)[:count].numpy()
        return probability, similarity

    def score_pairs(self, vectors: np.ndarray, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The same of (N,) int64 indices into (M, 512) embeddings."""
        if not self.needs_torch:
            return self._of_distances(*distances(vectors, vectors, a, b))
        probability, similarity = np.empty(len(a), np.float32), np.empty(len(a), np.float32)
        for start in range(0, len(a), GATHERED):
            rows = slice(start, start + GATHERED)
            probability[rows], similarity[rows] = self(vectors[a[rows]], vectors[b[rows]])
        return probability, similarity

    @cached_property
    def needs_torch(self) -> bool:
        """Whether it is more than a line over the chi-square distance or the cosine, as the default heads are."""
        return any(
            scorer.features not in ("chi2sum", "cosine") or len(scorer.layers) > 1 for scorer in self.scorers
        )

    def _of_distances(self, chi_square: np.ndarray, cosine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The same of distances (N,) float32, without torch, whose import takes longer than many runs."""
        found = {"chi2sum": chi_square, "cosine": cosine}
        logits = [scorer.of_distances(found[scorer.features]) for scorer in self.scorers]
        logit = sum(logits[1:], logits[0]) / np.float32(len(logits))
        slope, offset = (np.float32(each) for each in self.calibration)
        # Where the exponential overflows, the probability is 0, as it should be.
        with np.errstate(over="ignore"):
            return 1 / (1 + np.exp(-(logit * slope + offset))), cosine

    @property
    def dimension(self) -> int:
        """Numbers in an embedding."""
        return int(self.about["embedding"]["dimension"])

    @property
    def parameters(self) -> int:
        """Numbers that were fitted, the calibration's two among them."""
        return sum(scorer.parameters for scorer in self.scorers) + len(self.calibration)

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
        """The threshold of a run: given, or stored at a false accept rate, or that of best expected F1."""
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
            "members": [scorer.about() for scorer in self.scorers],
            "calibration": {
                **self.about.get("calibration", {}),
                "slope": self.calibration[0],
                "offset": self.calibration[1],
            },
        }
        metadata = {METADATA_KEY: json.dumps(about, sort_keys=True)}
        return save(to_tensors(self.scorers), metadata=metadata)

    @classmethod
    def load(cls, location: str | Path | Location) -> Head:
        """Read an artifact from a path or URI; `ArtifactError` for a file that is no head."""
        place = location if isinstance(location, Location) else Location.parse(str(location))
        try:
            data = place.read_bytes()
        except OSError as exc:
            raise ArtifactError(f"{place}: the head cannot be read: {exc}") from exc
        return cls.from_bytes(data, str(place))

    @classmethod
    def from_bytes(cls, data: bytes, name: str) -> Head:
        """Parse an artifact; `name` stands in errors."""
        from safetensors import SafetensorError
        from safetensors.numpy import load

        try:
            tensors = load(data)
            about = json.loads(_metadata(data))
            if about["format"] != FORMAT:
                raise ArtifactError(
                    f"{name}: a head of format {about['format']} (batchverify {about['version']}); this one "
                    f"reads format {FORMAT}: train it again"
                )
            scorers = from_tensors(tensors, about["members"])
            calibration = (float(about["calibration"]["slope"]), float(about["calibration"]["offset"]))
            _check(scorers, calibration, about)
        except (SafetensorError, UsageError, *MALFORMED) as exc:
            if isinstance(exc, ArtifactError):
                raise
            reason = f"it has no {exc}" if isinstance(exc, KeyError) else exc
            raise ArtifactError(f"{name}: not a head of batchverify: {reason}") from exc
        return cls(scorers, calibration, about)


def default_head(embedding: EmbeddingFingerprint) -> Head:
    """The shipped head for these embeddings; `ArtifactError` when there is none."""
    path = Path(str(files("batchverify.heads") / "weights" / default_head_name(embedding)))
    if not path.is_file():
        raise ArtifactError(
            "no head is shipped for these settings (backbone, crop, margin, tta): give one with --head; "
            "`batchverify train` fits one to labelled pairs"
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


def _tensor(rows: np.ndarray) -> torch.Tensor:
    """The same memory as a tensor; copied where it is read-only, since a tensor could write to it, or strided."""
    import torch

    return torch.from_numpy(rows if rows.flags.writeable and rows.flags.c_contiguous else rows.copy())


def _metadata(data: bytes) -> str:
    """The JSON in a safetensors header: 8 bytes of length, then the header."""
    length = int.from_bytes(data[:8], "little")
    return str(json.loads(data[8 : 8 + length])["__metadata__"][METADATA_KEY])


def _check(scorers: Sequence[Scorer], calibration: tuple[float, float], about: Mapping[str, Any]) -> None:
    """Look at everything that a run will ask of a head: it fails when it is read or not at all."""
    if not scorers:
        raise ValueError("it has no scorers")
    for scorer in scorers:
        scorer.check(int(about["embedding"]["dimension"]))
    stored = about["thresholds"]
    rates = [(float(each["far"]), float(each["threshold"])) for each in stored["far"]]
    numbers = [*calibration, float(stored["best_f1"]), int(stored["different_pairs"]), *sum(rates, ())]
    # As float32, which they are used in.
    if not (np.abs(numbers) < 1e38).all():
        raise ValueError("its calibration or thresholds are not finite")
    if not all(0 <= each <= 1 for each in (float(stored["best_f1"]), *sum(rates, ()))):
        raise ValueError("its thresholds do not lie between 0 and 1")
