"""The head of several backbones: each has a head of its own, and their calibrated logits are added."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import combinations
from typing import Any, TypeVar

import numpy as np

from batchverify.errors import ArtifactError
from batchverify.fingerprint import FUSION, MOST_FUSED, EmbeddingFingerprint
from batchverify.heads.drift import Reference
from batchverify.heads.head import FORMAT, Head, StoredHead, check_thresholds, shipped_head
from batchverify.heads.prior import fitted_share
from batchverify.heads.scorer import Scorer

Member = TypeVar("Member")
# The tensors of an artifact: the files of the members' heads.
_MEMBER = "head."
# Slopes and offsets beyond are no calibration of a sum of logits.
_LARGEST = 1e6


@dataclass(frozen=True)
class FusedHead(StoredHead):
    """Heads of several backbones and how their scores make one.

    members: in the order of the run's backbones. calibrations: slope and offset of the sum of the members' calibrated
    logits, for every combination of two or more of them, by `combination_key`: scores of one pair of faces correlate,
    so that the plain sum would be too sure. A pair that one backbone alone has seen keeps the probability of that
    backbone's head. about: the artifact's metadata, as of a `Head`.
    """

    members: tuple[Head, ...]
    calibrations: Mapping[str, tuple[float, float]]
    about: Mapping[str, Any] = field(default_factory=dict)

    def score_pairs(
        self, vectors: Sequence[tuple[np.ndarray, np.ndarray]], a: np.ndarray, b: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Score (N,) index pairs by every backbone that has both vectors; one must have them.

        vectors: for each member (M, D) float16 vectors and (M,) bool, which images have one. Returns (probability,
        similarity), (N,) float32 each: P(different) and the mean of the backbones' cosines.
        """
        logits, cosines, codes = np.zeros(len(a)), np.zeros(len(a)), np.zeros(len(a), np.int64)
        for bit, (head, (rows, known)) in enumerate(zip(self.members, vectors, strict=True)):
            seen = np.flatnonzero(known[a] & known[b])
            logit, cosine = replace(head, as_logits=True).score_pairs(rows, a[seen], b[seen])
            logits[seen] += logit
            cosines[seen] += cosine
            codes[seen] |= 1 << bit
        for code in np.unique(codes).tolist():
            seen = codes == code
            chosen = [head for bit, head in enumerate(self.members) if code >> bit & 1]
            slope, offset = self.calibration(chosen)
            logits[seen] = logits[seen] * slope + offset
            cosines[seen] /= max(len(chosen), 1)
        with np.errstate(over="ignore"):
            return (1 / (1 + np.exp(-logits))).astype(np.float32), cosines.astype(np.float32)

    def calibration(self, members: Sequence[Head]) -> tuple[float, float]:
        """Slope and offset of the sum of some members' logits."""
        if len(members) < 2:
            return 1.0, 0.0
        return self.calibrations[combination_key([member.embedding for member in members])]

    @property
    def needs_torch(self) -> bool:
        """See `Head`."""
        return any(member.needs_torch for member in self.members)

    @property
    def scorers(self) -> tuple[Scorer, ...]:
        """All scorers of all members."""
        return tuple(scorer for member in self.members for scorer in member.scorers)

    @property
    def parameters(self) -> int:
        """Number of fitted values."""
        return sum(member.parameters for member in self.members) + 2 * len(self.calibrations)

    @cached_property
    def embedding(self) -> EmbeddingFingerprint:
        """The embeddings that the head was trained for."""
        return EmbeddingFingerprint.fused([member.embedding for member in self.members])

    def arranged(self, embeddings: Sequence[EmbeddingFingerprint]) -> FusedHead:
        """The head with its members in the order of these embeddings. Raises `ArtifactError` if it does not fit."""
        known = {_identity(member.embedding): member for member in self.members}
        wanted = [_identity(embedding) for embedding in embeddings]
        if sorted(wanted) != sorted(known):
            mine, other = self.embedding, EmbeddingFingerprint.fused(embeddings)
            why = mine.difference(other) or "another number of backbones"
            raise ArtifactError(
                f"the head was trained for other backbones: {why} (the head's against this run's); give a matching "
                "head with --head"
            )
        members = tuple(known[identity] for identity in wanted)
        for member, embedding in zip(members, embeddings, strict=True):
            member.check(embedding)
        return replace(self, members=members)

    def to_bytes(self) -> bytes:
        """The artifact: one safetensors file, the same bytes whatever the order of the members."""
        from safetensors.numpy import save

        members = sorted(self.members, key=lambda member: _identity(member.embedding))
        about = {
            **self.about,
            "format": FORMAT,
            FUSION: {key: list(self.calibrations[key]) for key in self.calibrations},
        }
        tensors = {
            f"{_MEMBER}{number}": np.frombuffer(member.to_bytes(), np.uint8) for number, member in enumerate(members)
        }
        return save(tensors, metadata={"batchverify": json.dumps(about, sort_keys=True)})

    @classmethod
    def parse(cls, about: Mapping[str, Any], tensors: dict[str, np.ndarray], name: str) -> FusedHead:
        """See `StoredHead`."""
        if FUSION not in about:
            Head.parse(about, tensors, name)
            raise ArtifactError(f"{name}: a head of one backbone, but --backbone names several")
        members = tuple(
            Head.from_bytes(tensors[key].tobytes(), f"{name}: head {number}")
            for number, key in enumerate(sorted(tensors), 1)
        )
        calibrations = {
            str(key): (float(slope), float(offset)) for key, (slope, offset) in dict(about[FUSION]).items()
        }
        _check(members, calibrations, about)
        return cls(members, calibrations, about)


