"""The pair head: from two embeddings to the probability that they show different people; its artifact."""

from __future__ import annotations

import hashlib
import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from batchverify.documents import MOST_METADATA, read_document
from batchverify.errors import ArtifactError, UsageError, shortened
from batchverify.fingerprint import FUSION, EmbeddingFingerprint
from batchverify.heads.bounds import UNITS, Tail, guaranteed_threshold
from batchverify.heads.centring import centred
from batchverify.heads.drift import Reference
from batchverify.heads.features import absolute_difference, product
from batchverify.heads.prior import fitted_share
from batchverify.heads.review_band import ReviewBand
from batchverify.heads.scorer import Scorer, from_tensors, to_tensors
from batchverify.kernels.loops import distances
from batchverify.runtime.devices import survive_forks
from batchverify.storage.location import Location

if TYPE_CHECKING:
    from typing_extensions import Self

log = logging.getLogger(__name__)

METADATA_KEY = "batchverify"
# The tensor of what is taken off embeddings; without it nothing is.
CENTRE = "centre"
FORMAT = 2
# Bytes of a head. Those that `train` makes by default have up to 3 MB.
MOST_BYTES = 1 << 30
MOST_DIMENSION = 65_536
# Scores are computed in float32.
LARGEST = 1e38
# Characters of a file's own text in a message.
SHOWN = 200
# What parsing JSON of any shape and numbers of any size can raise.
MALFORMED = (LookupError, ValueError, TypeError, OverflowError, RecursionError)
# Pairs per block. Blocks are padded to this size so that a pair's score does not depend on its neighbours.
# Measured: the features of larger blocks do not fit into the CPU's cache.
BLOCK = 512


class StoredHead(ABC):
    """What heads of one backbone and of several have in common: a file, and thresholds in its metadata."""

    about: Mapping[str, Any]

    @abstractmethod
    def to_bytes(self) -> bytes:
        """The artifact: one safetensors file, the same bytes for the same head."""

    @classmethod
    @abstractmethod
    def parse(cls, about: Mapping[str, Any], tensors: dict[str, np.ndarray], name: str) -> Self:
        """From an artifact's metadata and tensors. Raises `ArtifactError` or one of `MALFORMED`."""

    @classmethod
    def from_bytes(cls, data: bytes, name: str) -> Self:
        """Parse an artifact; `name` is for error messages. Raises `ArtifactError`."""
        from safetensors import SafetensorError
        from safetensors.numpy import load

        try:
            return cls.parse(read_document(read_metadata(data)), load(data), name)
        except ArtifactError:
            raise
        except (SafetensorError, UsageError, *MALFORMED) as exc:
            reason = shortened(f"it has no {exc}" if isinstance(exc, KeyError) else exc, SHOWN)
            raise ArtifactError(f"{name}: not a head of batchverify: {reason}") from exc

    @classmethod
    def load(cls, location: str | Path | Location) -> Self:
        """Read an artifact from a path or URI. Raises `ArtifactError` if it is no head of this kind."""
        location = location if isinstance(location, Location) else Location.parse(location)
        try:
            data = location.read_bytes(MOST_BYTES)
        except OSError as exc:
            raise ArtifactError(f"{location}: the head cannot be read: {exc}") from exc
        return cls.from_bytes(data, str(location))

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the artifact in hex: the head's identity in run records."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def threshold(
        self, threshold: float | None = None, at_far: float | None = None, confidence: float | None = None
    ) -> float:
        """The given threshold, or the stored one for a false accept rate, or the one of best expected F1.

        With a confidence it is the highest whose false accept rate is at most `at_far` with that confidence. Raises
        `UsageError` for a threshold outside 0 to 1, for a rate that is not stored, and for one that the pairs behind
        the head cannot promise.
        """
        stored = self.about["thresholds"]
        if threshold is not None and at_far is not None:
            raise UsageError("--threshold and --at-far exclude each other")
        if threshold is not None:
            if not 0 <= threshold <= 1:
                raise UsageError(f"--threshold must lie between 0 and 1, got {threshold}")
            return threshold
        if at_far is None:
            return float(stored["best_f1"])
        if confidence is not None:
            return guaranteed_threshold(stored, at_far, confidence)
        for entry in stored["far"]:
            if entry["far"] == at_far:
                return float(entry["threshold"])
        rates = ", ".join(f"{entry['far']:g}" for entry in stored["far"]) or "none"
        raise UsageError(
            f"--at-far {at_far:g}: the head stores no threshold for this rate; its "
            f"{stored['different_pairs']:,} different pairs support {rates}"
        )

    def review(self, far: float, frr: float) -> ReviewBand:
        """The band between the verdicts `same` and `different`; raises what `ReviewBand.of` raises."""
        return ReviewBand.of(self.about["thresholds"], far, frr)


