"""One scorer of a head: pair features and the dense layers on them, down to one number a pair."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from batchverify.heads.features import Features

if TYPE_CHECKING:
    import torch

Layer = tuple[np.ndarray, np.ndarray]
# Hidden layers are padded with zeros to a multiple of this. Measured (MKL, AVX-512): a matrix product with
# another number of columns adds up the rows at an edge in another order, and differently by the number of
# threads, so that a pair's score would depend on its place.
LANES = 16


@dataclass(frozen=True)
class Scorer:
    """A scorer: features, then layers with ReLU between them.

    algorithm: how it was fitted, a name of `options.ALGORITHMS`. layers: (weight (out, in), bias (out,))
    float32 each, the last with one output. Every kind of head is this: a distance has one layer of one
    weight, a linear head one layer, a network several.
    """

    algorithm: str
    features: str
    layers: tuple[Layer, ...]

    def logits(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Scores (B,) of B pairs of (B, F) float32 embeddings, the same for (a, b) and (b, a)."""
        scores = self._forward(a, b)
        if self._compute.symmetric:
            return scores
        # Addition commutes: the mean of both orders is the same from either side.
        return (scores + self._forward(b, a)) / 2

    def _forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return self.of_features(self._compute(a, b))

    def of_features(self, values: torch.Tensor) -> torch.Tensor:
        """Scores (B,) of (B, W) float32 features, which are overwritten."""
        import torch

        *hidden, (weight, bias) = self._tensors
        for inner, offset in hidden:
            values = torch.nn.functional.linear(values, inner, offset).relu_()
        # Row by row, since a product of matrix and vector may sum the rows at an edge in another order.
        return values.mul_(weight).sum(dim=1).add_(bias)

    def of_distances(self, values: np.ndarray) -> np.ndarray:
        """Scores (N,) of (N,) float32 distances: those of a scorer with one layer of one weight."""
        ((weight, bias),) = self.layers
        return values * weight[0, 0] + bias[0]

    @cached_property
    def _compute(self) -> Features:
        return Features.parse(self.features)

    @cached_property
    def _tensors(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        import torch

        first, *hidden, last = self.widths
        widths = [first, *(-(-width // LANES) * LANES for width in hidden), last]
        tensors = []
        for (weight, bias), inputs, outputs in zip(self.layers, widths, widths[1:], strict=False):
            weights, offsets = torch.zeros(outputs, inputs), torch.zeros(outputs)
            weights[: len(bias), : weight.shape[1]] = torch.tensor(weight)
            offsets[: len(bias)] = torch.tensor(bias)
            tensors.append((weights, offsets))
        return tensors

    @property
    def parameters(self) -> int:
        """Numbers in all layers."""
        return sum(weight.size + bias.size for weight, bias in self.layers)

    @property
    def widths(self) -> list[int]:
        """Inputs of the first layer, then the outputs of each."""
        return [self.layers[0][0].shape[1], *(len(bias) for _, bias in self.layers)]

    def rescaled(self, slope: float, offset: float) -> Scorer:
        """The scorer whose score is `slope` times this one's plus `offset`."""
        weight, bias = self.layers[-1]
        last = ((weight * slope).astype(np.float32), (bias * slope + offset).astype(np.float32))
        return replace(self, layers=(*self.layers[:-1], last))

    def check(self, dimension: int) -> None:
        """Raise `ValueError` where layers, features and embeddings of `dimension` numbers do not fit."""
        expected = self._compute.width(dimension)
        if not self.layers:
            raise ValueError("it has a scorer without layers")
        for weight, bias in self.layers:
            if bias.ndim != 1 or weight.shape != (len(bias), expected):
                raise ValueError(
                    f"a layer of {weight.shape} and {bias.shape} where {expected} numbers come in"
                )
            if not (np.isfinite(weight).all() and np.isfinite(bias).all()):
                raise ValueError("its layers hold numbers that are not finite")
            expected = len(bias)
        if expected != 1:
            raise ValueError(f"its last layer gives {expected} numbers")

    def about(self) -> dict[str, Any]:
        """As it stands in an artifact's metadata."""
        return {"algorithm": self.algorithm, "features": self.features, "widths": self.widths}


def to_tensors(scorers: Sequence[Scorer]) -> dict[str, np.ndarray]:
    """The layers of several scorers under names of their own, for an artifact."""
    return {
        f"{place}.{depth}.{kind}": np.ascontiguousarray(array)
        for place, scorer in enumerate(scorers)
        for depth, layer in enumerate(scorer.layers)
        for kind, array in zip(("weight", "bias"), layer, strict=True)
    }


def from_tensors(
    tensors: Mapping[str, np.ndarray], listed: Sequence[Mapping[str, Any]]
) -> tuple[Scorer, ...]:
    """Scorers from an artifact's tensors and metadata. Raises `LookupError`, `ValueError`, `TypeError`."""
    scorers = []
    for place, about in enumerate(listed):
        layers = [
            (
                np.array(tensors[f"{place}.{depth}.weight"], np.float32),
                np.array(tensors[f"{place}.{depth}.bias"], np.float32),
            )
            for depth in range(len(about["widths"]) - 1)
        ]
        scorers.append(Scorer(str(about["algorithm"]), str(about["features"]), tuple(layers)))
    unknown = tensors.keys() - to_tensors(scorers).keys()
    if unknown:
        raise ValueError(f"its scorers have no place for the tensor '{min(unknown)}'")
    return tuple(scorers)
