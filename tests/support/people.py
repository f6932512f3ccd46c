"""Synthetic people: unit embeddings that scatter about one direction a person, and labelled pairs of them."""

from __future__ import annotations

import numpy as np

from batchverify.fingerprint import EmbeddingFingerprint, EmbeddingSettings
from batchverify.options import TrainOptions
from batchverify.training.pairs import LabelledPairs

EMBEDDING = EmbeddingFingerprint.of("ab" * 32, EmbeddingSettings())
QUICK = TrainOptions(widths=(16, 8), dropout=0.2, weight_decay=0.01, epochs=4, patience=10, max_lr=3e-3)


def draw_people(
    people: int,
    seed: int,
    *,
    pairs: int = 200,
    images: int = 4,
    noise: float = 0.6,
    name: str = "training",
    dimension: int = 512,
    known: bool = True,
) -> LabelledPairs:
    """So many pairs at most, half of them different, of so many images each; persons are `known` or not."""
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(people, 1, dimension)) + noise * rng.normal(size=(people, images, dimension))
    vectors = vectors.reshape(-1, dimension)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    who = np.repeat(np.arange(people), images)
    a, b = np.triu_indices(len(vectors), 1)
    labels = (who[a] != who[b]).astype(np.int8)
    few = min(pairs // 2, int((labels == 0).sum()))
    chosen = rng.permutation(
        np.concatenate([rng.permutation(np.flatnonzero(labels == each))[:few] for each in (0, 1)])
    )
    return LabelledPairs(
        vectors.astype(np.float16),
        a[chosen].astype(np.int32),
        b[chosen].astype(np.int32),
        labels[chosen],
        name,
        tuple(f"{name}/{image}.jpg" for image in range(len(vectors))),
        {image: f"{name} {person}" for image, person in enumerate(who)} if known else {},
    )
