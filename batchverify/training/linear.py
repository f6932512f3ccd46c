"""Linear heads, fitted by Newton's method to streamed features.

The minimiser is our own because the last bits of scipy's may depend on the number of BLAS threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from batchverify.errors import UsageError
from batchverify.heads.features import Features
from batchverify.heads.scorer import Scorer
from batchverify.training.pairs import LabelledPairs

# A design matrix of at most this many values is kept in memory; a larger one is computed anew in every pass.
CACHED_VALUES = 20_000_000
# Penalty of the bias, and the least one of the terms: coefficients that the pairs do not determine become zero.
LEAST_PENALTY = 1e-6
# Penalty of the slopes, in units of the summed loss: the slope is finite even if it separates all pairs.
SLOPE_PENALTY = 0.02
# Newton steps, halvings of a step, and the relative progress below which it is a rounding error.
STEPS = 100
HALVINGS = 30
TOLERANCE = 1e-12

# From (logits, labels) to the losses and their first and second derivatives by the logit, (B,) each.
Loss = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
Rows = tuple[torch.Tensor, torch.Tensor]
Derivatives = tuple[np.ndarray, np.ndarray]


def log_loss(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Binary cross-entropy: logistic regression."""
    p = torch.sigmoid(logits)
    return torch.nn.functional.softplus(logits) - labels * logits, p - labels, p * (1 - p)


