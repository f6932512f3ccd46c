"""One scorer of a head: pair features, then dense layers, to one score per pair."""

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
# Hidden layers are padded with zeros to a multiple of this. Measured (MKL, AVX-512): with other widths a matrix
# product sums the rows at an edge in another order, which also depends on the number of threads. A pair's score
# would depend on its position.
LANES = 16
# No pair feature of unit vectors is larger: `chi2raw` divides at most 4 by a millionth.
LARGEST_FEATURE = 1e8


@dataclass(frozen=True)
class Scorer:
    """Features, then layers with ReLU between them.

    algorithm: how it was fitted, a name of `options.ALGORITHMS`. layers: (weight (out, in), bias (out,)) float32
    each, the last with one output. A distance has one layer with one weight, a linear head one layer, a network
    several.
    """

    algorithm: str
    features: str
    layers: tuple[Layer, ...]

    def logits(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Scores (B,) of pairs of (B, F) float32 embeddings; the same for (a, b) and (b, a)."""
        scores = self._forward(a, b)
        if self._features.symmetric:
            return scores
        # Addition commutes: the mean of both orders is symmetric.
        return (scores + self._forward(b, a)) / 2

    def _forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        import torch

        values = self._features(a, b)
        *hidden, (last_weight, last_bias) = self._tensors
        for weight, bias in hidden:
            values = torch.nn.functional.linear(values, weight, bias).relu_()
        # Row by row: a matrix-vector product may sum the rows at an edge in another order.
        return values.mul_(last_weight).sum(dim=1).add_(last_bias)

    def distance_logits(self, distances: np.ndarray) -> np.ndarray:
        """Scores (N,) of (N,) float32 distances, for a scorer with one weight and one bias."""
        ((weight, bias),) = self.layers
        return distances * weight[0, 0] + bias[0]

    @cached_property
    def _features(self) -> Features:
        return Features.parse(self.features)

    @cached_property
    def _tensors(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        import torch

        first, *hidden, last = self.widths
        widths = [first, *(-(-width // LANES) * LANES for width in hidden), last]
        tensors = []
        for (weight, bias), inputs, outputs in zip(self.layers, widths, widths[1:], strict=False):
            padded_weight, padded_bias = torch.zeros(outputs, inputs), torch.zeros(outputs)
            padded_weight[: len(bias), : weight.shape[1]] = torch.tensor(weight)
            padded_bias[: len(bias)] = torch.tensor(bias)
            tensors.append((padded_weight, padded_bias))
        return tensors

    @property
    def parameters(self) -> int:
        """Number of weights and biases."""
        return sum(weight.size + bias.size for weight, bias in self.layers)

    @property
    def bound(self) -> float:
        """What no score of unit vectors exceeds, nor any sum on the way to it."""
        largest = LARGEST_FEATURE
        for weight, bias in self.layers:
            sums = np.abs(weight).sum(axis=1, dtype=np.float64)
            largest = float(sums.max() * largest + np.abs(bias).max())
        return largest

    @property
    def widths(self) -> list[int]:
        """Inputs of the first layer, then the outputs of each."""
        return [self.layers[0][0].shape[1], *(len(bias) for _, bias in self.layers)]

    def rescaled(self, slope: float, offset: float) -> Scorer:
        """A scorer whose score is `slope` times this one's plus `offset`."""
        weight, bias = self.layers[-1]
        last = ((weight * slope).astype(np.float32), (bias * slope + offset).astype(np.float32))
        return replace(self, layers=(*self.layers[:-1], last))

    def check(self, dimension: int) -> None:
        """Raise `ValueError` if features, layers and embeddings of length `dimension` do not fit together."""
        inputs = self._features.width(dimension)
        if not self.layers:
            raise ValueError("it has a scorer without layers")
        for weight, bias in self.layers:
            if bias.ndim != 1 or weight.shape != (len(bias), inputs):
                raise ValueError(f"it has a layer of shapes {weight.shape} and {bias.shape} for {inputs} inputs")
            if not (np.isfinite(weight).all() and np.isfinite(bias).all()):
                raise ValueError("its layers hold values that are not finite")
            inputs = len(bias)
        if inputs != 1:
            raise ValueError(f"its last layer has {inputs} outputs, not 1")

    def about(self) -> dict[str, Any]:
        """The scorer's entry in an artifact's metadata."""
        return {"algorithm": self.algorithm, "features": self.features, "widths": self.widths}


def to_tensors(scorers: Sequence[Scorer]) -> dict[str, np.ndarray]:
    """The layers of several scorers by their names in an artifact."""
    return {
        f"{index}.{depth}.{kind}": np.ascontiguousarray(array)
        for index, scorer in enumerate(scorers)
        for depth, layer in enumerate(scorer.layers)
        for kind, array in zip(("weight", "bias"), layer, strict=True)
    }


def from_tensors(tensors: Mapping[str, np.ndarray], abouts: Sequence[Mapping[str, Any]]) -> tuple[Scorer, ...]:
    """Scorers from an artifact's tensors and metadata. Raises `LookupError`, `ValueError`, `TypeError`."""
    scorers = []
    for index, about in enumerate(abouts):
        names = [f"{index}.{depth}" for depth in range(len(about["widths"]) - 1)]
        layers = tuple((_float32(tensors, f"{name}.weight"), _float32(tensors, f"{name}.bias")) for name in names)
        scorers.append(Scorer(str(about["algorithm"]), str(about["features"]), layers))
    unknown = tensors.keys() - to_tensors(scorers).keys()
    if unknown:
        raise ValueError(f"tensor '{min(unknown)}' belongs to none of its scorers")
    return tuple(scorers)


def _float32(tensors: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    array = tensors[name]
    if array.dtype != np.float32:
        raise ValueError(f"tensor '{name}' holds {array.dtype}, not float32")
    # A copy, which does not keep the whole file in memory.
    return np.array(array)