@dataclass(frozen=True)
class Head(StoredHead):
    """One or more scorers with a calibration.

    scorers: the logit is the mean of their scores. calibration: slope and offset of that logit. about: the
    artifact's metadata, such as `embedding` (the fingerprint it was trained for) and `thresholds`. centre: (F,)
    float32, what is taken off every embedding before its features are computed; None for nothing. as_logits: give
    calibrated logits in place of probabilities, for a `FusedHead`.
    """

    scorers: tuple[Scorer, ...]
    calibration: tuple[float, float] = (1.0, 0.0)
    about: Mapping[str, Any] = field(default_factory=dict)
    centre: np.ndarray | None = None
    as_logits: bool = False

    def __call__(self, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Score pairs of (N, D) float16 or float32 embeddings.

        Returns (probability, similarity), (N,) float32 each: P(different) and the cosine, from -1 to 1. Raises
        `UsageError` for other shapes.
        """
        if a.shape != b.shape or a.ndim != 2 or a.shape[1] != self.dimension:
            raise UsageError(f"the head takes two arrays (N, {self.dimension}), got {a.shape} and {b.shape}")
        rows = np.arange(len(a))
        return self.score_pairs(np.concatenate([a, b]), rows, rows + len(a))

    def score_pairs(self, vectors: np.ndarray, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Like calling the head, for pairs given as (N,) int64 indices into (M, D) embeddings."""
        if self.centre is None:
            return self._score(vectors, a, b)
        similarity = _cosine(*distances(vectors, vectors, a, b))
        if len(vectors) > 2 * len(a):
            used, rows = np.unique(np.concatenate([a, b]), return_inverse=True)
            vectors, (a, b) = vectors[used], np.split(rows, 2)
        return self._score(centred(vectors, self.centre), a, b)[0], similarity

    def _score(self, vectors: np.ndarray, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Probability and cosine of pairs of embeddings from which the centre has been taken."""
        if not self.needs_torch:
            return self._from_distances(*distances(vectors, vectors, a, b))
        import torch

        survive_forks()
        with torch.inference_mode():
            return self._from_vectors(vectors, a, b)

    def _from_vectors(self, vectors: np.ndarray, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        import torch

        probability, similarity = np.empty(len(a), np.float32), np.empty(len(a), np.float32)
        left, right = torch.zeros(2, BLOCK, self.dimension).unbind()
        for start in range(0, len(a), BLOCK):
            rows = slice(start, start + BLOCK)
            count = len(a[rows])
            left[:count].copy_(torch.from_numpy(vectors[a[rows]]))
            right[:count].copy_(torch.from_numpy(vectors[b[rows]]))
            scores = [scorer.logits(left, right) for scorer in self.scorers]
            logits = torch.stack(scores).mean(dim=0) if len(scores) > 1 else scores[0]
            slope, offset = self.calibration
            logits = logits.mul_(slope).add_(offset)
            probability[rows] = (logits if self.as_logits else logits.sigmoid_())[:count].numpy()
            differences = absolute_difference(left, right).sum(dim=1)[:count].numpy()
            similarity[rows] = _cosine(differences, product(left, right).sum(dim=1)[:count].numpy())
        return probability, similarity

    @cached_property
    def needs_torch(self) -> bool:
        """Whether it is more than a line over the chi-square distance or the cosine; the default heads are not."""
        return any(scorer.features not in ("chi2sum", "cosine") or len(scorer.layers) > 1 for scorer in self.scorers)

    def _from_distances(self, chi_square: np.ndarray, cosine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Scores of (N,) float32 distances without torch, whose import takes longer than many runs."""
        values = {"chi2sum": chi_square, "cosine": cosine}
        scores = [scorer.distance_logits(values[scorer.features]) for scorer in self.scorers]
        logits = sum(scores[1:], scores[0]) / np.float32(len(scores))
        slope, offset = np.float32(self.calibration[0]), np.float32(self.calibration[1])
        if self.as_logits:
            return logits * slope + offset, _cosine(chi_square, cosine)
        # Where the exponential overflows, the probability is 0, which is right.
        with np.errstate(over="ignore"):
            return 1 / (1 + np.exp(-(logits * slope + offset))), _cosine(chi_square, cosine)

    @property
    def dimension(self) -> int:
        """Length of an embedding."""
        return int(self.about["embedding"]["dimension"])

    @property
    def parameters(self) -> int:
        """Number of fitted values, including the two of the calibration."""
        return sum(scorer.parameters for scorer in self.scorers) + len(self.calibration)

    @cached_property
    def embedding(self) -> EmbeddingFingerprint:
        """The embeddings that the head was trained for."""
        return EmbeddingFingerprint(self.about["embedding"])

    def check(self, embedding: EmbeddingFingerprint) -> None:
        """Raise `ArtifactError` for embeddings of another fingerprint; the message says what differs.

        Another choice of the face is only logged: vectors of other faces are of the same kind.
        """
        if self.embedding.id == embedding.id:
            return
        if self.embedding.with_default_choice().id == embedding.with_default_choice().id:
            log.warning(
                "the head's calibration and thresholds were measured with another choice of the face: %s "
                "(the head's against this run's)",
                self.embedding.difference(embedding),
            )
        else:
            raise ArtifactError(
                f"the head was trained for other embeddings: {self.embedding.difference(embedding)} "
                "(the head's against this run's); give a matching head with --head"
            )

    def to_bytes(self) -> bytes:
        """See `StoredHead`."""
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
        tensors = to_tensors(self.scorers)
        if self.centre is not None:
            tensors[CENTRE] = np.ascontiguousarray(self.centre)
        return save(tensors, metadata=metadata)

    @classmethod
    def parse(cls, about: Mapping[str, Any], tensors: dict[str, np.ndarray], name: str) -> Head:
        """See `StoredHead`."""
        if FUSION in about:
            raise ArtifactError(f"{name}: a head of several backbones; give them all, as in --backbone A+B")
        if about["format"] != FORMAT:
            theirs, writer = (shortened(about[key], SHOWN) for key in ("format", "version"))
            raise ArtifactError(
                f"{name}: the head has format {theirs} (batchverify {writer}), but this version reads format "
                f"{FORMAT}: train it again"
            )
        centre = tensors.pop(CENTRE, None)
        scorers = from_tensors(tensors, about["members"])
        calibration = (float(about["calibration"]["slope"]), float(about["calibration"]["offset"]))
        _check(scorers, calibration, about)
        _check_centre(centre, about["embedding"]["dimension"])
        return cls(scorers, calibration, about, centre)


def default_head(embedding: EmbeddingFingerprint) -> Head:
    """The shipped head for these embeddings, whichever face they show. Raises `ArtifactError` if there is none."""
    path = shipped_head(default_head_name(embedding.with_default_choice()))
    if not path.is_file():
        raise ArtifactError(
            "no head is shipped for these settings (backbone, crop, margin, detector, tta): give one with --head, or "
            "fit one to labelled pairs with `batchverify train`"
        )
    return Head.load(path)


def find_head(path: str | None, embedding: EmbeddingFingerprint) -> Head:
    """The head at `path`, or the shipped one if that is None. Raises `ArtifactError` if it does not fit."""
    head = default_head(embedding) if path is None else Head.load(path)
    head.check(embedding)
    return head


def shipped_head(name: str) -> Path:
    """Where the package has a head of this file name, if it has one."""
    return Path(str(files("batchverify.heads") / "weights" / name))


def default_head_name(embedding: EmbeddingFingerprint) -> str:
    """The shipped head's file name."""
    return f"head-{embedding.id}.safetensors"


def _cosine(distance: np.ndarray, dots: np.ndarray) -> np.ndarray:
    """(N,) cosines from dot products of rows that are rounded to float16, and so not quite of length 1. NaN stays.

    distance: 0 for equal rows, whose cosine is 1.
    """
    return np.where(distance == 0, np.float32(1), np.clip(dots, np.float32(-1), np.float32(1)))


def read_metadata(data: bytes) -> str:
    """The JSON in a safetensors header: 8 bytes of length, then the header. Raises one of `MALFORMED`."""
    length = int.from_bytes(data[:8], "little")
    if length > len(data) - 8:
        raise ValueError("not a safetensors file")
    # The header holds the metadata as a string, with a backslash before every quotation mark.
    return str(read_document(data[8 : 8 + length], 2 * MOST_METADATA)["__metadata__"][METADATA_KEY])


def _check_centre(centre: np.ndarray | None, dimension: int) -> None:
    """Check the centre: shorter than 1, so that something of every embedding remains."""
    if centre is None:
        return
    if centre.dtype != np.float32 or centre.shape != (dimension,):
        raise ValueError(f"its centre holds {centre.dtype} of shape {centre.shape}, not float32 ({dimension},)")
    if not np.linalg.norm(centre.astype(np.float64)) < 1:
        raise ValueError("its centre is not the mean of vectors of unit length")


def _check(scorers: Sequence[Scorer], calibration: tuple[float, float], about: Mapping[str, Any]) -> None:
    """Check everything that a run needs, so that a bad head fails when it is read."""
    if not scorers:
        raise ValueError("it has no scorers")
    dimension = about["embedding"]["dimension"]
    if not isinstance(dimension, int) or not 0 < dimension <= MOST_DIMENSION:
        raise ValueError(f"its embeddings have {dimension!r} values")
    for scorer in scorers:
        scorer.check(dimension)
    # Beyond float32 a score would be infinite or no number at all, and its row would say `ok`.
    if not all(scorer.bound * abs(calibration[0]) + abs(calibration[1]) < LARGEST for scorer in scorers):
        raise ValueError("its weights or its calibration are so large that scores overflow")
    check_thresholds(about["thresholds"], calibration)
    fitted_share(about)
    Reference.of(about)


def check_thresholds(stored: Mapping[str, Any], numbers: Sequence[float]) -> None:
    """Raise one of `MALFORMED` for thresholds, or numbers of a calibration, that a run cannot use."""
    shares = [float(entry[key]) for entry in stored["far"] for key in ("far", "threshold")]
    shares.append(float(stored["best_f1"]))
    # They are used as float32.
    if not (np.abs([*numbers, int(stored["different_pairs"]), *shares]) < LARGEST).all():
        raise ValueError("its calibration or thresholds are not finite")
    if not all(0 <= share <= 1 for share in shares):
        raise ValueError("its thresholds do not lie between 0 and 1")
    if "bounds" in stored:
        for label in ("different", "same"):
            Tail.from_json(stored["bounds"][label])
        if stored["bounds"]["unit"] not in UNITS:
            raise ValueError("its bounds have no unit")
