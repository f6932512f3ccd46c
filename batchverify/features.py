"""Pair features: pure functions of two arrays of embeddings, each the same for (a, b) and (b, a)."""

from __future__ import annotations

from collections.abc import Callable

import torch

EPSILON = 1e-6


def chi_square(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Chi-square terms (N, F) of two (N, F) float arrays: (a - b)² / (|a| + |b|).

    Source: Taigman et al. 2014 (DeepFace), section 4.1, who divide by a + b. Their features are not
    negative; these embeddings have signs, where a + b passes through zero (AUC 0.53 against 0.999).
    """
    return (a - b).square() / (a.abs() + b.abs() + EPSILON)


def cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Cosine similarity (N,) of two (N, F) arrays of unit rows."""
    return (a * b).sum(dim=1)


FEATURES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {"chi2": chi_square}
