"""The loader of heads of several backbones."""

from __future__ import annotations

import numpy as np
from head_samples import ABOUT, make_head, vectors
from head_target import HeadTarget
from target import require

from batchverify.errors import ArtifactError
from batchverify.fingerprint import EmbeddingFingerprint
from batchverify.heads.fused_head import FusedHead, combination_key
from batchverify.heads.head import Head


class FusedHeadTarget(HeadTarget):
    """A head of two backbones, as `HeadTarget`."""

    def seeds(self) -> list[bytes]:
        """A file and its header."""
        known = [EmbeddingFingerprint({**ABOUT["embedding"], "backbone": name}) for name in "ab"]
        members = tuple(make_head("distance", about={**ABOUT, "embedding": each.document}) for each in known)
        file = FusedHead(members, {combination_key(known): (0.5, 0.1)}, ABOUT).to_bytes()
        return [
            b"\0" + file,
            b"\1" + file[8 : 8 + int.from_bytes(file[:8], "little")],
            b"\0" + members[0].to_bytes(),
        ]

    def run(self, data: bytes) -> None:
        """Read, and score."""
        artifact = self.artifact(data)
        for kind in (FusedHead, Head):
            try:
                head = kind.from_bytes(artifact, "a.safetensors")
            except ArtifactError as exc:
                require(str(exc).startswith("a.safetensors: ") and "\n" not in str(exc)[:300], f"{exc}")
                continue
            if isinstance(head, FusedHead) and {member.dimension for member in head.members} == {512}:
                tables = [(vectors(3), np.ones(3, bool))] * len(head.members)
                probability, _ = head.score_pairs(tables, np.arange(3), np.array([2, 0, 1]))
                require(bool(((probability >= 0) & (probability <= 1)).all()), f"{probability}")


TARGET = FusedHeadTarget