def squared_hinge(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss of a linear support vector machine, with which DeepFace learns its chi-square weights."""
    sign = 2 * labels - 1
    hinge = (1 - sign * logits).clamp(min=0)
    return hinge.square(), -2 * sign * hinge, 2.0 * (hinge > 0)


def fit_linear(
    pairs: LabelledPairs,
    features: Features,
    *,
    algorithm: str,
    shrinkage: float,
    loss: Loss = log_loss,
    least_penalty: float = LEAST_PENALTY,
    slope_penalty: float = SLOPE_PENALTY,
    cached_values: int = CACHED_VALUES,
) -> Scorer:
    """Fit score = terms · weights + bias by minimising the penalised loss, in float64.

    The weights are one slope per feature plus a deviation u per term, with the penalty `shrinkage` · |u|². With few
    pairs the weights of a feature stay equal, with many they differ: `shrinkage` is the number of pairs whose
    influence equals the penalty's. Memory does not grow with the pairs. Raises `UsageError` if all pairs have the
    same features.
    """
    design = _Design.of(pairs, features, cached_values)
    penalty = torch.full((design.width,), max(2 * shrinkage, least_penalty), dtype=torch.float64)
    penalty[0] = least_penalty
    penalty[1 : 1 + len(design.sum_mean)] = slope_penalty

    def value(point: np.ndarray) -> float:
        coefficients = torch.from_numpy(point)
        total = 0.5 * (penalty * coefficients.square()).sum()
        for rows, labels in design.blocks():
            total += loss(rows @ coefficients, labels)[0].sum()
        return float(total)

    def derivatives(point: np.ndarray) -> Derivatives:
        coefficients = torch.from_numpy(point)
        gradient, hessian = penalty * coefficients, torch.diag(penalty)
        for rows, labels in design.blocks():
            _, first, second = loss(rows @ coefficients, labels)
            gradient += rows.T @ first
            hessian += (rows * second[:, None]).T @ rows
        return gradient.numpy(), hessian.numpy()

    weights, bias = design.weights(torch.from_numpy(minimise(value, derivatives, np.zeros(design.width))))
    layer = (weights.numpy().astype(np.float32)[None], np.array([bias], np.float32))
    return Scorer(algorithm, str(features), (layer,))


@dataclass(frozen=True)
class _Design:
    """The design matrix in blocks of rows. Columns: 1, the sum of each feature, each term; centred and scaled.

    sum_mean, sum_scale: (P,) by feature. mean, scale: (W,) by term, with one scale per feature. A scalar feature has
    no columns of terms, only its sum. cached: all blocks, or none if they are too large.
    """

    pairs: LabelledPairs
    features: Features
    widths: list[int]
    sum_mean: torch.Tensor
    sum_scale: torch.Tensor
    mean: torch.Tensor
    scale: torch.Tensor
    cached: list[Rows]

    @classmethod
    def of(cls, pairs: LabelledPairs, features: Features, cached_values: int) -> _Design:
        widths = features.widths(pairs.vectors.shape[1])
        terms = sum(widths)
        count, mean, spread = moments(
            torch.cat([block, _sums(block, widths)], dim=1) for block, _ in _terms(pairs, features)
        )
        sum_mean, sum_scale = mean[terms:], spread[terms:]
        if not (sum_scale > 1e-9 * sum_mean.abs().clamp(min=1e-9)).all():
            raise UsageError(f"the {pairs.name} pairs cannot be told apart: all have the same features")
        scale = torch.cat([part.mean().expand(len(part)) for part in spread[:terms].split(widths)])
        scale = scale.clamp(min=1e-12)
        design = cls(pairs, features, widths, sum_mean, sum_scale, mean[:terms], scale, [])
        if count * design.width <= cached_values:
            design._cache(count)
        return design

    @property
    def width(self) -> int:
        """Number of columns."""
        return 1 + len(self.widths) + sum(width for width in self.widths if width > 1)

    def _cache(self, count: int) -> None:
        """Compute all rows into one piece of memory: many small ones would fragment the heap."""
        matrix = torch.empty(count, self.width, dtype=torch.float64)
        labels = torch.empty(count, dtype=torch.float64)
        done, sizes = 0, []
        for block, block_labels in self.blocks():
            size = len(block)
            matrix[done : done + size], labels[done : done + size] = block, block_labels
            done += size
            sizes.append(size)
        self.cached.extend(zip(matrix.split(sizes), labels.split(sizes), strict=True))

    def blocks(self) -> Iterator[Rows]:
        """(rows (B, D), labels (B,)), float64."""
        if self.cached:
            yield from self.cached
            return
        has_terms = torch.cat([torch.full((width,), width > 1) for width in self.widths])
        for terms, labels in _terms(self.pairs, self.features):
            sums = (_sums(terms, self.widths) - self.sum_mean) / self.sum_scale
            centred = (terms - self.mean) / self.scale
            if not has_terms.all():
                centred = centred[:, has_terms]
            yield torch.cat([torch.ones(len(terms), 1, dtype=torch.float64), sums, centred], dim=1), labels

    def weights(self, coefficients: torch.Tensor) -> tuple[torch.Tensor, float]:
        """From coefficients of the columns to weights (W,) of the terms, and the bias."""
        parts = len(self.widths)
        slopes = coefficients[1 : 1 + parts] / self.sum_scale
        deviations = iter(coefficients[1 + parts :].split([width for width in self.widths if width > 1]))
        weights = torch.cat(
            [
                slope.expand(width) + (next(deviations) / scale if width > 1 else 0)
                for slope, width, scale in zip(slopes, self.widths, self.scale.split(self.widths), strict=True)
            ]
        )
        return weights, float(coefficients[0] - (weights * self.mean).sum())


def _terms(pairs: LabelledPairs, features: Features) -> Iterator[Rows]:
    """(terms (B, W), labels (B,)), float64; both orders of each pair if the features are not symmetric."""
    for a, b, labels in pairs.blocks():
        left, right = a.double(), b.double()
        yield features(left, right), labels.double()
        if not features.symmetric:
            yield features(right, left), labels.double()


def _sums(terms: torch.Tensor, widths: list[int]) -> torch.Tensor:
    return torch.stack([part.sum(dim=1) for part in terms.split(widths, dim=1)], dim=1)


def moments(blocks: Iterable[torch.Tensor]) -> tuple[int, torch.Tensor, torch.Tensor]:
    """(rows, mean, spread) of (B, W) float64 blocks: mean and standard deviation are (W,) float64, by column.

    Measured from the first row, so that the spread of equal rows is exactly zero.
    """
    origin, total, squares, count = torch.zeros(0), torch.zeros(()), torch.zeros(()), 0
    for block in blocks:
        origin = origin if count else block[0]
        shifted = block - origin
        total, squares = total + shifted.sum(dim=0), squares + shifted.square().sum(dim=0)
        count += len(block)
    spread = (squares / count - (total / count).square()).clamp(min=0).sqrt()
    return count, origin + total / count, spread


def minimise(
    value: Callable[[np.ndarray], float], derivatives: Callable[[np.ndarray], Derivatives], start: np.ndarray
) -> np.ndarray:
    """The (D,) float64 minimum of a convex function, by Newton's method.

    value: the function. derivatives: its gradient (D,) and positive definite Hessian (D, D). A step that overshoots
    is halved. Ends when progress is a rounding error or the value is not finite.
    """
    point, current = start, value(start)
    for _ in range(STEPS):
        gradient, hessian = derivatives(point)
        # torch runs on one thread during a fit; numpy's BLAS would give other bits on other numbers of CPUs.
        step = torch.linalg.solve(torch.from_numpy(hessian), torch.from_numpy(gradient)).numpy()
        for _ in range(HALVINGS):
            new = value(point - step)
            if new <= current:
                break
            step = step / 2
        if not new <= current:
            break
        gain, point, current = current - new, point - step, new
        # Checked after the step: the last one is below rounding in the value, but still improves the point.
        if gain <= TOLERANCE * max(abs(current), 1e-9):
            break
    return point
