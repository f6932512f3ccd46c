"""Pair features: pure functions of two arrays of embeddings.

All features but `concat` give the same bits for (a, b) and (b, a).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from batchverify.errors import UsageError
from batchverify.kernels.loops import EPSILON

if TYPE_CHECKING:
    import torch


def concatenation(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Both rows side by side, (N, 2F). Not symmetric; a linear head cannot learn equality from it."""
    import torch

    return torch.cat([a, b], dim=1)


def absolute_difference(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """|a - b|, (N, F): the weighted L1 terms of Koch et al. 2015 (Siamese networks for one-shot recognition)."""
    return (a - b).abs_()


def squared_difference(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """(a - b)², (N, F): the terms of the squared Euclidean distance (FaceNet, Schroff et al. 2015)."""
    return (a - b).square_()


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a · b elementwise, (N, F): the terms of the cosine of unit rows."""
    return a * b


def chi_square(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Chi-square terms (N, F): (a - b)² / (|a| + |b|).

    Source: Taigman et al. 2014 (DeepFace), section 4.1, who divide by a + b. Their features are not negative;
    ours have both signs, so that a + b passes through zero (AUC 0.53 against 0.999).
    """
    denominator = a.abs().add_(b.abs()).add_(EPSILON)
    return (a - b).square_().div_(denominator)


def raw_chi_square(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Chi-square terms (N, F) as DeepFace prints them, (a - b)² / (a + b): for comparison, not for use.

    The denominator keeps its sign and is at least `EPSILON` in size.
    """
    import torch

    total = a + b
    denominator = torch.where(total < 0, total.clamp(max=-EPSILON), total.clamp(min=EPSILON))
    return (a - b).square_().div_(denominator)


def cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Cosine similarity (N, 1) of unit rows."""
    return (a * b).sum(dim=1, keepdim=True)


def euclidean(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Euclidean distance (N, 1), as FaceNet thresholds it."""
    return (a - b).square_().sum(dim=1, keepdim=True).sqrt_()


def chi_square_distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Chi-square distance (N, 1): the sum of the chi-square terms, as DeepFace's with equal weights."""
    return chi_square(a, b).sum(dim=1, keepdim=True)


@dataclass(frozen=True)
class Feature:
    """A named feature. columns: of its result per embedding dimension, 0 for a scalar."""

    name: str
    compute: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    columns: int = 1
    symmetric: bool = True

    def width(self, dimension: int) -> int:
        """Columns of the result for embeddings of length `dimension`."""
        return self.columns * dimension or 1


FEATURES = {
    feature.name: feature
    for feature in (
        Feature("concat", concatenation, columns=2, symmetric=False),
        Feature("absdiff", absolute_difference),
        Feature("sqdiff", squared_difference),
        Feature("product", product),
        Feature("chi2", chi_square),
        Feature("chi2raw", raw_chi_square),
        Feature("cosine", cosine, columns=0),
        Feature("euclidean", euclidean, columns=0),
        Feature("chi2sum", chi_square_distance, columns=0),
    )
}


@dataclass(frozen=True)
class Features:
    """One or more features side by side: `Features.parse("chi2+product")(a, b)`."""

    parts: tuple[Feature, ...]

    @classmethod
    def parse(cls, names: str) -> Features:
        """Parse names joined with `+`. Raises `UsageError` for a name that is unknown or appears twice."""
        parts = [name.strip() for name in names.split("+")]
        for name in parts:
            if name not in FEATURES:
                known = ", ".join(FEATURES)
                raise UsageError(f"features must be one of {known}, or several joined with +, got '{name}'")
            if parts.count(name) > 1:
                raise UsageError(f"features: '{name}' appears twice in '{names}'")
        return cls(tuple(FEATURES[name] for name in parts))

    def __call__(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """(N, F) embeddings of both sides to (N, `width(F)`) features of the same dtype."""
        import torch

        results = [feature.compute(a, b) for feature in self.parts]
        return results[0] if len(results) == 1 else torch.cat(results, dim=1)

    def __str__(self) -> str:
        return "+".join(feature.name for feature in self.parts)

    def widths(self, dimension: int) -> list[int]:
        """Columns of each feature for embeddings of length `dimension`."""
        return [feature.width(dimension) for feature in self.parts]

    def width(self, dimension: int) -> int:
        """Columns of all features for embeddings of length `dimension`."""
        return sum(self.widths(dimension))

    @property
    def symmetric(self) -> bool:
        """Whether (a, b) and (b, a) give the same result."""
        return all(feature.symmetric for feature in self.parts)

    @property
    def scalar(self) -> bool:
        """Whether the result is one value per pair: a distance or similarity."""
        return len(self.parts) == 1 and self.parts[0].columns == 0
