"""Pair features: pure functions of two arrays of embeddings.

Every feature but `concat` is the same for (a, b) and (b, a), bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from batchverify.errors import UsageError
from batchverify.kernels.distances import EPSILON

if TYPE_CHECKING:
    import torch

PLUS = "+"


def concatenation(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Both rows side by side, (N, F) twice to (N, 2F). Not symmetric; a linear head cannot see equality in it."""
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

    Source: Taigman et al. 2014 (DeepFace), section 4.1, who divide by a + b. Their features are not
    negative; these embeddings have signs, where a + b passes through zero (AUC 0.53 against 0.999).
    """
    size = a.abs().add_(b.abs()).add_(EPSILON)
    return (a - b).square_().div_(size)


def raw_chi_square(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Chi-square terms (N, F) as DeepFace prints them, (a - b)² / (a + b): for comparison, not for use.

    The denominator is kept `EPSILON` away from zero, on its own side of it.
    """
    import torch

    size = a + b
    size = torch.where(size < 0, size.clamp(max=-EPSILON), size.clamp(min=EPSILON))
    return (a - b).square_().div_(size)


def cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Cosine similarity (N, 1) of unit rows."""
    return (a * b).sum(dim=1, keepdim=True)


def euclidean(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Euclidean distance (N, 1), as FaceNet thresholds it."""
    return (a - b).square_().sum(dim=1, keepdim=True).sqrt_()


def chi_square_distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Chi-square distance (N, 1): the sum of the chi-square terms, DeepFace's with equal weights."""
    return chi_square(a, b).sum(dim=1, keepdim=True)


@dataclass(frozen=True)
class Feature:
    """A feature by its name.

    columns: of its result for one embedding dimension (2 is both sides', 1 one a dimension, 0 a scalar).
    """

    name: str
    compute: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    columns: int = 1
    symmetric: bool = True

    def width(self, dimension: int) -> int:
        """Columns of the result for embeddings of `dimension` numbers."""
        return self.columns * dimension or 1


FEATURES = {
    each.name: each
    for each in (
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
    """One feature or several side by side, by name: `Features.parse("chi2+product")(a, b)`."""

    parts: tuple[Feature, ...]

    @classmethod
    def parse(cls, names: str) -> Features:
        """Names joined by `+`. Raises `UsageError` for one that is unknown or stands twice."""
        listed = [name.strip() for name in names.split(PLUS)]
        for name in listed:
            if name not in FEATURES:
                raise UsageError(f"features: '{name}' is none of {', '.join(FEATURES)} (join several by +)")
        if len(set(listed)) < len(listed):
            raise UsageError(f"features: one of '{names}' stands there twice")
        return cls(tuple(FEATURES[name] for name in listed))

    def __call__(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """(N, F) twice to (N, `width(F)`), all of one float type."""
        import torch

        found = [each.compute(a, b) for each in self.parts]
        return found[0] if len(found) == 1 else torch.cat(found, dim=1)

    def __str__(self) -> str:
        return PLUS.join(each.name for each in self.parts)

    def widths(self, dimension: int) -> list[int]:
        """Columns of each part for embeddings of `dimension` numbers."""
        return [each.width(dimension) for each in self.parts]

    def width(self, dimension: int) -> int:
        """Columns for embeddings of `dimension` numbers."""
        return sum(self.widths(dimension))

    @property
    def symmetric(self) -> bool:
        """Whether the sides can be exchanged."""
        return all(each.symmetric for each in self.parts)

    @property
    def scalar(self) -> bool:
        """Whether this is one number a pair: a distance."""
        return len(self.parts) == 1 and self.parts[0].columns == 0
