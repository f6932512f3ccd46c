"""The network of a network head: standardised features, then layers that widen and narrow to one number."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import nn

from batchverify.heads.features import Features
from batchverify.heads.scorer import Layer
from batchverify.labelled import LabelledPairs
from batchverify.moments import moments

# Pairs that the means and spreads of the features are taken from.
SCALED_PAIRS = 16_384
# A smaller spread of a feature is rounding.
STEADY = 1e-6

# (a, b, labels): (B, F) float32 twice, (B,) float32.
Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Perceptron(nn.Module):
    """Standardised features, then dropout, ReLU and linear layers down to one number."""

    def __init__(
        self,
        features: Features,
        mean: torch.Tensor,
        scale: torch.Tensor,
        widths: Sequence[int],
        dropout: float,
    ) -> None:
        super().__init__()
        self.features, self.mean, self.scale = features, mean, scale
        layers: list[nn.Module] = []
        inputs = len(mean)
        for width in widths:
            layers += [nn.Linear(inputs, width), nn.ReLU(), nn.Dropout(dropout)]
            inputs = width
        self.layers = nn.Sequential(*layers, nn.Linear(inputs, 1))

    @classmethod
    def fresh(
        cls, train: LabelledPairs, features: Features, widths: Sequence[int], dropout: float, seed: int
    ) -> Perceptron:
        """One that has learned nothing but the means and spreads of its features; the seed decides its weights."""
        blocks = (_both_orders(features, *each) for each in train.draw(SCALED_PAIRS // 2, 0).blocks())
        _, mean, scale = moments(features(a, b).double() for a, b, _ in blocks)
        torch.manual_seed(seed)
        # What never varies here says nothing: divided by its spread, its smallest change would drown all else.
        scale = torch.where(scale > STEADY, scale, 1.0)
        return cls(features, mean.float(), scale.float(), widths, dropout)

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Logits (B,) of pairs of (B, F) embeddings."""
        with torch.no_grad():
            values = (self.features(a, b) - self.mean) / self.scale
        return self.layers(values).squeeze(1)

    def scores(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Logits (B,) as the finished member gives them: of both orders where the features are not symmetric."""
        if self.features.symmetric:
            return self(a, b)
        return (self(a, b) + self(b, a)) / 2

    def snapshot(self) -> tuple[Layer, ...]:
        """The layers as arrays, with the standardisation folded into the first."""
        linear = [layer for layer in self.layers if isinstance(layer, nn.Linear)]
        found = [(each.weight.detach().clone(), each.bias.detach().clone()) for each in linear]
        weight, bias = found[0]
        weight = weight / self.scale
        found[0] = (weight, bias - weight @ self.mean)
        return tuple((weight.numpy(), bias.numpy()) for weight, bias in found)


def batches(train: LabelledPairs, features: Features, size: int, rng: np.random.Generator) -> Iterator[Batch]:
    """One pass in random order; a pair stands there in both orders where the feature is not symmetric."""
    order = rng.permutation(len(train)).astype(np.int32)
    for start in range(0, len(order), size):
        yield _both_orders(features, *train.take(order[start : start + size]))


def _both_orders(features: Features, a: torch.Tensor, b: torch.Tensor, labels: torch.Tensor) -> Batch:
    if features.symmetric:
        return a, b, labels
    return torch.cat([a, b]), torch.cat([b, a]), torch.cat([labels, labels])
