"""Heads of every kind, and pairs for them, for the tests of heads."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from people import EMBEDDING

from batchverify.heads.features import Features
from batchverify.heads.head import Head
from batchverify.heads.scorer import Scorer

ABOUT: dict[str, Any] = {
    "version": "0.1",
    "embedding": dict(EMBEDDING.document),
    "thresholds": {
        "best_f1": 0.4,
        "different_pairs": 1200,
        "far": [
            {"far": 0.1, "threshold": 0.7, "pairs": 1200},
            {"far": 0.01, "threshold": 0.3, "pairs": 1200},
        ],
    },
}


# Features of each scorer and the widths of its hidden layers.
KINDS: dict[str, list[tuple[str, tuple[int, ...]]]] = {
    "distance": [("chi2sum", ())],
    "cosine": [("cosine", ())],
    "linear": [("chi2", ())],
    "combination": [("chi2+product", ())],
    "concat": [("concat", ())],
    "network": [("absdiff", (64, 16))],
    "narrow network": [("absdiff", (33, 7, 5))],
    "thin network": [("absdiff", (100, 1))],
    "network of three numbers": [("cosine+euclidean+chi2sum", (5,))],
    "concat network": [("concat", (20, 3))],
    "ensemble": [("cosine", ()), ("chi2", ()), ("concat", (9,)), ("product+chi2sum", (17, 2))],
    "snapshots": [("sqdiff", (12,))] * 5,
}


def make_scorer(features: str, widths: tuple[int, ...], seed: int) -> Scorer:
    """A scorer with random layers, or with one layer that separates the pairs below."""
    rng, layers, inputs = np.random.default_rng(seed), [], Features.parse(features).width(512)
    for outputs in (*widths, 1):
        layers.append((rng.normal(size=(outputs, inputs)) / inputs**0.5, rng.normal(size=outputs)))
        inputs = outputs
    if not widths:
        weight = layers[0][0]
        layers = [(0.6 + rng.normal(size=weight.shape) / 10, np.array([-9.123456789]))]
    return Scorer("network", features, tuple((w.astype(np.float32), b.astype(np.float32)) for w, b in layers))


def make_head(kind: str = "linear", **changes) -> Head:
    scorers = tuple(make_scorer(*each, seed) for seed, each in enumerate(KINDS[kind], 5))
    return replace(Head(scorers, (1.1, 0.1), ABOUT), **changes)


def vectors(count: int, seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(count, 512))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)


def pairs(count: int) -> tuple[np.ndarray, np.ndarray]:
    """(a, b): b is an increasingly changed a, so that the probabilities range from 0 to 1."""
    a = vectors(count)
    share = np.linspace(0, 1, count)[:, None]
    return a, (a * (1 - share) + vectors(count, 1) * share).astype(np.float16)


@contextmanager
def warnings_are_errors() -> Iterator[None]:
    """Also torch's, which are otherwise shown once per process, so that an earlier test would hide them."""
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            yield
    finally:
        torch.set_warn_always(False)
