"""Our networks as modules that can learn: batch normalisation is not folded, and tensors have the names of files."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import nn
from torch.nn.functional import conv2d, prelu
from torch.nn.utils.fusion import fuse_conv_bn_eval

from batchverify.embedding import compact, inception
from batchverify.fingerprint import DIMENSION

# The name of the layer that drops values; it belongs to the block after it.
DROPOUT = "dropout"


class NormalisedConvolution(nn.Module):
    """A convolution with batch normalisation and ReLU."""

    def __init__(self, layer: inception.Convolution) -> None:
        super().__init__()
        self.conv = nn.Conv2d(layer.inputs, layer.outputs, layer.kernel, layer.stride, layer.padding, bias=False)
        self.bn: nn.Module = nn.BatchNorm2d(layer.outputs, eps=inception.EPSILON)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) to the same with other sizes."""
        return self.bn(self.conv(values)).relu_()

    def fold(self) -> None:
        """Fold the batch normalisation into the convolution, for a network that learns no more."""
        if isinstance(self.bn, nn.BatchNorm2d):
            self.conv, self.bn = fuse_conv_bn_eval(self.conv, self.bn), nn.Identity()


class Branches(nn.Module):
    """Parallel chains of convolutions, concatenated."""

    def __init__(self, branches: tuple[tuple[inception.Convolution, ...], ...]) -> None:
        super().__init__()
        for number, branch in enumerate(branches):
            chain = [NormalisedConvolution(layer) for layer in branch]
            self.add_module(f"branch{number}", chain[0] if len(chain) == 1 else nn.Sequential(*chain))
        self._count = len(branches)

    def joined(self, values: torch.Tensor, *more: torch.Tensor) -> torch.Tensor:
        """The outputs of all branches, then `more`, along the channels."""
        outputs = [getattr(self, f"branch{number}")(values) for number in range(self._count)]
        return torch.cat([*outputs, *more], 1)


class ResidualBlock(Branches):
    """See `inception.Residual`."""

    def __init__(self, layer: inception.Residual) -> None:
        super().__init__(layer.branches)
        self.conv2d = nn.Conv2d(layer.projection.inputs, layer.projection.outputs, 1)
        self._scale, self._relu = layer.scale, layer.relu

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) to the same shape."""
        total = self.conv2d(self.joined(values)) * self._scale + values
        return total.relu_() if self._relu else total


class ReductionBlock(Branches):
    """See `inception.Reduction`."""

    def __init__(self, layer: inception.Reduction) -> None:
        super().__init__(layer.branches)
        self.pool = nn.MaxPool2d(3, 2)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) to more channels of half the height and width."""
        return self.joined(values, self.pool(values))


class Mean(nn.Module):
    """The mean over the image."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) to (B, C)."""
        return values.mean((2, 3))


class SlopedConvolution(nn.Module):
    """See `compact.Convolution`."""

    def __init__(self, layer: compact.Convolution) -> None:
        super().__init__()
        self._stride, self._padding = layer.stride, layer.padding
        self._groups = layer.inputs if layer.depthwise else 1
        self.weight = nn.Parameter(torch.zeros(layer.shape))
        self.bias = nn.Parameter(torch.zeros(layer.outputs)) if layer.biased else None
        self.slope = nn.Parameter(torch.zeros(1)) if layer.activated else None

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) to the same with other sizes."""
        values = conv2d(values, self.weight, self.bias, self._stride, self._padding, groups=self._groups)
        return values if self.slope is None else prelu(values, self.slope)


class BottleneckBlock(nn.Module):
    """See `compact.Bottleneck`."""

    def __init__(self, layer: compact.Bottleneck) -> None:
        super().__init__()
        self.expand, self.depthwise, self.project = map(SlopedConvolution, layer.convolutions)
        self.squeeze, self.excite = map(SlopedConvolution, layer.weighting)
        self._residual = layer.residual

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) to the same, or to more channels of half the height and width."""
        projected = self.project(self.depthwise(self.expand(values)))
        weights = self.excite(self.squeeze(projected.mean((2, 3), keepdim=True)))
        projected = projected * weights.sigmoid()
        return projected + values if self._residual else projected


def inception_layers(dropout: float) -> nn.Sequential:
    """InceptionResnetV1, untrained: scaled faces (B, 3, 160, 160) to (B, 512). dropout: before the linear layer."""
    layers = OrderedDict(_inception_layers())
    layers |= {
        "mean": Mean(),
        DROPOUT: nn.Dropout(dropout),
        "last_linear": nn.Linear(inception.FEATURES, DIMENSION, bias=False),
        "last_bn": nn.BatchNorm1d(DIMENSION, eps=inception.EPSILON),
    }
    return nn.Sequential(layers)


def _inception_layers() -> Iterator[tuple[str, nn.Module]]:
    """The layers up to the last block by name; those of a repeated block are one."""
    repeats: dict[str, list[nn.Module]] = {}
    for layer in inception.LAYERS:
        if isinstance(layer, inception.Pool):
            yield "pool", nn.MaxPool2d(3, 2)
        elif isinstance(layer, inception.Convolution):
            yield layer.name, NormalisedConvolution(layer)
        elif isinstance(layer, inception.Reduction):
            yield layer.name, ReductionBlock(layer)
        else:
            name, _, number = layer.name.partition(".")
            repeats.setdefault(name, []).append(ResidualBlock(layer))
            yield name, nn.Sequential(*repeats[name]) if number else repeats[name][0]


def compact_layers(dropout: float = 0.0) -> nn.Sequential:
    """The compact network, untrained: scaled faces (B, 3, 128, 128) to (B, 256). dropout: before the last layer."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    stages: dict[str, list[nn.Module]] = {}
    for layer in compact.LAYERS:
        if isinstance(layer, compact.Bottleneck):
            stage = layer.name.partition(".")[0]
            stages.setdefault(stage, []).append(BottleneckBlock(layer))
            layers[stage] = nn.Sequential(*stages[stage])
            continue
        if layer.name == "embedding":
            layers[DROPOUT] = nn.Dropout(dropout)
        layers[layer.name] = SlopedConvolution(layer)
    layers["flat"] = nn.Flatten()
    return nn.Sequential(layers)


def fill(network: nn.Sequential, tensors: Mapping[str, np.ndarray]) -> None:
    """Copy the tensors of a backbone into a network."""
    for name, tensor in network.state_dict().items():
        if name in tensors:
            tensor.copy_(torch.from_numpy(tensors[name]))
