"""Linear heads by Newton's method, from features that are streamed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from batchverify.errors import UsageError
from batchverify.heads.features import Features
from batchverify.heads.scorer import Scorer
from batchverify.training.pairs import LabelledPairs

# Rows of terms that are kept between passes; of more pairs they are computed anew in every pass.
KEPT_NUMBERS = 20_000_000
# Pull of the bias, and the least of the terms: what the pairs say nothing about is zero.
LEAST_PULL = 1e-6
# Pull of the slopes towards zero, in the same units as the losses' sum: pairs that are separated perfectly
# have a finite slope.
SLOPE_PULL = 0.02

# A loss of (logits, labels): its values, first and second derivatives by the logit, each (B,).
Loss = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
Rows = tuple[torch.Tensor, torch.Tensor]
STEPS = 100
# Relative to the function's value: smaller progress is rounding.
TOLERANCE = 1e-12
HALVINGS = 30

Derivatives = tuple[np.ndarray, np.ndarray]


def log_loss(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Binary cross-entropy: logistic regression."""
    p = torch.sigmoid(logits)
    return torch.nn.functional.softplus(logits) - labels * logits, p - labels, p * (1 - p)


def squared_hinge(
    logits: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The linear support vector machine's, with which DeepFace learns the weights of its chi-square."""
    sign = 2 * labels - 1
    short = (1 - sign * logits).clamp(min=0)
    return short.square(), -2 * sign * short, 2.0 * (short > 0)


def fit_linear(
    pairs: LabelledPairs, features: Features, *, algorithm: str, shrinkage: float, loss: Loss = log_loss
) -> Scorer:
    """Weights and bias of score = terms · weights + bias, the minimum of the loss, in float64.

    The score is one slope for the sum of each feature's terms, plus terms · u with `shrinkage` · |u|²: few
    pairs leave the weights equal, many let them differ (`shrinkage` is the number of pairs that weigh as
    much as it). Memory does not grow with the pairs. Raises `UsageError` for pairs that are all alike.
    """
    columns = _Columns.of(pairs, features)
    pull = torch.full((columns.count,), max(2 * shrinkage, LEAST_PULL), dtype=torch.float64)
    pull[0] = LEAST_PULL
    pull[1 : 1 + len(columns.sum_mean)] = SLOPE_PULL

    def value(place: np.ndarray) -> float:
        at = torch.from_numpy(place)
        total = 0.5 * (pull * at.square()).sum()
        for terms, labels in columns.rows():
            total += loss(terms @ at, labels)[0].sum()
        return float(total)

    def derivatives(place: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        at = torch.from_numpy(place)
        gradient, hessian = pull * at, torch.diag(pull)
        for terms, labels in columns.rows():
            _, first, second = loss(terms @ at, labels)
            gradient += terms.T @ first
            hessian += (terms * second[:, None]).T @ terms
        return gradient.numpy(), hessian.numpy()

    weights, bias = columns.weights(torch.from_numpy(minimise(value, derivatives, np.zeros(columns.count))))
    layer = (weights.numpy().astype(np.float32)[None], np.array([bias], np.float32))
    return Scorer(algorithm, str(features), (layer,))


@dataclass(frozen=True)
class _Columns:
    """The design matrix, a block of rows at a time: 1, each feature's sum, each term; centred and scaled.

    sum_mean, sum_scale: (P,) by feature. mean, scale: (W,) by term, the same scale within a feature; of a
    feature that is a number by itself there is the sum alone.
    """

    pairs: LabelledPairs
    features: Features
    widths: list[int]
    sum_mean: torch.Tensor
    sum_scale: torch.Tensor
    mean: torch.Tensor
    scale: torch.Tensor
    kept: list[Rows]

    @classmethod
    def of(cls, pairs: LabelledPairs, features: Features) -> _Columns:
        widths = features.widths(pairs.vectors.shape[1])
        count, mean, spread = moments(
            torch.cat([terms, _sums(terms, widths)], dim=1) for terms, _ in _terms(pairs, features)
        )
        terms_spread = torch.cat(
            [part.mean().expand(len(part)) for part in spread[: sum(widths)].split(widths)]
        )
        sum_scale, sum_mean = spread[sum(widths) :], mean[sum(widths) :]
        if not (sum_scale > 1e-9 * sum_mean.abs().clamp(min=1e-9)).all():
            raise UsageError(f"the {pairs.name} pairs cannot be told apart: their embeddings are all alike")
        columns = cls(
            pairs,
            features,
            widths,
            sum_mean,
            sum_scale,
            mean[: sum(widths)],
            terms_spread.clamp(min=1e-12),
            [],
        )
        if count * columns.count <= KEPT_NUMBERS:
            columns._keep(count)
        return columns

    @property
    def count(self) -> int:
        """Columns of the design matrix."""
        return 1 + len(self.widths) + sum(width for width in self.widths if width > 1)

    def _keep(self, count: int) -> None:
        """Compute the rows once, into one piece of memory: many small ones would scatter the heap."""
        whole = torch.empty(count, self.count, dtype=torch.float64)
        labels = torch.empty(count, dtype=torch.float64)
        done, sizes = 0, []
        for terms, truth in self.rows():
            sizes.append(len(terms))
            whole[done : done + sizes[-1]], labels[done : done + sizes[-1]] = terms, truth
            done += sizes[-1]
        self.kept.extend(zip(whole.split(sizes), labels.split(sizes), strict=True))

    def rows(self) -> Iterator[Rows]:
        """Blocks of (columns (B, D), labels (B,)), float64."""
        if self.kept:
            yield from self.kept
            return
        several = torch.cat([torch.full((width,), width > 1) for width in self.widths])
        for terms, labels in _terms(self.pairs, self.features):
            sums = (_sums(terms, self.widths) - self.sum_mean) / self.sum_scale
            centred = (terms - self.mean) / self.scale
            if not several.all():
                centred = centred[:, several]
            yield torch.cat([torch.ones(len(terms), 1, dtype=torch.float64), sums, centred], dim=1), labels

    def weights(self, place: torch.Tensor) -> tuple[torch.Tensor, float]:
        """What the coefficients of the columns are for the terms themselves: weights (W,) and bias."""
        parts = len(self.widths)
        slopes = place[1 : 1 + parts] / self.sum_scale
        own = iter(place[1 + parts :].split([width for width in self.widths if width > 1]))
        each = [
            slope.expand(width) + (next(own) / scale if width > 1 else 0)
            for slope, width, scale in zip(slopes, self.widths, self.scale.split(self.widths), strict=True)
        ]
        weights = torch.cat(each)
        return weights, float(place[0] - (weights * self.mean).sum())


def _terms(pairs: LabelledPairs, features: Features) -> Iterator[Rows]:
    """(terms (B, W), labels (B,)), float64, in order; both orders of a pair where they differ."""
    for a, b, labels in pairs.blocks():
        left, right = a.double(), b.double()
        yield features(left, right), labels.double()
        if not features.symmetric:
            yield features(right, left), labels.double()


def _sums(terms: torch.Tensor, widths: list[int]) -> torch.Tensor:
    return torch.stack([part.sum(dim=1) for part in terms.split(widths, dim=1)], dim=1)


def moments(blocks: Iterable[torch.Tensor]) -> tuple[int, torch.Tensor, torch.Tensor]:
    """(rows, mean, spread) of blocks (B, W) float64: mean and standard deviation (W,) float64 by column.

    Counted from the first row, so that rows which are all alike have a spread of zero and not of rounding.
    """
    origin, total, squares, count = torch.zeros(0), torch.zeros(()), torch.zeros(()), 0
    for block in blocks:
        origin = origin if count else block[0]
        moved = block - origin
        total, squares = total + moved.sum(dim=0), squares + moved.square().sum(dim=0)
        count += len(block)
    spread = (squares / count - (total / count).square()).clamp(min=0).sqrt()
    return count, origin + total / count, spread


def minimise(
    value: Callable[[np.ndarray], float], derivatives: Callable[[np.ndarray], Derivatives], start: np.ndarray
) -> np.ndarray:
    """The (D,) float64 place where a convex function is smallest.

    value: the function. derivatives: its gradient (D,) and Hessian (D, D), positive definite. A step that
    overshoots is halved. Ends when progress is below rounding; values that are not finite end it, too.
    """
    place, current = start, value(start)
    for _ in range(STEPS):
        gradient, hessian = derivatives(place)
        step = _solved(hessian, gradient)
        for _ in range(HALVINGS):
            new = value(place - step)
            if new <= current:
                break
            step = step / 2
        if not new <= current:
            break
        gain, place, current = current - new, place - step, new
        # The last step, too small for the value to show it, is taken: it squares the error of the place.
        if gain <= TOLERANCE * max(abs(current), 1e-9):
            break
    return place


def _solved(hessian: np.ndarray, gradient: np.ndarray) -> np.ndarray:
    """By torch, whose threads a fit holds to one: numpy's would give other bits on other numbers of CPUs."""
    solution: np.ndarray = torch.linalg.solve(torch.from_numpy(hessian), torch.from_numpy(gradient)).numpy()
    return solution