def find_fused_head(path: str | None, embeddings: Sequence[EmbeddingFingerprint]) -> FusedHead:
    """The head at `path`, or the shipped one if that is None, with members in the order of these embeddings.

    Raises `ArtifactError` if there is none or it does not fit.
    """
    if path is not None:
        return FusedHead.load(path).arranged(embeddings)
    whole = EmbeddingFingerprint.fused(embeddings).with_default_choice()
    shipped = shipped_head(fused_head_name(whole))
    if not shipped.is_file():
        raise ArtifactError(
            "no head is shipped for these backbones together, or not for these settings (crop, margin, detector, "
            "tta): give one with --head, or fit one to labelled pairs with `batchverify train --backbone A+B`"
        )
    return FusedHead.load(shipped).arranged(embeddings)


def fused_head_name(embedding: EmbeddingFingerprint) -> str:
    """The shipped head's file name."""
    return f"fused-{embedding.id}.safetensors"


def combination_key(embeddings: Sequence[EmbeddingFingerprint]) -> str:
    """The name of a combination of backbones, whatever their order."""
    return "+".join(sorted(map(_identity, embeddings)))


def all_combinations(members: Sequence[Member]) -> list[tuple[Member, ...]]:
    """Every combination of two or more members."""
    return [chosen for count in range(2, len(members) + 1) for chosen in combinations(members, count)]


def _identity(embedding: EmbeddingFingerprint) -> str:
    return embedding.with_default_choice().id


def _check(
    members: Sequence[Head], calibrations: Mapping[str, tuple[float, float]], about: Mapping[str, Any]
) -> None:
    different = len({_identity(member.embedding) for member in members})
    if not 2 <= different == len(members) <= MOST_FUSED:
        raise ValueError("it holds no heads of several backbones")
    expected = {combination_key([each.embedding for each in chosen]) for chosen in all_combinations(members)}
    if expected != calibrations.keys():
        raise ValueError("its calibrations are not those of its backbones")
    numbers = [number for calibration in calibrations.values() for number in calibration]
    if not (np.abs(numbers) < _LARGEST).all():
        raise ValueError("its calibrations are not finite")
    check_thresholds(about["thresholds"], numbers)
    fitted_share(about)
    Reference.of(about)
