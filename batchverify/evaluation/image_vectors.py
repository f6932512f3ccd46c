"""The vectors of a run's images, from the embedding cache that it used."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np

from batchverify.cache.image_keys import READERS, content_key
from batchverify.evaluation.report.thumbnails import ImageSource, cached_entries
from batchverify.fingerprint import EmbeddingFingerprint
from batchverify.records import Skipped

# Of more images reading them all would take minutes.
MOST_IMAGES = 50_000


def image_vectors(
    cells: Sequence[str], source: ImageSource, embedding: Any, most: int = MOST_IMAGES
) -> tuple[np.ndarray | None, str]:
    """(V, D) float32 unit vectors of (V,) image cells, or None and why there are none.

    embedding: of the run record; the vectors of several backbones stand side by side. most: images that are read.
    """
    members = EmbeddingFingerprint(embedding or {}).members
    if not source.cache or not members[0].document:
        return None, "the run record names no cache"
    if len(cells) > most:
        return None, f"{len(cells):,} images are more than {most:,}"
    keys = _keys(cells, source)
    unread = sum(key is None for key in keys)
    if unread:
        return None, f"{unread:,} of {len(cells):,} images cannot be read; --image-root says where they are"
    each = [_unit_vectors([key or b"" for key in keys], source, member) for member in members]
    # Of several backbones, one that found no face in some image is left out.
    parts = [part for part in each if len(part) == len(keys)]
    if not parts:
        missing = len(keys) - max(len(part) for part in each)
        return (
            None,
            f"the cache lacks the vectors of {missing:,} of {len(cells):,} images; --cache names another",
        )
    return np.concatenate(parts, axis=1) / np.float32(len(parts) ** 0.5), ""


def _unit_vectors(keys: Sequence[bytes], source: ImageSource, member: EmbeddingFingerprint) -> np.ndarray:
    """(V, D) float32, in order, of the images that the cache of one backbone has a vector of."""
    entries = cached_entries(keys, replace(source, embedding=member.document))
    found = [entry.vector for key in keys if (entry := entries.get(key)) and entry.vector is not None]
    vectors = np.stack(found).astype(np.float32) if found else np.zeros((0, 1), np.float32)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def _keys(cells: Sequence[str], source: ImageSource) -> list[bytes | None]:
    """The cache's key of each image; None for one that cannot be read."""

    def key_of(cell: str) -> bytes | None:
        data = source.read(cell)
        return None if isinstance(data, Skipped) else content_key(data)

    with ThreadPoolExecutor(READERS, "read") as pool:
        return list(pool.map(key_of, cells))
