"""Entries, segments and damage for the tests of the cache."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from batchverify.cache.embedding_cache import EmbeddingCache
from batchverify.cache.segment import Entry
from batchverify.fingerprint import EmbeddingFingerprint, EmbeddingSettings
from batchverify.records import Reason, Skipped

FINGERPRINT = EmbeddingFingerprint.of("b" * 64, EmbeddingSettings())
OTHER = EmbeddingFingerprint.of("c" * 64, EmbeddingSettings())


def key(number: int) -> bytes:
    """The content hash of a made-up image."""
    return hashlib.sha256(b"image %d" % number).digest()


def vector(seed: int) -> np.ndarray:
    """A (512,) float16 unit vector."""
    values = np.random.default_rng(seed).normal(size=512)
    return (values / np.linalg.norm(values)).astype(np.float16)


def entry(number: int, *, seed: int | None = None) -> Entry:
    """The result of image `number`; another seed gives another vector."""
    box = (0.5 + number, 1.25, 100.0, 120.0)
    return Entry(key(number), vector(number if seed is None else seed), box, 0.875, 1 + number % 3)


def failure(number: int, reason: Reason = Reason.NO_FACE, depends: str = "") -> Entry:
    """Image `number` without a vector."""
    return Entry(key(number), None, skipped=Skipped(reason, f"message {number}", depends))


def new_cache(root: object, fingerprint: EmbeddingFingerprint = FINGERPRINT, **options: Any) -> EmbeddingCache:
    """A cache whose folders exist."""
    cache = EmbeddingCache(str(root), fingerprint, run_id="run 1", **options)
    cache.compute_path = "cpu fp32 64"
    cache.create()
    return cache


def write(root: object, entries: Iterable[Entry], fingerprint: EmbeddingFingerprint = FINGERPRINT) -> list[Path]:
    """Commit entries as one segment (two with failures among them); the files that this made."""
    cache = new_cache(root, fingerprint)
    before = set(segments(root))
    cache.append(entries)
    cache.commit()
    return [path for path in segments(root) if path not in before]


def segments(root: object, folder: str = "*") -> list[Path]:
    """The segments of all fingerprints below a local root."""
    return sorted(Path(str(root)).glob(f"v1/*/{folder}/*.parquet"))


def flip(path: Path, offset: int, bit: int = 4) -> None:
    """Turn one bit of a file over; a negative offset counts from its end."""
    with path.open("r+b") as file:
        at = file.seek(offset, os.SEEK_SET if offset >= 0 else os.SEEK_END)
        [value] = file.read(1)
        file.seek(at)
        file.write(bytes([value ^ 1 << bit]))


def values(entries: Sequence[Entry | None]) -> list[object]:
    """What can be compared of entries: vectors as bytes."""
    return [
        each
        and (
            each.key,
            each.vector is not None and each.vector.tobytes(),
            *each.box,
            each.confidence,
            each.faces,
        )
        for each in entries
    ]
